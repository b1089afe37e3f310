"""`stllm evaluate` on the command line: complete runs with a golden checkpoint and real videos, and failures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stllm.cli import main
from stllm.common.jsonl import Appender
from stllm.common.registry import templates
from stllm.evaluation import runs
from stllm.models.st_llm import STLLM
from stllm.processors.templates import BOS, INSTRUCTBLIP, VISUAL
from tests.helpers.evaluation import arguments, copy_run, evaluate, lines, write_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an uninterrupted run of one process with batches of 8."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert evaluate(data, output) == 0
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    return copy_run(finished, tmp_path / "out")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test fail if the model is loaded."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runs, "load_opened", load)


def test_records_are_in_the_ground_truths_order_and_contain_frames(data: Path, finished: Path) -> None:
    asked = json.loads((data / "test_qa.json").read_text())
    found = lines(finished)
    assert [line["question"] for line in found] == [item["question"] for item in asked]
    assert len({line["prediction"] for line in found}) > len(found) // 2  # else equal answers would prove little
    assert found[0]["frames"]["count"] == len(found[0]["frames"]["times"]) == 5
    assert found[0]["error"] is None
    official = json.loads((finished / "msvd.json").read_text())
    assert [entry["pred"] for entry in official] == [line["prediction"] for line in found]
    results = json.loads((finished / "msvd.results.json").read_text())
    assert results["counts"] == {"total": 12, "answered": 12, "failed": 0, "excluded": 0}
    assert all(len(digest) == 16 for digest in results["digests"].values()) and len(results["digests"]) == 3
    assert results["settings"]["evaluation"]["num_frames"] == 5


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 2), (8, 2)])
def test_batches_and_workers_do_not_change_results(
    data: Path, finished: Path, tmp_path: Path, batch_size: int, num_workers: int
) -> None:
    options = ("--batch-size", str(batch_size), "--num-workers", str(num_workers))
    assert evaluate(data, tmp_path / "out", *options) == 0
    assert lines(tmp_path / "out") == lines(finished)
    for name in ("msvd.json", "msvd.md"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()


def test_rerunning_a_finished_run_only_rewrites_outputs(data: Path, output: Path, no_model: None) -> None:
    before = (output / "msvd.jsonl").read_bytes()
    results = json.loads((output / "msvd.results.json").read_text())
    for name in ("msvd.json", "msvd.md", "msvd.results.json"):
        (output / name).unlink()
    assert evaluate(data, output) == 0
    assert (output / "msvd.jsonl").read_bytes() == before
    again = json.loads((output / "msvd.results.json").read_text())
    assert again["settings"]["evaluation"].pop("output_dir") == str(output)
    del results["settings"]["evaluation"]["output_dir"]
    assert again == results
    assert (output / "msvd.json").is_file() and (output / "msvd.md").is_file()


def test_an_interrupted_run_is_resumed(data: Path, finished: Path, output: Path) -> None:
    whole = (output / "msvd.jsonl").read_bytes().splitlines(keepends=True)
    (output / "msvd.jsonl").write_bytes(b"".join(whole[4:7]) + whole[9][:40])  # half a last line
    (output / "msvd.part-0.jsonl").write_bytes(whole[1])  # of a run of three processes
    (output / "msvd.part-2.jsonl").write_bytes(whole[2] + whole[3][:-1])
    assert evaluate(data, output, "--batch-size", "2") == 0
    assert lines(output) == lines(finished)
    kept = (output / "msvd.jsonl").read_bytes().splitlines(keepends=True)
    assert [kept[place] == whole[place] for place in (1, 2, 4, 5, 6)] == [True] * 5  # seconds, too: not asked again
    assert not list(output.glob("*.part-*"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--num-frames", "6"), "evaluation.num_frames was 5 and is now 6"),
        (("--max-new-tokens", "7"), "decoding.max_new_tokens was 6 and is now 7"),
        (("--options", "evaluation.system=Look."), "evaluation.system was '' and is now 'Look.'"),
        (("--options", "model.video_input=mean"), "model.video_input was 'residual' and is now 'mean'"),
        (("--dtype", "bfloat16"), "model.dtype was 'float32' and is now 'bfloat16'"),
    ],
)
def test_resuming_with_another_setting_is_refused(
    data: Path, output: Path, no_model: None, capsys: pytest.CaptureFixture[str], option: tuple[str, ...], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert evaluate(data, output, *option) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and "name another --output-name" in error
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_resuming_with_another_prompt_is_refused(
    data: Path, output: Path, no_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reworded = replace(INSTRUCTBLIP, opening=(VISUAL, BOS, "{context}Human: {text}"))
    monkeypatch.setitem(templates._entries, "instructblip", reworded)
    assert evaluate(data, output) == 1
    error = capsys.readouterr().err
    assert (
        "prompt.pieces was " in error and "###Human: QUESTION ###Assistant: " in error and "'Human: QUESTION'" in error
    )


def test_giving_a_default_explicitly_resumes(data: Path, output: Path, no_model: None) -> None:
    assert evaluate(data, output, "--options", "evaluation.repetition_penalty=1.5") == 0


def test_resuming_with_another_checkpoint_or_ground_truth_is_refused(
    data: Path, output: Path, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(Path(arguments(data, output)[3]).with_name("instructblip_bta_mean"))
    words = [other if word.endswith("instructblip_residual_mvm") else word for word in arguments(data, output)]
    assert main(words) == 1
    assert "model.checkpoint was" in capsys.readouterr().err
    changed = json.loads((data / "test_qa.json").read_text())
    changed[3]["question"] = "who is it"
    (tmp_path / "videos").symlink_to(data / "videos")
    (tmp_path / "test_qa.json").write_text(json.dumps(changed))
    assert evaluate(tmp_path, output) == 1
    assert "question of 3 was 'what moves first 0 3' and is 'who is it'" in capsys.readouterr().err


def test_a_limit_may_be_raised_but_not_lowered(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate(data, output, "--limit", "5") == 0
    assert len(lines(output)) == 5
    assert evaluate(data, output) == 0
    assert lines(output) == lines(finished)
    assert evaluate(data, output, "--limit", "5") == 1
    assert "answers 7 items that are not asked now (5)" in capsys.readouterr().err
    assert lines(output) == lines(finished)


def test_unreadable_media_are_recorded_counted_and_retried(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, output = tmp_path / "data", tmp_path / "out"
    copy_run(data, copy)
    (copy / "videos" / "vid1.mp4").write_bytes(b"no video at all")
    (copy / "videos" / "vid2.mp4").unlink()
    assert evaluate(copy, output, "--num-workers", "2") == 0
    assert "6 answered, 6 failed, 0 excluded, of 12" in capsys.readouterr().out
    found = lines(output)
    assert [line["id"] for line in found] == [line["id"] for line in lines(finished)]
    for line in found:
        number = int(line["id"]) % 4
        assert bool(line["error"]) == (number in (1, 2))
        assert (line["prediction"] is None) == (number in (1, 2))
    assert "vid1.mp4" in found[1]["error"] and "vid2.mp4" in found[2]["error"]
    for number in (1, 2):
        (copy / "videos" / f"vid{number}.mp4").write_bytes((data / "videos" / f"vid{number}.mp4").read_bytes())
    assert evaluate(copy, output) == 0
    assert lines(output) == lines(finished)


def test_a_run_without_any_answer_fails(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, output = tmp_path / "data", tmp_path / "out"
    copy_run(data, copy)
    for video in (copy / "videos").iterdir():
        video.write_bytes(b"gone")
    assert evaluate(copy, output) == 1
    assert "not one item could be answered; the first one: " in capsys.readouterr().err
    assert json.loads((output / "msvd.results.json").read_text())["counts"]["failed"] == 12


def test_a_too_long_question_fails_only_its_item(data: Path, tmp_path: Path) -> None:
    items = json.loads((data / "test_qa.json").read_text())
    items[5]["question"] = "what " * 3000
    (tmp_path / "videos").symlink_to(data / "videos")
    (tmp_path / "test_qa.json").write_text(json.dumps(items))
    assert evaluate(tmp_path, tmp_path / "out") == 0
    failed = {line["id"]: line["error"] for line in lines(tmp_path / "out") if line["error"]}
    assert list(failed) == ["5"] and "positions" in failed["5"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory for 2 questions at once: lower --batch-size"),
        (KeyboardInterrupt(), "interrupted: answers so far are kept, and the same command resumes"),
    ],
)
def test_a_failure_of_the_model_keeps_earlier_answers(
    data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    message: str,
) -> None:
    calls, generate = [0], STLLM.generate

    def failing(self: STLLM, **options: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise error
        return generate(self, **options)

    monkeypatch.setattr(STLLM, "generate", failing)
    code = evaluate(data, tmp_path / "out", "--batch-size", "2")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert message in capsys.readouterr().err
    assert len(lines(tmp_path / "out")) == 4
    assert evaluate(data, tmp_path / "out", "--batch-size", "2") == 0
    assert lines(tmp_path / "out") == lines(finished)


def test_a_full_disk_is_reported_and_keeps_earlier_answers(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, add = [0], Appender.add

    def filling(self: Appender, record: dict[str, object]) -> None:
        count[0] += 1
        if count[0] > 5:  # half the line fits, the rest does not
            monkeypatch.setattr(self, "_stream", HalfFull(self._stream))
        add(self, record)

    monkeypatch.setattr(Appender, "add", filling)
    assert evaluate(data, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "no space left on the disk for " in error and "what was finished is kept" in error
    monkeypatch.undo()
    assert len((tmp_path / "out" / "msvd.jsonl").read_bytes().splitlines()) == 5
    assert evaluate(data, tmp_path / "out") == 0
    assert lines(tmp_path / "out") == lines(finished)


class HalfFull:
    """A file that accepts a few bytes, and then raises the error of a full disk."""

    def __init__(self, stream: object) -> None:
        self.stream, self.taken = stream, False

    def write(self, content: bytes) -> int:
        if self.taken:
            raise OSError(28, "No space left on device")
        self.taken = True
        return int(self.stream.write(content[:10]))  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output-name", "a/b"], "output_name is 'a/b'"),
        (["--options", "evaluation.sampling=sometimes"], "evaluation.sampling is 'sometimes'"),
        (["--cfg-path", "nowhere.yaml"], "nowhere.yaml"),
        (["--video-dir", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_reported_before_the_model_is_loaded(
    data: Path, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert evaluate(data, tmp_path / "out", *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_many_beams_are_wrong_usage(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(data, tmp_path / "out", "--num-beams", "65") == 2
    assert "--num-beams: found '65', expected a whole number from 1 to 64" in capsys.readouterr().err


def test_an_unknown_benchmark_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "mvbensh"]) == 2
    assert "invalid choice: 'mvbensh'" in capsys.readouterr().err
