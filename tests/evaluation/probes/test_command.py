"""`stllm evaluate mvbench --probe --permute` on the command line, with real videos and a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from stllm.evaluation.benchmarks import mvbench
from stllm.media.views import VIEWS, view_order
from tests.helpers.videos import write_video

CHECKPOINT = Path(__file__).parents[2] / "golden" / "instructblip_residual_mvm"
OPTIONS = {"Object Existence": ["yes", "no"], "Moving Direction": ["up", "down", "left"]}

Command = Callable[..., int]


@pytest.fixture(scope="module")
def ground_truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mvbench")
    for task, options in OPTIONS.items():
        slug = task.lower().replace(" ", "_")
        write_video(root / f"{slug}.mp4", num_frames=60)
        item: dict[str, Any] = {
            "video": f"{slug}.mp4",
            "question": "What?",
            "candidates": options,
            "answer": options[0],
        }
        gone = {**item, "video": "gone.mp4"}
        (root / "json").mkdir(exist_ok=True)
        (root / "json" / f"{slug}.json").write_text(json.dumps([item, {**item, "answer": options[1]}, gone]))
    (root / "video").mkdir()
    for path in root.glob("*.mp4"):
        path.rename(root / "video" / path.name)
    return root


def evaluate(ground_truth: Path, folder: Path, *more: str) -> int:
    files = ["--anno-path", str(ground_truth), "--output-dir", str(folder), "--ckpt-path", str(CHECKPOINT)]
    return main(
        ["evaluate", "mvbench", *files, "--num-workers", "0", "--max-new-tokens", "3", "--device", "cpu", *more]
    )


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["id"]: record for record in records}


def test_both_probes_can_be_resumed(ground_truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(ground_truth, tmp_path, "--probe", "--permute") == 0
    said = capsys.readouterr().out
    assert "temporal probe: " in said and "option permutations: " in said
    forward = lines_of(tmp_path / "mvbench.jsonl")
    assert sum(bool(line["error"]) for line in forward.values()) == 2
    for view in VIEWS[1:]:
        lines = lines_of(tmp_path / f"mvbench.{view}.jsonl")
        assert set(lines) == set(forward)
        for id_, line in lines.items():
            times = forward[id_]["frames"]["times"]
            assert line["frames"]["times"] == [times[place] for place in view_order(view, len(times))]
    turned = lines_of(tmp_path / "mvbench.turned.jsonl")
    assert {id_: line["answer"] for id_, line in turned.items()} == {
        "moving_direction/0": "down",
        "moving_direction/1": "up",
    }
    reversed_ = lines_of(tmp_path / "mvbench.reversed.jsonl")
    assert all(line["prediction"] == reversed_[id_]["prediction"] for id_, line in turned.items())  # asked the same
    assert [len(lines_of(tmp_path / f"mvbench.rotated{places}.jsonl")) for places in (1, 2)] == [6, 3]
    assert not (tmp_path / "mvbench.rotated3.jsonl").exists()
    probe, permute = (json.loads((tmp_path / f"mvbench.{name}.json").read_text()) for name in ("probe", "permute"))
    assert probe["compared"] == 4 and probe["failed"] == dict.fromkeys(VIEWS, 2)
    assert permute["failed"] == 5 and permute["complete"] == 4 and permute["items"] == {"0": 6, "1": 6, "2": 3}
    for content in (probe, permute):
        assert content["benchmark"] == "mvbench" and set(content["digests"]) == {"config", "prompts", "checkpoint"}

    made = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".json", ".md", ".png")}
    path = tmp_path / "mvbench.reversed.jsonl"
    whole = lines_of(path)
    path.write_bytes(path.read_bytes()[:-300])  # killed in the middle of its last line
    assert evaluate(ground_truth, tmp_path, "--probe", "--permute") == 0
    assert {id_: line["prediction"] for id_, line in lines_of(path).items()} == {
        id_: line["prediction"] for id_, line in whole.items()
    }
    for name in (name for name in made if "results" not in name):  # which tells the seconds
        assert (tmp_path / name).read_bytes() == made[name], name


def test_records_of_one_view_are_not_resumed_as_another(
    ground_truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(ground_truth, tmp_path, "--probe", "--tasks", "moving_direction", "--limit", "1") == 0
    for ending in ("jsonl", "config.yaml"):
        (tmp_path / f"mvbench.shuffled.{ending}").replace(tmp_path / f"mvbench.blank.{ending}")
    assert evaluate(ground_truth, tmp_path, "--probe", "--tasks", "moving_direction", "--limit", "1") == 1
    assert "variant was 'shuffled' and is now 'blank'" in capsys.readouterr().err


def test_tasks_can_be_added_to_a_probe_but_prompts_cannot_change(
    ground_truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(ground_truth, tmp_path, "--tasks", "moving_direction", "--limit", "1") == 0
    with monkeypatch.context() as patched:
        patched.setattr(mvbench, "REQUEST", "Only give the letter.")
        assert evaluate(ground_truth, tmp_path) == 1
    error = capsys.readouterr().err
    assert "prompt.pieces was " in error and "Only give the best option." in error and "Only give the letter." in error
    assert evaluate(ground_truth, tmp_path) == 0
    assert len(lines_of(tmp_path / "mvbench.jsonl")) == 6


def test_probes_are_refused_for_judged_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "msvd", "--probe"]) == 2
    assert "--probe and --permute go with multiple choice: the answers of msvd need a judge" in capsys.readouterr().err
