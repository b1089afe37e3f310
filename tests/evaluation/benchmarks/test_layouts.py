"""Layouts of benchmarks on disk: `stllm evaluate` and `stllm doctor` accept and refuse the same ones."""

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from stllm.common.schema import EvaluationSettings
from stllm.evaluation.benchmarks.base import load_benchmark
from tests.helpers.evaluation import CHECKPOINT, QUICK
from tests.helpers.videos import write_video

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TGIF = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\n"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a video of two seconds at 10 frames per second."""
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", num_frames=20, fps=10, size=(32, 32))


def put(root: Path, files: dict[str, Any], video: Path, *videos: str) -> Path:
    """Write files (path below the root -> text, or content for JSON) and copies of the video."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, root / name)
    return root


def item(video: str, **changed: Any) -> dict[str, Any]:
    return {"video": video, "question": "Which?", "candidates": ["left", "right"], "answer": "left", **changed}


def asked(**fields: Any) -> dict[str, Any]:
    return {"question": "What runs?", "answer": "dog", **fields}


def words(anno: Path, videos: Path | None = None) -> list[str]:
    return ["--anno-path", str(anno), *(["--video-dir", str(videos)] if videos else [])]


def evaluate(name: str, output: Path, *more: str) -> int:
    options = ("--ckpt-path", str(CHECKPOINT), "--output-dir", str(output), *QUICK, *more)
    return main(["evaluate", name, *options])


def results(output: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the results file and the records."""
    lines = (output / f"{name}.jsonl").read_text().splitlines()
    return json.loads((output / f"{name}.results.json").read_text()), [json.loads(line) for line in lines]


def doctor(capsys: pytest.CaptureFixture[str], name: str, *more: str, code: int = 0) -> list[dict[str, Any]]:
    """Return the faults that the doctor lists, and check its exit code."""
    capsys.readouterr()
    assert main(["doctor", "--format", name, *more, "--json", "--num-workers", "0"]) == code
    return json.loads(capsys.readouterr().out)["faults"]


def refused(capsys: pytest.CaptureFixture[str], output: Path, name: str, *more: str) -> str:
    """Return the sentence with which both commands refuse a benchmark."""
    capsys.readouterr()
    assert evaluate(name, output, *more) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    faults = [fault for fault in doctor(capsys, name, *more, code=1) if not fault["note"]]
    assert any(fault["sentence"] in sentence for fault in faults), (sentence, faults)
    return sentence


# ---- VideoQA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("named", "file"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_unicode_form(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: Any, file: Any
) -> None:
    """File names from a Mac have "e" and a combining accent where the annotations have "\u00e9"."""
    name, stored = (unicodedata.normalize(form, "caf\u00e9") for form in (named, file))
    questions = [asked(video_name=video_name, id=number) for number, video_name in enumerate((name, f"{name}.mp4"))]
    root = put(tmp_path, {"test_qa.json": questions}, video, f"videos/{stored}.mp4")
    files = words(root / "test_qa.json", root / "videos")
    assert evaluate("msvd", tmp_path / "out", *files) == 0
    assert results(tmp_path / "out", "msvd")[0]["counts"]["answered"] == 2
    assert doctor(capsys, "msvd", *files) == []


@pytest.mark.parametrize("beside", ["", "videos/"])
def test_msvd_videos_are_found_by_all_their_names(tmp_path, video, capsys, beside) -> None:
    """Records name a video by a number; files are called vid<number> or by their YouTube names."""
    rows = [asked(id=0, video_id=1), asked(id=1, video_id=2), asked(id=2, video_name="vid2.avi")]
    mapping = "-4wsuPCjDBc_5_15 vid1\n-7KMZQEsJW4_205_208 vid2\n\n"
    files = {"test_qa.json": rows, f"{beside}youtube_mapping.txt": mapping}
    root = put(tmp_path, files, video, "videos/vid1.AVI", "videos/-7KMZQEsJW4_205_208.mp4")
    options = words(root / "test_qa.json", root / "videos")
    assert evaluate("msvd", tmp_path / "out", *options) == 0
    content, lines = results(tmp_path / "out", "msvd")
    assert content["counts"]["answered"] == 3 and [line["video"] for line in lines] == ["1", "2", "vid2.avi"]
    for name in ("msvd", "videoqa"):
        assert doctor(capsys, name, *options) == []
    put(root, {f"{beside}youtube_mapping.txt": "vid1\n"}, video)
    said = refused(capsys, tmp_path / "again", "msvd", *options)
    assert "youtube_mapping.txt, line 1: found 'vid1', expected lines of a YouTube name and a vid<N>" in said


def test_tgif_is_read_from_its_table(tmp_path, video, capsys) -> None:
    rows = 'tumblr_a_250\twhat is the "red" dog eating ?\tleaf\t0\tFRAMEQA1\t5\ta dog is eating .\n'
    root = put(tmp_path, {"Test_frameqa_question.csv": TGIF + rows * 2}, video, "gifs/tumblr_a_250.gif")
    options = words(root / "Test_frameqa_question.csv", root / "gifs")
    assert evaluate("tgif", tmp_path / "out", *options) == 0
    _, lines = results(tmp_path / "out", "tgif")
    assert [(line["id"], line["video"], line["answer"]) for line in lines] == [
        ("0", "tumblr_a_250", "leaf"),
        ("1", "tumblr_a_250", "leaf"),
    ]
    assert lines[0]["question"] == 'what is the "red" dog eating ?'
    for name in ("tgif", "videoqa"):
        assert doctor(capsys, name, *options) == []
    put(root, {"Test_frameqa_question.csv": TGIF + rows + "tumblr_a_250\twhat ?\n"}, video)
    said = refused(capsys, tmp_path / "again", "tgif", *options)
    assert "Test_frameqa_question.csv, line 3: expected 7 columns" in said


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("tgif", "a.csv", "gif_name\tquestion\ta1\ta2\tanswer\nv\twhat ?\tx\ty\t1\n", "questions with choices"),
        ("msvd", "qa.json", [asked(id=1, video_name="v")] * 2, "the id is also that of"),
        ("msvd", "qa.json", [asked(video_name="v")], "found no id"),
        ("msrvtt", "qa.json", [], "found no record"),
        ("msrvtt", "qa.json", POINTER, "found a Git LFS pointer"),
        ("msrvtt", "test_q.json", [{"id": 1, "question": "q", "video_id": "v"}], "no question has an answer"),
        ("activitynet", "qa.json", [asked(id=1, video_id="v")], "expected ActivityNet-QA"),
        ("vcgbench", "generic_qa.json", POINTER, "found a Git LFS pointer"),
        ("vcgbench", "consistency_qa.json", [{"Q": "q", "A": "a", "video_name": "v"}], "expected Q1 and Q2"),
    ],
)
def test_evaluate_and_doctor_refuse_the_same_files(tmp_path, video, capsys, name, file, content, said) -> None:
    root = put(tmp_path, {file: content}, video, "v.mp4")
    assert said in refused(capsys, tmp_path / "out", name, *words(root / file, root))


def test_folders_in_place_of_files_and_the_reverse(tmp_path, video, capsys) -> None:
    root = put(tmp_path, {"test_qa.json": [asked(id=1, video_name="v")]}, video, "videos/v.mp4")
    said = refused(capsys, tmp_path / "out", "msvd", *words(root, root / "videos"))
    assert "found a folder, expected a JSON list" in said
    options = words(root / "test_qa.json", root / "videos/v.mp4")
    assert "v.mp4: found a file, expected the folder of media" in refused(capsys, tmp_path / "out", "msvd", *options)


@pytest.mark.parametrize(
    ("name", "file", "content", "media"),
    [
        ("msvd", "qa.json", "\ufeff" + json.dumps([asked(id=1, video_name="v")]), "v.mp4"),
        ("msvd", "qa.jsonl", json.dumps(asked(id=1, video_name="v.avi")) + "\n\n", "v.mp4"),
        ("msvd", "qa.json", [asked(id=1, video="v.MP4")], "v.mkv"),
        ("msrvtt", "test_qa.json", [asked(id=1, video_id=7010)], "video7010.MP4"),
        ("activitynet", "qa.json", [asked(question_id="a", video_name="v_x")], "v_x.mkv"),
        ("activitynet", "qa.json", [asked(question_id="a", video_name="x")], "v_x.webm"),
        ("vcgbench", "temporal_qa.jsonl", json.dumps({"Q": "q", "A": "a", "video_name": "v_x"}), "v_x.mov"),
        ("mvbench", "json/own.jsonl", json.dumps(item("a.avi")), "video/a.MP4"),
        ("mvbench", "json/state_change.jsonl", json.dumps(item("a.mp4")), "video/perception/videos/a.mp4"),
        ("mvbench", "json/action_antonym.json", [item("7.webm")], "video/ssv2_video_mp4/7.mp4"),
        ("mvbench", "json/fine_grained_pose.json", [item("S001_rgb.avi")], "video/nturgbd_convert/S001_rgb.mp4"),
    ],
)
def test_evaluate_and_doctor_accept_the_same_files(tmp_path, video, capsys, name, file, content, media) -> None:
    root = put(tmp_path, {file: content}, video, media)
    anno = root if name == "mvbench" else root / file
    videos = None if name == "mvbench" else root
    settings = EvaluationSettings(anno_path=str(anno), video_dir=str(videos) if videos else None, sampling="segment")
    (only,) = load_benchmark(name, settings).items
    assert only.media is not None and only.media.path == str(root / media)
    assert doctor(capsys, name, *words(anno, videos)) == []


# ---- MVBench --------------------------------------------------------------------------------------------------------

HUB = {
    "json/action_sequence.json": [item("USNP1.mp4", start=1.3, end=15.4), item("USNP1.mp4", start=0, end=3)],
    "json/action_localization.json": [item("X_2.0_3.0.mp4")],  # as the branch itself names it, without bounds
    "json/episodic_reasoning.json": [item("castle_clip_05", start=2.5, end=7)],
    "json/action_antonym.json": [item("7.webm")],
}
SEGMENTS = (
    "star/Charades_segment/USNP1_1.2999999999999998_15.4.mp4",
    "star/Charades_segment/USNP1_0.0_3.0.mp4",
    "sta/sta_video_segment/X_2.0_3.0.mp4",
    "tvqa/video_fps3_hq_segment/castle_clip_05_2.5_7.mp4",
    "ssv2_video_mp4/7.mp4",
)


def test_mvbench_is_read_in_the_hubs_layout(tmp_path, video, capsys) -> None:
    """Segments are already cut, so start and end are not applied to them."""
    root = put(tmp_path, HUB, video, *SEGMENTS)
    assert evaluate("mvbench", tmp_path / "out", *words(root)) == 0
    content, lines = results(tmp_path / "out", "mvbench")
    assert content["counts"] == {"total": 5, "answered": 5, "failed": 0, "excluded": 0}
    assert [line["clip"] for line in lines] == [None] * 5
    notes = "\n".join(content["notes"])
    for said in (
        "star/Charades_segment instead of the official folder: Action Sequence 2; its videos are cut already",
        "tvqa/video_fps3_hq_segment instead of the official folder: Episodic Reasoning 1; its videos are cut",
        "ssv2_video_mp4 instead of the official folder: Action Antonym 1\n",
        "tasks without an annotation file: 16 of 20 (Action Prediction, ",
    ):
        assert said in notes
    assert content["notes"][0] in (tmp_path / "out/mvbench.md").read_text()
    assert doctor(capsys, "mvbench", *words(root)) == []


def test_the_official_layout_has_priority(tmp_path, video, capsys) -> None:
    root = put(tmp_path, HUB, video, *(f"video/{name}" for name in SEGMENTS), "video/star/Charades_v1_480/USNP1.mp4")
    benchmark = load_benchmark("mvbench", EvaluationSettings(anno_path=str(root), sampling="segment"))
    first, second = benchmark.items[:2]
    assert first.media and first.media.path.endswith("star/Charades_v1_480/USNP1.mp4")
    assert second.media and (first.media.bounds, second.media.bounds) == ((1.3, 15.4), (0, 3))
    assert not any("Charades" in note for note in benchmark.notes)


def test_a_segment_with_other_bounds_is_not_used(tmp_path, video, capsys) -> None:
    records = [item("a.mp4", start=1, end=2), item("a.mp4", start=1, end=4), item("a.mp4")]
    root = put(tmp_path, {"json/action_sequence.json": records}, video, "video/star/Charades_segment/a_1_2.mp4")
    items = load_benchmark("mvbench", EvaluationSettings(anno_path=str(root), sampling="segment")).items
    assert [one.media is None for one in items] == [False, True, True]
    faults = doctor(capsys, "mvbench", *words(root), code=1)
    assert [(fault["kind"], Path(fault["subject"]).name) for fault in faults] == [("missing", "Charades_v1_480")]


def test_one_file_for_two_videos_is_refused(tmp_path, video, capsys) -> None:
    tasks = {"moving_count": [item("1.mp4")], "state_change": [item("1.mp4")], "own": [item("1.mp4")]}
    root = put(tmp_path, {f"json/{task}.json": rows for task, rows in tasks.items()}, video, "video/1.mp4")
    assert evaluate("mvbench", tmp_path / "out", *words(root)) == 1
    said = capsys.readouterr().err
    assert "Moving Count (clevrer/video_validation/) and State Change (perception/videos/) mean different" in said
    assert said.count(f"{root}/video/1.mp4") == 1
    chosen = EvaluationSettings(anno_path=str(root), sampling="segment", tasks=["moving_count", "own"])
    assert len(load_benchmark("mvbench", chosen).items) == 2
    (fault,) = doctor(capsys, "mvbench", *words(root), code=1)
    assert fault["kind"] == "colliding names" and fault["subject"] == f"{root}/video/1.mp4"
    put(root, {}, video, "video/clevrer/video_validation/1.mp4")
    assert doctor(capsys, "mvbench", *words(root)) == []


def test_tasks_of_one_folder_share_a_file(tmp_path, video, capsys) -> None:
    tasks = ("moving_count", "moving_direction", "object_existence")
    root = put(tmp_path, {f"json/{task}.json": [item("1.mp4")] for task in tasks}, video, "video/1.mp4")
    assert len(load_benchmark("mvbench", EvaluationSettings(anno_path=str(root), sampling="segment")).items) == 3
    assert doctor(capsys, "mvbench", *words(root)) == []


def test_a_users_own_task_is_accepted(tmp_path, video, capsys) -> None:
    rows = [item("a.mp4"), item("sub/b.webm", start=0.5, end=1.5), item("c.mp4", answer="up")]
    root = put(tmp_path, {"json/my_colors.json": rows}, video, "video/a.mp4", "video/sub/b.mp4", "video/c.mp4")
    assert evaluate("mvbench", tmp_path / "out", *words(root)) == 0
    content, lines = results(tmp_path / "out", "mvbench")
    assert (content["counts"]["answered"], content["counts"]["failed"]) == (2, 1)
    (fault,) = doctor(capsys, "mvbench", *words(root), code=1)
    assert fault["sentence"] in lines[2]["error"] and "'up' is none of the candidates" in fault["sentence"]


def test_bounds_that_the_official_script_clamps(tmp_path, video, capsys) -> None:
    bounds = [(-0.5, 1), (1, 90), (0.05, 0.06), (5, 6), (1.5, 0.5), (float("nan"), 1), (-2, -1)]
    rows = [item("a.mp4", start=start, end=end) for start, end in bounds]
    root = put(tmp_path, {"json/action_sequence.json": rows}, video, "video/star/Charades_v1_480/a.mp4")
    options = words(root)
    assert evaluate("mvbench", tmp_path / "out", *options, "--num-frames", "4") == 0
    content, lines = results(tmp_path / "out", "mvbench")
    assert [line["frames"]["times"] for line in lines[:3]] == [
        [0.1, 0.3, 0.6, 0.9],
        [1.1, 1.3, 1.5, 1.8],
        [0.0, 0.0, 0.0, 0.1],
    ]
    assert all(line["error"] for line in lines[3:]) and content["counts"]["failed"] == 4
    assert "negative start is clamped to 0, as in the official script: 1 (action_sequence/0)" in content["notes"][0]
    faults = doctor(capsys, "mvbench", *options, code=1)
    assert {fault["kind"] for fault in faults} == {"bounds"}
    assert sorted((fault["where"][-1], fault["note"]) for fault in faults) == [
        *(("1", True), ("2", True), ("4", False), ("5", False), ("6", False), ("7", False)),
    ]
    put(root, {"json/action_sequence.json": rows[:3]}, video)
    assert [fault["note"] for fault in doctor(capsys, "mvbench", *options)] == [True, True]
    assert main(["doctor", "--format", "mvbench", *options]) == 0
    assert "start is -0.5 s: it is clamped to 0, as in the official script (a note)" in capsys.readouterr().out


def test_bounds_are_ignored_in_tasks_without_bounds(tmp_path, video, capsys) -> None:
    rows = [item("a.mp4", start=3, end=2)]
    root = put(tmp_path, {"json/state_change.json": rows}, video, "video/perception/videos/a.mp4")
    assert doctor(capsys, "mvbench", *words(root)) == []
    (only,) = load_benchmark("mvbench", EvaluationSettings(anno_path=str(root), sampling="segment")).items
    assert only.media is not None and only.media.bounds is None


def test_a_git_lfs_pointer_instead_of_a_video_is_reported(tmp_path, video, capsys) -> None:
    root = put(
        tmp_path, {"json/own.json": [item("a.mp4"), item("b.mp4")], "video/a.mp4": POINTER}, video, "video/b.mp4"
    )
    assert evaluate("mvbench", tmp_path / "out", *words(root)) == 0
    _, lines = results(tmp_path / "out", "mvbench")
    assert lines[0]["error"] == (
        f"{root}/video/a.mp4: found a Git LFS pointer, expected the file itself: fetch it with `git lfs pull`"
    )
    (fault,) = doctor(capsys, "mvbench", *words(root), code=1)
    assert fault["kind"] == "unreadable" and fault["sentence"] in lines[0]["error"]


def test_hidden_files_from_macs_are_skipped(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"json/own.json": [item("a.mp4")], "json/._own.json": "\x00\x05\x16\x07"}
    root = put(tmp_path, files, video, "video/a.mp4")
    assert evaluate("mvbench", tmp_path / "out", *words(root)) == 0
    assert results(tmp_path / "out", "mvbench")[0]["counts"]["total"] == 1
    assert doctor(capsys, "mvbench", *words(root)) == []


def test_two_files_for_one_task_are_refused(tmp_path, video, capsys) -> None:
    files = {"json/own.json": [item("a.mp4")], "json/own.jsonl": json.dumps(item("a.mp4"))}
    root = put(tmp_path, files, video, "video/a.mp4")
    assert "own.jsonl: there is also own.json" in refused(capsys, tmp_path / "out", "mvbench", *words(root))
