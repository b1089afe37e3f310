"""`stllm table --compare`: figures computed by hand, and runs that cannot be compared."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from stllm.conversation.chat import FOLDER
from stllm.evaluation.reports.comparison import compare
from tests.helpers.benchmarks import choice_benchmark, choice_item, letter_of, lines_of
from tests.helpers.twins import twins

BENCHMARK = choice_benchmark(
    [choice_item(number, task) for task in ("Moving Direction", "State Change") for number in range(4)]
)


def write(path: Path, wrong: Collection[str], failed: Collection[str] = (), **changed: Any) -> Path:
    """Write records that are correct except for these ids. changed: fields to set in every record."""

    def answer(item: Any) -> str | None:
        return None if item.id in failed else "" if item.id in wrong else letter_of(item, item.answer)

    lines = lines_of(BENCHMARK, answer)
    for number, line in enumerate(lines):
        line.update({"question": "Where does it go?", "video": f"{number}.mp4", **changed})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_gained_and_lost_items_and_their_p_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.jsonl", {f"moving_direction/{number}" for number in range(4)} | {"state_change/0"})
    second = write(tmp_path / "b.jsonl", {"state_change/1"}, failed={"state_change/2"})
    assert main(["table", "--compare", str(first), str(second), "--output", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "both.json").read_text())["strict"]
    every = found["all items"]
    assert (every["items"], every["gained"], every["lost"], every["difference"]) == (8, 5, 2, 37.5)
    assert every["p"] == pytest.approx(2 * (1 + 7 + 21) / 2**7)  # exact, two-sided: 2 of 7 changes are losses
    centre, spread = 3 / 10, 1.959964 * (8 / 10 - 0.09) ** 0.5 / 10**0.5  # Agresti and Min
    assert every["interval"] == pytest.approx([100 * (centre - spread), 100 * (centre + spread)])
    assert every["gained_items"] == [*(f"moving_direction/{number}" for number in range(4)), "state_change/0"]
    assert every["lost_items"] == ["state_change/1", "state_change/2"]  # one that failed is not right
    assert found["Moving Direction"]["accuracies"] == [0.0, 100.0]
    assert said == (tmp_path / "both.md").read_text() and "lost: state_change/1, state_change/2\n" in said
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_questions_about_one_video_are_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All changes are in one of two videos, so the clustered error is larger than that of independent items."""
    paths = [
        write(tmp_path / name, wrong)
        for name, wrong in (("a.jsonl", {f"state_change/{n}" for n in range(4)}), ("b.jsonl", set()))
    ]
    for path in paths:
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        for line in lines:
            line["video"] = line["task"]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare(paths[0], paths[1], tmp_path / "both")
    found = json.loads((tmp_path / "both.json").read_text())["strict"]["all items"]
    error = 100 * (2 * 2.0**2) ** 0.5 / 8  # each video's sum of (difference - 1/2) is 2 or -2
    assert found["difference"] == 50.0
    assert found["interval"] == pytest.approx([50 - 1.959964 * error, 100.0], abs=1e-6)
    assert (found["gained"], found["lost"], found["p"]) == (4, 0, 1.0)  # McNemar's p of independent items is 1/8
    capsys.readouterr()
    assert main(["table", "--compare", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| all items +\| +8 \|.*\| +1 \| +4 \| +0 \|", said) and "p: exact, two-sided, by video" in said


def test_other_questions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.jsonl", set())

    def refused(path: Path) -> str:
        assert main(["table", "--compare", str(first), str(path)]) == 1
        return capsys.readouterr().err

    changes: dict[str, Any] = {"question": "Who?", "answer": "up and away", "candidates": ["away", "up"]}
    for key, value in changes.items():
        other = write(tmp_path / "b.jsonl", (), **{key: value})
        assert f"{key} of moving_direction/0 is {value!r}" in refused(other)
    less = tmp_path / "less.jsonl"
    less.write_text("\n".join(first.read_text().splitlines()[:5]) + "\n")
    assert "lacks 3 of the items" in refused(less)
    judged = write(tmp_path / "judged.jsonl", set())
    judged.write_text(judged.read_text().replace('"correct"', '"other"'))
    assert "has no `correct`" in refused(judged)
    assert "there is no such file" in refused(tmp_path / "absent.jsonl")
    (tmp_path / "else.jsonl").write_text('{"a": 1}\n')
    assert "found the fields a" in refused(tmp_path / "else.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no line that is scored" in refused(tmp_path / "empty.jsonl")


def test_wrong_usage_of_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table"]) == 2 and "name results files, or two runs" in capsys.readouterr().err
    assert main(["table", "a.json", "--output", "b"]) == 2 and "--output goes with --compare" in capsys.readouterr().err


def test_comparing_the_tiny_model_with_rotated_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--anno-path", str(twins() / "tvbench"), "--output-dir", str(tmp_path)]
    model = [
        "--ckpt-path",
        str(FOLDER),
        "--device",
        "cpu",
        "--num-workers",
        "0",
        "--tasks",
        "moving_direction,object_count",
    ]
    assert main(["evaluate", "tvbench", *files, *model, "--permute"]) == 0
    capsys.readouterr()
    paths = [tmp_path / f"tvbench{ending}.jsonl" for ending in ("", ".rotated1")]
    assert main(["table", "--compare", *map(str, paths), "--output", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    assert "tvbench.rotated1 against tvbench" in said
    found = json.loads((tmp_path / "both.json").read_text())["strict"]["all items"]
    right = [[json.loads(text)["correct"]["strict"] for text in path.read_text().splitlines()] for path in paths]
    assert found["accuracies"] == [25.0 * sum(run) for run in right] and found["items"] == 4
    low, high = found["interval"]
    assert low <= found["difference"] <= high and 0 <= found["p"] <= 1


def test_vinoground_is_compared_by_pairs(tmp_path: Path) -> None:
    lines = []
    for part in ("text", "video"):
        for half in ("pos", "neg"):
            known = {"id": f"{part}/0_{half}", "task": part, "video": f"{part}{half}", "question": "q", "answer": "A"}
            lines.append({**known, "prediction": "A", "error": None, "parsed": {"strict": True}})
    for name, wrong in (("a", "video/0_neg"), ("b", "")):
        for line in lines:
            line["correct"] = dict.fromkeys(("strict", "official"), line["id"] != wrong)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / f"{name}.config.yaml").write_text("benchmark: vinoground\n")
    compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "both")
    found = json.loads((tmp_path / "both.json").read_text())["strict"]
    assert {name: group["gained"] for name, group in found.items()} == {
        "all items": 1,
        "text": 0,
        "video": 1,
        "group": 1,
    }
