"""The benchmarks' twins: official names and fields, media that can be read, nothing for the doctor to find."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from stllm.cli import main
from stllm.evaluation.benchmarks.mvbench import TASKS
from stllm.evaluation.benchmarks.tvbench import TVBENCH
from stllm.media.open import open_media
from stllm.toy.benchmarks import STAND_INS, benchmark_bytes, num_benchmark_clips, write_benchmarks
from stllm.toy.questions import DIRECTION_QUESTIONS
from stllm.toy.tasks import World
from stllm.toy.world import world_texts
from tests.helpers.twins import NUM_FRAMES, SEED, files, read, twins

MEDIA = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif", ".jpg")


@pytest.fixture(scope="module")
def root() -> Path:
    return twins(5)


def suffixes(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


# ---- MVBench --------------------------------------------------------------------------------------------------------


def test_mvbench_has_its_twenty_files(root: Path) -> None:
    assert {task.file for task in TASKS} == {path.name for path in (root / "mvbench" / "json").iterdir()}
    assert set(STAND_INS) == {task.name for task in (*TASKS, *TVBENCH.tasks)}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_mvbench_items_lie_in_their_official_folders(root: Path, task) -> None:
    items = read(root / "mvbench" / "json" / task.file)
    assert len(items) == 5
    for item in items:
        fields = {"video", "question", "candidates", "answer"} | ({"start", "end"} if task.bounded else set())
        assert set(item) == fields
        assert item["answer"] in item["candidates"] and len(set(item["candidates"])) == len(item["candidates"]) >= 2
        paths = [root / "mvbench" / "video" / folder / item["video"] for folder in task.folders]
        found = [path for path in paths if path.exists()]
        assert len(found) == (0 if task.folder == "nturgbd" else 1)
        for path in found:
            with open_media(path) as reader:
                assert reader.info.kind == task.media
                assert reader.info.fps == (3 if task.media == "frames" else 4)
                assert 0 <= item.get("start", 0) < item.get("end", 1) <= reader.info.duration


def test_some_mvbench_videos_lie_in_the_fallback_folder_alone(root: Path) -> None:
    fallback = root / "mvbench" / "video" / "data0613"
    names = {str(path.relative_to(fallback)) for path in fallback.rglob("*.mp4")}
    assert names == {
        "star/Charades_v1_480/action_prediction_00004.mp4",
        "star/Charades_v1_480/object_interaction_00004.mp4",
        "clevrer/video_validation/moving_count_00004.mp4",
        "clevrer/video_validation/counterfactual_inference_00004.mp4",
    }


def test_tasks_of_the_same_kind_show_different_clips(root: Path) -> None:
    videos = [path.read_bytes() for path in (root / "mvbench" / "video").rglob("*.mp4")]
    assert len(videos) == 18 * 5 and len(set(videos)) == len(videos)


# ---- the others -----------------------------------------------------------------------------------------------------


def test_vcgbench(root: Path) -> None:
    folder = root / "vcgbench"
    names = [path.stem for path in (folder / "videos").iterdir()]
    assert suffixes(folder / "videos") == {".mp4", ".avi", ".mov", ".mkv", ".webm"}
    assert len(set(names)) == len(names) == 15
    rows = {part: read(folder / f"{part}_qa.json") for part in ("generic", "temporal", "consistency")}
    assert {part: len(found) for part, found in rows.items()} == {"generic": 15, "temporal": 5, "consistency": 5}
    assert {row["video_name"] for found in rows.values() for row in found} == set(names)
    assert all(set(row) == {"Q", "A", "video_name"} for row in (*rows["generic"], *rows["temporal"]))
    for row in rows["consistency"]:
        name = row["Q1"].split("does the ")[1].removesuffix(" move?")
        assert [row["Q1"], row["Q2"]] == [question.format(name) for question in DIRECTION_QUESTIONS]
        assert row["A"] in ("left", "right", "up", "down")


@pytest.mark.parametrize(("name", "key"), [("msvd", "video_name"), ("msrvtt", "video_id")])
def test_msvd_and_msrvtt_in_both_forms(root: Path, name: str, key: str) -> None:
    whole = read(root / name / "test_qa.json")
    assert all(set(row) == {key, "id", "question", "answer"} for row in whole)
    assert [row["id"] for row in whole] == list(range(9))  # three about the first and the last of five clips
    videos = {row[key] if name == "msvd" else f"video{row[key]}.mp4" for row in whole}
    assert videos == {path.name for path in (root / name / "videos").iterdir()}
    asked, answers = (read(root / name / f"test_{part}.json") for part in "qa")
    assert [row["question_id"] for row in answers] == [row["question_id"] for row in reversed(asked)]
    answer_of = {row["question_id"]: row["answer"] for row in answers}
    split = [(row["question"], answer_of[row["question_id"]]) for row in asked]
    assert split == [(row["question"], row["answer"]) for row in whole]


def test_activitynet_cannot_be_paired_by_position(root: Path) -> None:
    folder = root / "activitynet"
    asked, answers = (read(folder / f"test_{part}.json") for part in "qa")
    assert all(set(row) == {"video_name", "question", "question_id"} for row in asked)
    assert all(set(row) == {"answer", "type", "question_id"} for row in answers)
    assert {row["type"] for row in answers} == {0, 2, 3, 4, 5}
    keys = [row["question_id"] for row in asked]
    assert keys != [row["question_id"] for row in answers] and len(set(keys)) == len(keys)
    assert sorted(keys) == sorted(row["question_id"] for row in answers)
    assert {f"v_{row['video_name']}" for row in asked} == {path.stem for path in (folder / "videos").iterdir()}
    assert suffixes(folder / "videos") == {".mp4", ".mkv", ".webm"}
    assert asked[0]["video_name"] != asked[1]["video_name"]  # questions of a video are not beside each other


def test_tgif_has_gifs_and_no_ids(root: Path) -> None:
    rows = read(root / "tgif" / "test_qa.json")
    assert all(set(row) == {"video_name", "question", "answer"} for row in rows)
    assert suffixes(root / "tgif" / "videos") == {".gif", ".mp4"}
    gif = next((root / "tgif" / "videos").glob("*.gif"))
    with open_media(gif) as reader:
        assert (reader.info.kind, reader.info.num_frames, reader.info.fps) == ("gif", NUM_FRAMES, 25)


def test_nothing_is_asked_that_training_never_says(root: Path) -> None:
    """Of MVBench, TVBench, VcgBench and VideoQA; the others' wording of a choice is their own."""
    known = {word for text in world_texts() for word in words(text)}
    keys = ("question", "answer", "Q", "Q1", "Q2", "A")
    names = ("mvbench", "tvbench", "vcgbench", "msvd", "msrvtt", "activitynet", "tgif")
    rows = [row for name in names for path in (root / name).rglob("*.json") for row in read(path)]
    asked = {word for row in rows for key in keys for word in words(row.get(key, ""))}
    asked |= {word for row in rows for candidate in row.get("candidates", ()) for word in words(candidate)}
    assert asked and asked <= known


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_every_medium_shows_what_was_drawn(root: Path) -> None:
    for path in (path for path in root.rglob("*") if path.suffix in MEDIA):
        with open_media(path) as reader:
            first = np.stack(list(reader.frames(range(reader.info.first_index, reader.info.first_index + 1))))
        assert first.shape[1:] == (64, 64, 3) and first.std() > 5, path


# ---- the whole ------------------------------------------------------------------------------------------------------

SOURCES = [
    *((f"vcgbench/{part}_qa.json", "vcgbench") for part in ("generic", "temporal", "consistency")),
    *((f"{name}/test_qa.json", "videoqa") for name in ("msvd", "msrvtt", "tgif")),
    *((f"{name}/test_q.json", "videoqa") for name in ("msvd", "msrvtt", "activitynet")),
]


@pytest.mark.parametrize(("file", "form"), SOURCES)
def test_the_doctor_finds_nothing(root: Path, file: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    videos = root / Path(file).parent / "videos"
    argv = ["--anno-path", str(root / file), "--format", form, "--video-dir", str(videos), "--decode", "all"]
    assert main(["doctor", *argv, "--num-workers", "0"]) == 0, capsys.readouterr().out


def test_the_doctor_finds_that_videos_of_one_mvbench_task_are_nowhere(root: Path, capsys) -> None:
    argv = ["--anno-path", str(root / "mvbench"), "--format", "mvbench", "--json", "--num-workers", "0"]
    assert main(["doctor", *argv]) == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert fault["kind"] == "missing" and fault["subject"].endswith("nturgbd")


def test_the_same_seed_gives_the_same_twins_and_another_others(tmp_path: Path) -> None:
    ours = files(twins())
    for name, seed in (("again", SEED), ("other", SEED + 1)):
        write_benchmarks(tmp_path / name, World(seed, NUM_FRAMES), count=2)
    assert files(tmp_path / "again") == ours
    theirs = files(tmp_path / "other")
    assert theirs.keys() == ours.keys()
    assert not any(theirs[name] == ours[name] for name in ours if name.endswith(MEDIA))


def test_more_items_leave_the_first_ones_as_they_are(root: Path) -> None:
    few, many = (read(folder / "mvbench" / "json" / "state_change.json") for folder in (twins(), root))
    assert few == many[:2]


def test_the_room_asked_for_is_enough_and_the_clips_are_counted(root: Path, tmp_path: Path) -> None:
    assert sum(map(len, files(root).values())) < benchmark_bytes(5, NUM_FRAMES)
    done: list[int] = []
    write_benchmarks(tmp_path, World(0, NUM_FRAMES), count=1, done=lambda: done.append(1))
    assert len(done) == num_benchmark_clips(1)


def test_the_command_writes_them_beside_the_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["toy", "--output", str(tmp_path / "world"), "--num-train", "6", "--num-test", "4", "--seed", "7"]
    assert main([*argv, "--benchmarks", "1"]) == 0
    folder = tmp_path / "world" / "benchmarks"
    assert f"toy benchmarks, 1 items a task: {folder}" in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    videoqa = {"msvd", "msrvtt", "activitynet", "tgif"}
    assert names == {"mvbench", "vcgbench", "tvbench", "tempcompass", "vinoground", "tomato"} | videoqa
    assert len(read(folder / "mvbench" / "json" / "state_change.json")) == 1
