"""From the ground truth to the paper's table: imitations of all benchmarks are asked, judged and tabulated."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from stllm.conversation.chat import Chat
from stllm.conversation.requests import Answer, Prepared
from stllm.evaluation.benchmarks.mvbench import TASKS
from tests.helpers.evaluation import CHECKPOINT
from tests.helpers.judge_server import MODEL, FakeJudge, judge_server, texts_of
from tests.helpers.twins import twins

# Each benchmark's files, and the axes that are judged
FILES = {
    "mvbench": ("mvbench", None),
    "vcgbench": ("vcgbench", "vcgbench/videos"),
    "msvd": ("msvd/test_qa.json", "msvd/videos"),
    "msrvtt": ("msrvtt/test_q.json", "msrvtt/videos"),
    "activitynet": ("activitynet/test_q.json", "activitynet/videos"),
    "tgif": ("tgif/test_qa.json", "tgif/videos"),
}
VCGBENCH_AXES = ("correctness", "detail", "context", "temporal", "consistency")
QA_BENCHMARKS = ("msvd", "msrvtt", "activitynet", "tgif")
WRONG = "I cannot tell"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(name: str, output: Path, *more: str) -> None:
    """Evaluate the tiny random model on an imitated benchmark."""
    anno, videos = FILES[name]
    argv = ["evaluate", name, "--ckpt-path", str(CHECKPOINT), "--anno-path", str(twins() / anno)]
    argv += ["--video-dir", str(twins() / videos)] if videos else []
    argv += ["--output-dir", str(output), "--device", "cpu", "--num-workers", "0", "--num-beams", "1", *more]
    assert main(argv) == 0


def judge(axis: str, name: str, output: Path, server: FakeJudge) -> dict[str, Any]:
    """Let the fake judge score a benchmark's predictions, and return the results."""
    folder = output / f"{name}.judged"
    argv = ["judge", axis, "--pred-path", str(output / f"{name}.jsonl"), "--output-dir", str(folder)]
    assert main([*argv, "--base-url", server.url, "--model", MODEL]) == 0
    results: dict[str, Any] = read(folder / f"{axis}.results.json")
    return results


def tabulate(output: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Return the cells of the paper table's rows with our results."""
    capsys.readouterr()
    qa = [f"{name}={output / f'{name}.judged' / 'qa.results.json'}" for name in QA_BENCHMARKS if name != "tgif"]
    axes = [str(output / "vcgbench.judged" / f"{axis}.results.json") for axis in VCGBENCH_AXES]
    assert main(["table", str(output / "mvbench.results.json"), *axes, *qa]) == 0
    rows = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


# ---- a model that knows the answers of every first clip, and those about consistency --------------------------------


def known_answers() -> dict[tuple[str, str], str]:
    """Return (medium's name without extension, question) -> correct answer, or its letter, for all benchmarks."""
    answers: dict[tuple[str, str], str] = {}
    for item in (item for task in TASKS for item in read(twins() / "mvbench" / "json" / task.file)):
        letter = "ABCDEFG"[item["candidates"].index(item["answer"])]
        answers[Path(item["video"]).stem, item["question"]] = f"{letter}) {item['answer']}"
    for part in ("generic", "temporal", "consistency"):
        for row in read(twins() / "vcgbench" / f"{part}_qa.json"):
            answers.update({(row["video_name"], row[key]): row["A"] for key in ("Q", "Q1", "Q2") if key in row})
    for name in ("msvd", "tgif"):
        for row in read(twins() / name / "test_qa.json"):
            answers[Path(row["video_name"]).stem, row["question"]] = row["answer"]
    for name, prefix in (("msrvtt", ""), ("activitynet", "v_")):
        answer_of = {row["question_id"]: row["answer"] for row in read(twins() / name / "test_a.json")}
        for row in read(twins() / name / "test_q.json"):
            answers[prefix + row["video_name"], row["question"]] = answer_of[row["question_id"]]
    return answers


def is_known(stem: str) -> bool:
    """Check whether the model knows this medium. It knows half of them, so that errors elsewhere change a score."""
    return stem.startswith("v_consistency") or stem.endswith("000")


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the replies of the language model; videos are still read and encoded, and prompts made."""
    answers = known_answers()

    def complete(chat: Chat, prepared: Sequence[Prepared], *_: object) -> list[Answer]:
        return [told(one) for one in prepared]

    def told(one: Prepared) -> Answer:
        assert one.request.media is not None and one.visual is not None
        stem, asked = Path(one.request.media.path).stem, one.request.turns[-1].question
        question = asked.split("\nOptions:")[0].removeprefix("Question: ")
        text = answers[stem, question] if is_known(stem) else WRONG
        return Answer(text, asked, one.request.media.path, one.times, len(one.visual), {**one.seconds, "answer": 0.0})

    monkeypatch.setattr(Chat, "complete", complete)


@pytest.mark.usefixtures("knowing")
def test_the_paper_table_shows_what_a_model_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in FILES:
        evaluate(name, tmp_path, "--num-frames", "2")
    mvbench = read(tmp_path / "mvbench.results.json")
    assert mvbench["counts"] == {"total": 40, "answered": 38, "failed": 0, "excluded": 2}
    tasks = {task.name: 50.0 for task in TASKS if task.name != "Fine-grained Pose"}
    for rules in ("strict", "official"):
        assert mvbench["scores"][rules]["average"] == 50.0
        assert {task: mvbench["scores"][rules]["tasks"][task] for task in tasks} == tasks
    with judge_server() as server:
        means = {axis: judge(axis, "vcgbench", tmp_path, server)["mean"] for axis in VCGBENCH_AXES}
        accuracies = {name: judge("qa", name, tmp_path, server)["accuracy"] for name in QA_BENCHMARKS}
    # the judge gives 5 for the right words, 1 for others; half of the clips are known, and all of consistency's
    assert means == {"correctness": 3.0, "detail": 3.0, "context": 3.0, "temporal": 3.0, "consistency": 5.0}
    assert accuracies == dict.fromkeys(QA_BENCHMARKS, 75.0)  # three questions about the first clip, one about the other
    expected = ["50.0", "3.40", "3.00", "3.00", "3.00", "3.00", "5.00", "75.0", "75.0", "75.0"]
    assert list(tabulate(tmp_path, capsys).values()) == [expected, expected]


# ---- the tiny random model itself -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_random_model_runs_through_the_whole_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graded: dict[str, list[dict[str, str]]] = {}
    for name in FILES:
        evaluate(name, tmp_path)  # as published, but for one beam
    with judge_server() as server:
        for axis, name in [*((axis, "vcgbench") for axis in VCGBENCH_AXES), *(("qa", name) for name in QA_BENCHMARKS)]:
            before = len(server.requests)
            results = judge(axis, name, tmp_path, server)
            graded[f"{name} {axis}"] = [texts_of(request) for request in server.requests[before:]]
            assert results["counts"]["failed"] == 0
            assert results["counts"]["scored"] + results["counts"]["unanswered"] == results["counts"]["total"]
    predictions = {name: lines(tmp_path / f"{name}.jsonl") for name in FILES}
    assert all(record["error"] is None for records in predictions.values() for record in records)
    assert len({record["prediction"] for record in predictions["mvbench"]}) > 10  # it says many things
    for name in QA_BENCHMARKS:  # the judge is sent each prediction as it is, beside its own answer
        sent = sorted((texts["Question"], texts["Correct answer"]) for texts in graded[f"{name} qa"])
        assert sent == sorted((record["question"], record["answer"]) for record in predictions[name])
    rows = tabulate(tmp_path, capsys)
    assert [len(cells) for cells in rows.values()] == [10, 10]
    assert all(cell != "–" for cells in rows.values() for cell in cells)
    for name in FILES:
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8").startswith("#")
    assert (tmp_path / "mvbench.png").stat().st_size > 10_000
