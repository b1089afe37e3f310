"""VideoQA: all forms of its files, answers matched by id, names of videos, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.common.errors import UserError
from stllm.common.registry import templates
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import ClipReader
from stllm.evaluation.benchmarks.base import Loaded, load_benchmark
from stllm.evaluation.benchmarks.videoqa import SETS
from tests.helpers.twins import twins
from tests.helpers.videos import write_video

UNIFORM = json.loads((Path(__file__).parents[2] / "golden" / "sampling.json").read_text())["chat_uniform"]


def put(root: Path, files: dict[str, Any], *videos: str) -> Path:
    (root / "videos").mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        (root / f"{stem}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for name in videos:
        (root / "videos" / name).touch()
    return root


def read(name: str, path: Path, **settings: Any) -> Loaded:
    settings = {"video_dir": str(path.parent / "videos"), **settings}
    return load_benchmark(name, EvaluationSettings(anno_path=str(path), **settings))


def asked(question: str = "What runs?", **fields: Any) -> dict[str, Any]:
    return {"question": question, **fields}


def names(benchmark: Loaded) -> list[str | None]:
    return [Path(one.media.path).name if one.media else None for one in benchmark.items]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("msvd", "test_qa"),
        ("msvd", "test_q"),
        ("msrvtt", "test_qa"),
        ("msrvtt", "test_q"),
        ("activitynet", "test_q"),
        ("tgif", "test_qa"),
    ],
)
def test_all_layouts_of_imitated_videoqa_are_read(name, file) -> None:
    root = twins() / name
    benchmark = read(name, root / f"{file}.json", num_frames=16)
    assert benchmark.name == name and len(benchmark.items) == 4
    assert all(one.media and one.answer and not one.error for one in benchmark.items)
    if file == "test_q":  # the answers stand there in another order
        answers = {line["question_id"]: line["answer"] for line in json.loads((root / "test_a.json").read_text())}
        assert [one.answer for one in benchmark.items] == [answers[one.id] for one in benchmark.items]
    if name == "tgif":
        assert {Path(one.media.path).suffix for one in benchmark.items if one.media} == {".gif", ".mp4"}


def test_all_fields_for_names_and_ids_are_read(tmp_path) -> None:
    rows = [
        asked(video_name="a.avi", question_id=7, answer="dog"),
        asked(video="b", id="x", answer="cat"),
        asked(video_name="c.avi", question_id=0, answer=2),
    ]
    root = put(tmp_path, {"test_qa": rows}, "a.avi", "b.mp4", "c.mp4")
    benchmark = read("msvd", root / "test_qa.json")
    assert names(benchmark) == ["a.avi", "b.mp4", "c.mp4"]
    assert [(one.id, one.answer) for one in benchmark.items] == [("7", "dog"), ("x", "cat"), ("0", "2")]
    lines = [{"id": one.id, "error": None, **benchmark.benchmark.score(one, ["it"])} for one in benchmark.items]
    lines[1]["error"] = "gone"
    assert benchmark.benchmark.official(benchmark.items, lines) == {
        "": [
            {"id": 7, "question": "What runs?", "answer": "dog", "pred": "it"},
            {"id": 0, "question": "What runs?", "answer": "2", "pred": "it"},
        ]
    }
    assert benchmark.benchmark.summary(lines) == {}


def test_videos_are_found_by_each_benchmarks_naming(tmp_path) -> None:
    videos = ("video7.mp4", "8.mp4", "v_x.mkv", "y.mp4", "g.gif", "video9.webm")
    root = put(tmp_path, {}, *videos)

    def found(name: str, *rows: dict[str, Any]) -> list[str | None]:
        numbered = [asked(**row, id=number, answer="a") for number, row in enumerate(rows)]
        put(root, {name: numbered})
        return names(read(name, root / f"{name}.json"))

    by_id = found("msrvtt", {"video_id": 7}, {"video_id": "8"}, {"video_name": "video9"}, {"video": "video7.mp4"})
    assert by_id == ["video7.mp4", "8.mp4", "video9.webm", "video7.mp4"]
    assert found("activitynet", {"video_name": "x"}, {"video_name": "v_x"}, {"video_name": "y"}) == [
        "v_x.mkv",
        "v_x.mkv",
        "y.mp4",
    ]
    assert found("tgif", {"video_name": "g"}, {"gif_name": "g"}, {"video_name": "y.gif"}) == ["g.gif", "g.gif", "y.mp4"]


def test_answers_are_matched_by_id(tmp_path) -> None:
    questions = [asked(video_name="a", question_id=f"q{n}", question=f"What is {n}?") for n in range(3)]
    answers = [{"answer": f"it is {n}", "type": n, "question_id": f"q{n}"} for n in (2, 0, 3, 1)]  # one too many
    root = put(tmp_path, {"test_q": questions, "test_a": answers, "truth": answers}, "v_a.mp4")
    beside = read("activitynet", root / "test_q.json")
    (root / "test_a.json").unlink()
    named = read("activitynet", root / "test_q.json", answers_path=str(root / "truth.json"))
    assert beside.items == named.items
    assert [(one.questions, one.answer) for one in named.items] == [
        ((f"What is {n}?",), f"it is {n}") for n in range(3)
    ]
    line = {"id": "q1", "error": None, **named.benchmark.score(named.items[1], ["one"])}
    assert line["type"] == 1
    assert named.benchmark.official(named.items, [line])[""] == [
        {"id": "q1", "question": "What is 1?", "answer": "it is 1", "pred": "one", "type": 1}
    ]
    with pytest.raises(UserError, match="no question has an answer: name the file that holds them with --answers-path"):
        read("activitynet", root / "test_q.json")


Q = [asked(video_name="a", question_id=n) for n in range(3)]
A = [{"answer": "a", "question_id": n} for n in range(3)]


@pytest.mark.parametrize(
    ("questions", "answers", "said"),
    [
        (Q, A[:1], "2 of the 3 questions of .*test_q.json have no answer there .such as question_id 1."),
        (Q, [{"answer": "a"}] * 3, "test_a.json, record 1: found no id, expected question_id or id"),
        (Q, [*A, A[1]], "test_a.json, record 4, question 1: the id is also that of .*test_a.json, record 2: give"),
        ([*Q, Q[0]], A, "test_q.json, record 4, question 0: the id is also that of .*test_q.json, record 1: give"),
        ([asked(video_name="a")], A, "test_q.json, record 1: found no id"),
        (Q, Q, "test_a.json, record 1: found the fields question, video_name, question_id, expected answer"),
        (Q, "{", "test_a.json: line 1, column 2: not valid JSON"),
    ],
)
def test_answers_that_do_not_match_are_reported_as_one_sentence(tmp_path, questions, answers, said) -> None:
    root = put(tmp_path, {"test_q": questions, "test_a": answers}, "a.mp4")
    with pytest.raises(UserError, match=said):
        read("msvd", root / "test_q.json")


@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        ("msvd", {"Q": "q", "A": "a", "video_name": "a"}, "looks like a VcgBench ground truth"),
        ("msvd", {"video": "a", "QA": [{"q": "q", "a": "a"}]}, "looks like training data"),
        ("tgif", asked(video="a", answer="x", candidates=["x", "y"]), "looks like an MVBench task"),
        (
            "activitynet",
            asked(video_id=3, id=1, answer="x"),
            "expected ActivityNet-QA, which names its video in video_name or video$",
        ),
        ("tgif", asked(gif_name="a", a1="x", a2="y", answer="1"), "it looks like TGIF-QA's questions with choices"),
    ],
)
def test_a_file_of_another_benchmark_is_reported_as_one_sentence(tmp_path, name, record, said) -> None:
    root = put(tmp_path, {"test_qa": [record]}, "a.mp4")
    with pytest.raises(UserError, match=said):
        read(name, root / "test_qa.json")


def test_a_fault_of_one_record_makes_only_its_item_fail(tmp_path) -> None:
    rows = [
        asked(video_name="a", id=1, answer="x"),
        asked(video_name="gone", id=2, answer="x"),
        asked(video_name="a", id=3, answer=None),
        asked(" ", video_name="a", id=4, answer="x"),
        asked(id=5, answer="x"),
    ]
    root = put(tmp_path, {"test_qa": rows}, "a.mp4")
    benchmark = read("msvd", root / "test_qa.json")
    assert [one.media is None for one in benchmark.items] == [False, True, True, True, True]
    said = [
        "",
        "gone: there is no such file",
        "record 3, answer: found None",
        "question: found ' '",
        "no medium is named",
    ]
    assert all(words in one.error for words, one in zip(said, benchmark.items, strict=True))
    assert len(read("msvd", root / "test_qa.json", limit=2).items) == 2


def test_wrong_folders_and_tasks_are_refused(tmp_path) -> None:
    root = put(tmp_path, {"test_qa": [asked(video_name="a", id=1, answer="x")]})
    with pytest.raises(UserError, match="none of its 1 items can be asked, the first one because: a: there is no such"):
        read("msvd", root / "test_qa.json")
    with pytest.raises(UserError, match="found a folder, expected a JSON list"):
        read("msvd", root)
    with pytest.raises(UserError, match="MSVD-QA has none: leave them out"):
        read("msvd", root / "test_qa.json", tasks=["what"])
    with pytest.raises(UserError, match="no ground truth was named: give TGIF-QA's file of questions"):
        load_benchmark("tgif", EvaluationSettings())


def test_tgif_ids_are_its_own_or_record_numbers(tmp_path) -> None:
    root = put(tmp_path, {"test_qa": [asked(video_name="a", answer="x")] * 2}, "a.gif")
    assert [one.id for one in read("tgif", root / "test_qa.json").items] == ["0", "1"]


def test_every_question_is_a_separate_request(tmp_path) -> None:
    root = put(tmp_path, {"test_qa": [asked(video_name="a", id=1, answer="x")]}, "a.mp4", "v_a.mp4")
    for name in (one.name for one in SETS):
        benchmark = read(name, root / "test_qa.json", system="", num_frames=5)
        (request,) = benchmark.requests(benchmark.items[0], templates.get("minigpt4"))
        assert request.turns[0].question == "What runs?" and request.system == "" and request.pieces is None
        assert request.media is not None and request.media.num_frames == 5


@pytest.mark.parametrize("case", UNIFORM[::2], ids=lambda case: f"{case['num_frames']} of {case['total_frames']}")
def test_sampled_frames_of_videos_equal_the_golden_ones(tmp_path, case) -> None:
    root = put(tmp_path, {"test_qa": [asked(video_name="a", id=1, answer="x")]})
    write_video(root / "videos/a.mp4", num_frames=case["total_frames"], size=(16, 16))
    (only,) = read("msvd", root / "test_qa.json", num_frames=case["num_frames"]).items
    assert only.media is not None
    clip = ClipReader(transform=lambda frame: torch.zeros(3, 1, 1), num_frames=2)(only.media)
    assert clip.indices == case["indices"]
