"""`python -m benchmarks`: the measurements it runs, the page it writes, and its messages about failures and changes."""

import ast
import json
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as command
from benchmarks.common import markdown, report
from benchmarks.measurements import MEASUREMENTS
from benchmarks.page import write_page

PACKAGE = Path(command.__file__).parent
ROWS = [{"": "one by one", "seconds": 2.0, "speed-up": 1.0}, {"": "ours", "seconds": 0.4, "speed-up": 5.0}]
CURVE = [{"frames": frames, **dict.fromkeys(MEASUREMENTS["masking"].ratios, 1 - frames / 200)} for frames in (8, 64)]


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    report("reuse", "one by one", ROWS, {"questions": 25}, tmp_path, also={"held": [1, 2]})
    report("masking", "a step on all", CURVE, {"dropped": 0.5}, tmp_path)
    return tmp_path


def reported_names(path: Path) -> list[str]:
    """Return the first argument of each call of `report` in a module."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return [
        ast.literal_eval(call.args[0]) for call in calls if isinstance(call.func, ast.Name) and call.func.id == "report"
    ]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_is_a_module_that_writes_under_its_own_name(name: str) -> None:
    assert reported_names(PACKAGE / f"{name}.py") == [name]


def test_the_page_has_tables_charts_and_a_list_of_missing_results(folder: Path) -> None:
    assert write_page(folder, {}, quick=True) == ""
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "python -m benchmarks --quick" in page and "Against the last" not in page
    assert "| ours       |     0.4 |        5 |" in page
    assert "Baseline: one by one." in page and "Sizes: questions 25." in page and "Also: held 1 / 2." in page
    assert "Not measured yet: `startup`" in page and "`reuse`" not in page.split("Not measured yet")[1]
    for name in ("reuse", "masking"):
        assert f"]({name}.svg)" in page
        chart = (folder / f"{name}.svg").read_bytes()
        words = " ".join(ET.fromstring(chart).itertext())
        assert all(column in words for column in MEASUREMENTS[name].ratios)
        assert len(chart) < 40_000
    write_page(folder, {}, quick=True)
    assert (folder / "masking.svg").read_bytes() == chart  # a commit shows what changed, and nothing else


def test_the_page_lists_changes(folder: Path) -> None:
    then = json.loads((folder / "reuse.json").read_text())
    then["rows"][1]["speed-up"] = 10.0
    other = {**json.loads((folder / "masking.json").read_text()), "sizes": {"dropped": 0.3}}
    compared = write_page(folder, {"reuse": then, "masking": other}, quick=False)
    assert compared in (folder / "README.md").read_text(encoding="utf-8")
    row = next(line for line in compared.splitlines() if "| reuse" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "reuse",
        "ours",
        "speed-up",
        "10",
        "5",
        "0.5",
        "worse",
    ]
    assert "not compared: masking" in compared


def test_the_command_runs_the_given_measurements_and_names_failed_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words[1:])
        return subprocess.CompletedProcess(words, 1 if "benchmarks.masking" in words else 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "committed", lambda path: None)
    arguments = ["--output-dir", str(folder), "--quick", "--device", "cpu"]
    assert command.main(["--only", "loading", "reuse", *arguments]) == 0
    assert asked[0] == ["-m", "benchmarks.loading", "--output-dir", str(folder), "--quick"]
    assert asked[1] == ["-m", "benchmarks.reuse", "--output-dir", str(folder), "--quick", "--device", "cpu"]
    assert command.main(["--only", "masking", "reuse", *arguments]) == 1
    assert "failed: masking" in capsys.readouterr().err
    asked.clear()
    assert command.main(["--page", *arguments]) == 0 and asked == []
    assert command.main(arguments) == 1 and [words[1] for words in asked] == [
        f"benchmarks.{name}" for name in MEASUREMENTS
    ]


@pytest.mark.parametrize("name", ["speed", "engine"])  # the last is run on request
def test_an_unknown_name_lists_the_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--only", name])
    assert stop.value.code == 2 and "training_step" in capsys.readouterr().err


def test_a_table_names_its_machine_and_versions(folder: Path) -> None:
    text = markdown(json.loads((folder / "reuse.json").read_text()))
    assert "Machine: " in text and "torch " in text and "cores" in text
