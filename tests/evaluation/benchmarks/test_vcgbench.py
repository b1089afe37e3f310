"""VcgBench: its tasks, both questions of consistency, the official lists, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from stllm.common.errors import UserError
from stllm.common.registry import templates
from stllm.common.schema import EvaluationSettings
from stllm.evaluation.benchmarks.base import Loaded, load_benchmark
from tests.helpers.twins import twins

ONE = {"Q": "What happens?", "A": "A dog runs.", "video_name": "v_a"}
TWO = {"Q1": "Where is it?", "Q2": "In which place?", "A": "In a park.", "video_name": "v_b", "extra": 1}
ALL = {"generic_qa": [ONE, ONE], "temporal_qa": [ONE], "consistency_qa": [TWO]}


def put(root: Path, files: dict[str, Any], *videos: str) -> Path:
    (root / "videos").mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        (root / f"{stem}.json").write_text(json.dumps(content))
    for name in videos:
        (root / "videos" / name).touch()
    return root


def read(path: Path, videos: Path | None = None, **settings: Any) -> Loaded:
    videos = videos or (path if path.is_dir() else path.parent) / "videos"
    return load_benchmark("vcgbench", EvaluationSettings(anno_path=str(path), video_dir=str(videos), **settings))


def test_the_imitated_vcgbench_has_three_tasks_and_all_extensions() -> None:
    benchmark = read(twins() / "vcgbench", num_frames=64)
    assert {one.task for one in benchmark.items} == {"generic", "temporal", "consistency"}
    assert len({one.id for one in benchmark.items}) == len(benchmark.items) == 10
    assert {Path(one.media.path).suffix for one in benchmark.items if one.media} == {".webm", ".mp4", ".avi", ".mov"}
    assert all(one.media and one.media.num_frames == 64 for one in benchmark.items)


def test_the_path_may_be_a_folder_or_a_file(tmp_path) -> None:
    root = put(tmp_path, ALL, "v_a.mkv", "v_b.mp4")
    expected = ["generic/0", "generic/1", "temporal/0", "consistency/0"]
    assert [one.id for one in read(root).items] == expected
    assert [one.id for one in read(root, tasks=["Consistency", "generic"], limit=1).items] == expected[::3]
    assert [one.id for one in read(root / "temporal_qa.json").items] == ["temporal/0"]
    short = put(tmp_path / "short", {stem.removesuffix("_qa"): content for stem, content in ALL.items()}, "v_a.mkv")
    assert [one.id for one in read(short).items] == expected
    (tmp_path / "mine.json").write_text(json.dumps([TWO]))  # its fields tell the part
    assert [one.id for one in read(tmp_path / "mine.json").items] == ["consistency/0"]


def test_a_video_name_may_have_an_extension_or_be_converted(tmp_path) -> None:
    records = [{**ONE, "video_name": name} for name in ("v_a.mp4", "v_a.avi", "v_x.y", "v_gone.mp4")]
    root = put(tmp_path, {"generic_qa": records}, "v_a.mp4", "v_x.y.webm", "v_x.mp4")
    found = [one.media and Path(one.media.path).name for one in read(root).items]
    assert found == ["v_a.mp4", "v_a.mp4", "v_x.y.webm", None]
    assert read(root).items[3].error.startswith(f"v_gone.mp4: there is no such file in {root}/videos")


def test_consistency_asks_both_questions_separately(tmp_path) -> None:
    benchmark = read(put(tmp_path, {"consistency_qa": [TWO]}, "v_b.mp4"))
    (only,) = benchmark.items
    requests = benchmark.requests(only, templates.get("instructblip"))
    assert [[turn.question for turn in request.turns] for request in requests] == [[TWO["Q1"]], [TWO["Q2"]]]
    assert all(request.media == only.media for request in requests)
    line = {"id": only.id, **benchmark.benchmark.score(only, ["first", "second"])}
    truth = {key: TWO[key] for key in ("Q1", "Q2", "A", "video_name")}
    assert line == {"id": "consistency/0", **truth, "pred1": "first", "pred2": "second"}
    assert benchmark.benchmark.official(benchmark.items, [line]) == {"": [{**TWO, "pred1": "first", "pred2": "second"}]}
    assert benchmark.benchmark.summary([line]) == {}


def test_official_lists_are_written_per_task_without_failed_items(tmp_path) -> None:
    benchmark = read(put(tmp_path, ALL, "v_a.mp4"))
    lines = [
        {"id": one.id, "error": one.error}
        if one.error
        else {"id": one.id, **benchmark.benchmark.score(one, [f"about {one.id}"])}
        for one in benchmark.items
    ]
    assert benchmark.benchmark.official(benchmark.items, lines[::-1]) == {
        "generic": [{**ONE, "pred": "about generic/0"}, {**ONE, "pred": "about generic/1"}],
        "temporal": [{**ONE, "pred": "about temporal/0"}],
        "consistency": [],
    }


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"generic_qa": [{"question": "q", "answer": "a", "video_name": "v"}]}, "looks like a VideoQA ground truth"),
        ({"temporal_qa": [{"video": "v", "question": "q", "candidates": ["a"]}]}, "looks like an MVBench task"),
        ({"consistency_qa": [ONE]}, "expected Q1 and Q2 in a file of consistency questions"),
        ({"generic_qa": [TWO]}, "found the fields Q1, Q2, A, video_name, extra, expected Q in a file of generic"),
        ({"consistency_qa": [{**ONE, "Q1": "Where?"}]}, "expected Q1 and Q2"),
        ({"generic_qa": [ONE, {"video_name": "v"}]}, "generic_qa.json, record 2: found the fields video_name"),
        ({"train": [ONE]}, "found none of VcgBench's files, expected generic_qa.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_another_kind_are_refused(tmp_path, files, said) -> None:
    with pytest.raises(UserError) as caught:
        read(put(tmp_path, files, "v_a.mp4"))
    assert said in str(caught.value)


def test_wrong_folders_are_refused(tmp_path) -> None:
    root = put(tmp_path, ALL, "other.mp4")
    with pytest.raises(
        UserError, match=r"none of its 4 items can be asked, the first one because: v_a: there is no such"
    ):
        read(root)
    with pytest.raises(UserError, match=r"no folder of media was named: give the one .* with --video-dir"):
        load_benchmark("vcgbench", EvaluationSettings(anno_path=str(root)))
    with pytest.raises(UserError, match="no ground truth was named"):
        load_benchmark("vcgbench", EvaluationSettings())
    with pytest.raises(UserError, match="unknown task 'detail': known are consistency, generic, temporal"):
        read(root, tasks=["detail"])


def test_an_empty_answer_makes_its_item_fail(tmp_path) -> None:
    root = put(tmp_path, {"generic_qa": [ONE, {**ONE, "A": ""}]}, "v_a.mp4")
    first, second = read(root).items
    assert first.media is not None and second.media is None
    assert "generic_qa.json, record 2, A: found ''" in second.error
