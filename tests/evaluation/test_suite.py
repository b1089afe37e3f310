"""`stllm evaluate suite`: several benchmarks with one loaded model, one table, and resumed runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stllm.cli import main
from stllm.conversation.chat import FOLDER
from stllm.evaluation import runs
from tests.helpers.twins import read, twins

SUITE: dict[str, Any] = {
    "tvbench": {"anno_path": str(twins() / "tvbench"), "tasks": ["moving_direction"]},
    "vinoground": {"anno_path": str(twins() / "vinoground"), "num_frames": 3},
    "msvd": {"anno_path": str(twins() / "msvd" / "test_qa.json"), "video_dir": str(twins() / "msvd" / "videos")},
}


def suite(folder: Path, *more: str, **changed: Any) -> int:
    path = folder / "mine.yaml"
    shared = {"output_dir": str(folder / "out"), "num_frames": 2, "num_beams": 1, "max_new_tokens": 4}
    content = {"model": {"ckpt": str(FOLDER)}, "evaluation": shared, "suite": SUITE, **changed}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return main(["evaluate", "suite", "--cfg-path", str(path), "--device", "cpu", "--num-workers", "0", *more])


def test_a_suite_loads_one_model_and_writes_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loads: list[object] = []
    load = runs.load_opened

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(runs, "load_opened", counted)
    assert suite(tmp_path) == 0
    assert len(loads) == 1
    said, out = capsys.readouterr().out, tmp_path / "out"
    table = (out / "mine.md").read_text(encoding="utf-8")
    assert said.endswith(table)
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == list(SUITE)
    assert "A judge scores msvd" in table and "Published figures have no interval." in table
    content = json.loads((out / "mine.json").read_text())["benchmarks"]
    assert {name: one["counts"]["total"] for name, one in content.items()} == {"tvbench": 2, "vinoground": 8, "msvd": 4}
    frames = {name: one["settings"]["evaluation"]["num_frames"] for name, one in content.items()}
    assert frames == {"tvbench": 2, "vinoground": 3, "msvd": 2}  # a benchmark's own entry wins
    assert all((out / f"{name}.results.json").is_file() for name in SUITE)


def test_a_killed_suite_can_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite(tmp_path) == 0
    out = tmp_path / "out"
    tables = [(out / "mine.md").read_bytes(), (out / "vinoground.md").read_bytes()]
    (out / "msvd.jsonl").unlink()
    (out / "mine.md").unlink()
    path = out / "vinoground.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # killed in the middle of its last line
    capsys.readouterr()
    assert suite(tmp_path) == 0
    said = capsys.readouterr().err
    for line in ("tvbench: 0 items to ask, 2 are answered", "vinoground: 1 items to ask, 7", "msvd: 4 items to ask, 0"):
        assert line in said
    assert [(out / "mine.md").read_bytes(), (out / "vinoground.md").read_bytes()] == tables


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"suite": {}}, "found no section suite"),
        ({"suite": {"tvbnech": {}}}, "unknown benchmark in suite 'tvbnech'"),
        ({"suite": {"tvbench": {"anno": "a"}}}, "unknown key 'suite.tvbench.anno'; did you mean 'anno_path'?"),
        ({"suite": {"tvbench": 3}}, "'suite.tvbench' must be a mapping of keys, found 3"),
        ({"suite": {**SUITE, "tomato": {"anno_path": "/nowhere"}}}, "/nowhere: found none of TOMATO's files"),
        ({"suite": {name: {**SUITE[name], "output_name": "same"} for name in SUITE}}, "'same' for two benchmarks"),
    ],
)
def test_a_bad_suite_is_reported_before_anything_is_asked(
    changed: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suite(tmp_path, **changed) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_options_of_a_single_benchmark_are_refused_for_a_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "suite"]) == 2
    assert "suite needs --cfg-path FILE" in capsys.readouterr().err
    assert suite(tmp_path, "--tasks", "a") == 2
    assert "--tasks applies to a single benchmark" in capsys.readouterr().err


def test_probes_run_only_for_suitable_benchmarks(tmp_path: Path) -> None:
    assert suite(tmp_path, "--permute", "--limit", "1", "--options", "suite.vinoground.tasks=[text]") == 0
    assert (tmp_path / "out" / "tvbench.permute.json").is_file()
    assert not (tmp_path / "out" / "vinoground.permute.json").exists()
    assert read(tmp_path / "out" / "mine.json")["benchmarks"]["vinoground"]["counts"]["total"] == 1
