"""MVBench: reading of tasks and media, excluded tasks, scores of different models, sampled frames."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stllm.common.errors import UserError
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import ClipReader
from stllm.evaluation.benchmarks.base import Item, Loaded, Record, load_benchmark
from stllm.evaluation.benchmarks.mvbench import TASKS
from tests.helpers.twins import twins
from tests.helpers.videos import write_video

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "sampling.json").read_text())["mvbench"]
STAR = "star/Charades_v1_480"


def item(video: str, **changed: Any) -> dict[str, Any]:
    return {"video": video, "question": "Which way?", "candidates": ["left", "right"], "answer": "left", **changed}


def put(root: Path, tasks: dict[str, Any], *media: str) -> Path:
    """Write a folder in MVBench's layout. tasks: file stem -> content. media: paths below `video` of empty files."""
    for stem, content in tasks.items():
        path = root / "json" / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    (root / "video").mkdir(parents=True, exist_ok=True)
    for name in media:
        path = root / "video" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def read(path: Path, **settings: Any) -> Loaded:
    return load_benchmark("mvbench", EvaluationSettings(anno_path=str(path), sampling="segment", **settings))


def answered(benchmark: Loaded, reply: str) -> list[Record]:
    """Return the records of a model that always gives the same reply."""
    return [record(benchmark, one, reply) for one in benchmark.items]


def record(benchmark: Loaded, one: Item, reply: str) -> Record:
    head = {"id": one.id, "task": one.task, "prediction": None, "error": one.error or None}
    return head if one.error else {**head, **benchmark.benchmark.score(one, [reply])}


# ---- files ----------------------------------------------------------------------------------------------------------


def test_the_imitation_of_the_whole_benchmark_is_read() -> None:
    benchmark = read(twins() / "mvbench", num_frames=0)
    assert len(benchmark.items) == 38 and not any(one.error for one in benchmark.items)
    assert [one.task for one in benchmark.items[::2]] == [task.name for task in TASKS if task.folder != "nturgbd"]
    assert list(benchmark.excluded) == ["Fine-grained Pose"] and benchmark.num_excluded == 2
    assert "fine_grained_pose_00000.mp4: there is no such file in" in benchmark.excluded["Fine-grained Pose"]
    assert "video/nturgbd" in benchmark.excluded["Fine-grained Pose"]
    by_task = {task.name: [one for one in benchmark.items if one.task == task.name] for task in TASKS}
    for task in TASKS:
        for one in by_task[task.name]:
            assert one.media is not None and one.media.num_frames == 0 and one.media.sampling == "segment"
            assert (one.media.start is not None) == (one.media.end is not None) == task.bounded
            assert one.media.fps == task.fps and Path(one.media.path).is_dir() == (task.media == "frames")
    prediction = by_task["Action Prediction"]
    assert prediction[1].media is not None and "/data0613/star/" in prediction[1].media.path  # the fallback folder
    assert [one.id for one in prediction] == ["action_prediction/0", "action_prediction/1"]


@pytest.mark.parametrize("place", ["", "json", "json/object_shuffle.json"])
def test_the_path_may_be_the_folder_its_json_folder_or_one_file(tmp_path, place) -> None:
    root = put(tmp_path, {"object_shuffle": [item("a.mp4")]}, "perception/videos/a.mp4")
    (only,) = read(root / place).items
    assert only.media is not None and only.media.path == str(root / "video/perception/videos/a.mp4")
    assert (only.id, only.answer, only.candidates) == ("object_shuffle/0", "left", ("left", "right"))


def test_media_in_another_folder(tmp_path) -> None:
    root = put(tmp_path / "a", {"object_shuffle": [item("a.mp4")]})
    put(tmp_path / "b", {}, "perception/videos/a.mp4")
    (only,) = read(root, video_dir=str(tmp_path / "b/video")).items
    assert only.media is not None and only.media.path.startswith(str(tmp_path / "b"))


def test_users_own_tasks_are_read(tmp_path) -> None:
    records = [item("a.mp4", start=1, end=2.5), item("sub/b.webm"), item("c.mp4", start=3)]
    root = put(tmp_path, {"who_did-it": records}, "a.mp4", "sub/b.webm", "c.mp4")
    benchmark = read(root, num_frames=8)
    assert [(one.id, one.task) for one in benchmark.items] == [(f"who_did-it/{n}", "Who Did It") for n in range(3)]
    media = [one.media for one in benchmark.items]
    assert [(one.start, one.end) for one in media if one] == [(1, 2.5), (None, None), (3, None)]


def test_bounds_are_used_only_in_bounded_tasks(tmp_path) -> None:
    records = [item("a.mp4", start=1, end=2)]
    root = put(tmp_path, {"object_shuffle": records}, "perception/videos/a.mp4")
    (only,) = read(root).items
    assert only.media is not None and only.media.bounds is None


def test_tasks_and_limit(tmp_path) -> None:
    records = [item("a.mp4")] * 3
    root = put(tmp_path, {"state_change": records, "action_count": records, "mine": records}, "a.mp4")
    ids = [one.id for one in read(root, limit=2).items]
    assert ids == [f"{task}/{n}" for task in ("action_count", "state_change", "mine") for n in range(2)]
    for name in ("state_change", "State Change", "STATE-CHANGE"):
        assert {one.task for one in read(root, tasks=[name, "mine"]).items} == {"State Change", "Mine"}
    with pytest.raises(UserError, match=r"unknown task 'stat_change': known are action_count, .*mean 'state_change'\?"):
        read(root, tasks=["stat_change"])


def test_a_missing_medium_makes_its_item_fail(tmp_path) -> None:
    root = put(tmp_path, {"object_shuffle": [item("a.mp4"), item("b.mp4"), item("c.mp4")]}, "perception/videos/b.mp4")
    benchmark = read(root, limit=2)
    assert [one.media is None for one in benchmark.items] == [True, False] and not benchmark.excluded
    assert benchmark.items[0].error.startswith(f"a.mp4: there is no such file in {root}/video/perception/videos")


def test_a_task_without_media_is_excluded_and_counted_within_the_limit(tmp_path) -> None:
    records = [item("a.mp4")] * 5
    root = put(tmp_path, {"fine_grained_pose": records, "action_count": records}, "perception/videos/a.mp4")
    benchmark = read(root, limit=3)
    assert (len(benchmark.items), benchmark.num_excluded, list(benchmark.excluded)) == (3, 3, ["Fine-grained Pose"])
    with pytest.raises(UserError, match=r"none of its 5 items can be asked, the first one because: a\.mp4: there"):
        read(root, tasks=["fine_grained_pose"])


@pytest.mark.parametrize(
    ("faulty", "said"),
    [
        (item("a.mp4", answer="up"), "'up' is none of the candidates 'left', 'right'"),
        (item("a.mp4", candidates=["left"]), "expected a list of two texts or more"),
        (item("a.mp4", candidates=[str(n) for n in range(27)], answer="3"), "27 candidates"),
        (item("a.mp4", question=" "), "question"),
        ({"video": "a.mp4", "question": "q", "candidates": ["x", "y"]}, "the field is missing"),
        (item(""), "no medium is named"),
        (item("a.mp4", start=3, end=2), "0 <= start < end"),
        (item("a.mp4"), "found none, expected the part of the video"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_faulty_record_makes_its_item_fail(tmp_path, faulty, said) -> None:
    good = item("a.mp4", start=0, end=1)
    faulty = {"start": 0, "end": 1, **faulty} if faulty != item("a.mp4") else faulty
    root = put(tmp_path, {"action_sequence": [good, faulty]}, f"{STAR}/a.mp4")
    first, second = read(root).items
    assert not first.error and first.media is not None
    assert second.media is None and said in second.error and "action_sequence.json, record 2" in second.error


def test_a_duplicate_option_is_kept(tmp_path) -> None:
    records = [item("a.mp4", candidates=["left", "left", "right"])]
    (only,) = read(put(tmp_path, {"object_shuffle": records}, "perception/videos/a.mp4")).items
    assert not only.error and only.candidates == ("left", "left", "right")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"Q": "q", "A": "a", "video_name": "v"}], "it looks like a VcgBench ground truth"),
        ([{"question": "q", "answer": "a", "video_id": 1}], "it looks like a VideoQA ground truth"),
        ([{"video": "v", "QA": [{"q": "q", "a": "a"}]}], "it looks like training data"),
        ('[{"video": "a.mp4",]', "line 1, column 20: not valid JSON"),
        ([], "found no record"),
        (["a.mp4"], 'found "a.mp4"; expected a mapping'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_kind_is_reported_as_one_sentence(tmp_path, content, said) -> None:
    root = put(tmp_path, {"object_shuffle": content}, "perception/videos/a.mp4")
    with pytest.raises(UserError) as caught:
        read(root)
    assert said in str(caught.value) and str(caught.value).count("object_shuffle.json") == 1


def test_wrong_folders_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="found no JSON file, expected MVBench's folder with json and video in it"):
        read(tmp_path)
    with pytest.raises(UserError, match="no ground truth was named"):
        load_benchmark("mvbench", EvaluationSettings())
    with pytest.raises(UserError, match=r"gone: found no such file or folder, expected MVBench's folder"):
        read(tmp_path / "gone", video_dir=str(tmp_path))
    root = put(tmp_path, {"object_shuffle": [item("a.mp4")]})
    other = put(tmp_path / "other", {"test_qa": [{"question": "q", "answer": "a", "video_id": 1}]}) / "json"
    with pytest.raises(UserError, match="it looks like a VideoQA"):  # before its media are looked for
        read(other, video_dir=str(root / "elsewhere"))
    with pytest.raises(UserError, match="elsewhere: there is no such folder of media: name it with --video-dir"):
        read(root, video_dir=str(root / "elsewhere"))


def test_the_error_for_a_parent_folder_names_the_right_one(tmp_path) -> None:
    """A toy world's folder has a JSON file of its own, and the benchmark in a subfolder."""
    root = put(tmp_path / "mvbench", {"object_shuffle": [item("a.mp4")]}, "perception/videos/a.mp4")
    (tmp_path / "toy_world.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}: found no folder json in it, .* own folder: name {root}$"):
        read(tmp_path)
    put(tmp_path, {})  # a folder of tasks of one's own, with media, may have another below it
    (tmp_path / "toy_world.json").write_text(json.dumps([item("b.mp4")]))
    (tmp_path / "video/b.mp4").touch()
    assert [one.id for one in read(tmp_path).items] == ["toy_world/0"]


@pytest.mark.parametrize(("sampling", "num_frames"), [("uniform", 0), ("middling", 8), ("rand", 8)])
def test_impossible_sampling_settings_are_refused_at_once(tmp_path, sampling, num_frames) -> None:
    root = put(tmp_path, {"object_shuffle": [item("a.mp4")]}, "perception/videos/a.mp4")
    settings = EvaluationSettings(anno_path=str(root), sampling=sampling, num_frames=num_frames)
    with pytest.raises(UserError, match=f"evaluation.sampling is '{sampling}' with num_frames {num_frames}"):
        load_benchmark("mvbench", settings)


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(tmp_path) -> Loaded:
    """Return four items of two tasks; one has no video. The answers are B, A, B and A."""
    candidates = ["up", "down"]
    golds = {"object_shuffle": ("down", "up"), "state_change": ("down", "up")}
    tasks = {
        stem: [item(f"{stem[0]}{n}.mp4", candidates=candidates, answer=gold) for n, gold in enumerate(answers)]
        for stem, answers in golds.items()
    }
    media = [f"perception/videos/{name}.mp4" for name in ("o0", "o1", "s0")]
    return read(put(tmp_path, tasks, *media))


def test_empty_answers_score_100_officially_and_0_strictly(four) -> None:
    scores = four.benchmark.summary(answered(four, ""))
    assert scores["official"]["average_answered"] == 100 and scores["official"]["average"] == 75
    assert scores["strict"]["average_answered"] == scores["strict"]["average"] == 0
    assert scores["differing"] == ["object_shuffle/0", "object_shuffle/1", "state_change/0"]
    assert [line["prediction"] for line in answered(four, "")] == ["(", "(", "(", None]


def test_always_answering_a_gets_the_share_of_a(four) -> None:
    scores = four.benchmark.summary(answered(four, "A) because\n(B)"))
    for rule in ("official", "strict"):
        assert scores[rule]["average"] == 25 and scores[rule]["average_answered"] == pytest.approx(100 / 3)
        assert scores[rule]["tasks"] == {"Object Shuffle": 50, "State Change": 0}
        assert scores[rule]["tasks_answered"] == {"Object Shuffle": 50, "State Change": 0}
    assert scores["differing"] == []


def test_averages_are_over_items_and_a_failed_task_has_no_accuracy_over_answered(four) -> None:
    failed = [{"id": one.id, "task": one.task, "error": "gone"} for one in four.items if one.task == "State Change"]
    lines = [*answered(four, "B")[:1], *failed]
    strict = four.benchmark.summary(lines)["strict"]
    assert strict["average"] == pytest.approx(100 / 3) and strict["average_answered"] == 100
    assert strict["tasks"] == {"Object Shuffle": 100, "State Change": 0}
    assert strict["tasks_answered"] == {"Object Shuffle": 100, "State Change": None}


def test_the_official_file_counts_failed_items_and_lists_answered_ones(four) -> None:
    content = four.benchmark.official(four.items, answered(four, "B) down"))[""]
    assert content["acc_dict"] == {"Object Shuffle": [1, 2], "State Change": [1, 2]}
    assert [(line["pred"], line["gt"]) for line in content["res_list"]] == [
        ("(B) down", "(B) down"),
        ("(B) down", "(A) up"),
        ("(B) down", "(B) down"),
    ]


def test_option_texts_are_correct_strictly_but_not_officially(four) -> None:
    line = record(four, four.items[0], "down")
    assert line["correct"] == {"official": False, "strict": True} and line["gold"] == "(B) down"
    assert four.benchmark.summary([line])["differing"] == ["object_shuffle/0"]


# ---- frames ---------------------------------------------------------------------------------------------------------


def golden_name(case: dict[str, Any]) -> str:
    return f"{case['num_segments']} of {case['max_frame']} at {case['fps']}, {case['bound']}"


@pytest.mark.parametrize("case", [case for case in GOLDEN if case["max_frame"] <= 400], ids=golden_name)
def test_sampled_frames_equal_the_golden_ones(tmp_path, case) -> None:
    bounds = {} if case["bound"] is None else dict(zip(("start", "end"), case["bound"], strict=True))
    if case["first_index"]:  # a folder of frames
        stem, name, folder = "episodic_reasoning", "clip", tmp_path / "video/tvqa/frames_fps3_hq/clip"
        folder.mkdir(parents=True)
        for number in range(1, case["max_frame"] + 1):
            Image.new("RGB", (8, 8)).save(folder / f"{number:05d}.jpg")
    else:
        stem, name = ("action_sequence", "a.mp4") if bounds else ("object_shuffle", "a.mp4")
        folder = tmp_path / "video" / (STAR if bounds else "perception/videos")
        folder.mkdir(parents=True)
        frames = (np.zeros((16, 16, 3), np.uint8) for _ in range(case["max_frame"] + 1))
        write_video(folder / name, frames=frames, fps=int(case["fps"]), size=(16, 16))
    (only,) = read(put(tmp_path, {stem: [item(name, **bounds)]}), num_frames=case["num_segments"]).items
    assert only.media is not None
    clip = ClipReader(transform=lambda frame: torch.zeros(3, 1, 1), num_frames=2)(only.media)
    assert clip.indices == case["indices"]


def test_all_sampling_rules_convert_bounds_by_the_average_rate(tmp_path) -> None:
    """The video has 14 frames in 9.97 s and none from 2 to 8 s; the official script uses only the average rate."""
    (tmp_path / "video" / STAR).mkdir(parents=True)
    shutil.copy(Path(__file__).parents[2] / "media" / "cases" / "gap.mp4", tmp_path / "video" / STAR / "a.mp4")
    path = put(tmp_path, {"action_sequence": [item("a.mp4", start=2, end=8)]})
    settings = EvaluationSettings(anno_path=str(path), sampling="uniform", num_frames=2)
    (only,) = load_benchmark("mvbench", settings).items
    assert only.media is not None
    clip = ClipReader(transform=lambda frame: torch.zeros(3, 1, 1), num_frames=2)(only.media)
    first, last = 2 * clip.info.fps, 8 * clip.info.fps
    assert len(clip.indices) == 2 and all(first - 1 <= index <= last for index in clip.indices)
