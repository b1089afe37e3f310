"""`stllm doctor`: it finds planted faults of every kind and format, and none in valid data."""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.datasets.annotations import AnnotationError, JsonRecords
from stllm.datasets.faults import KINDS, Fault
from stllm.doctor.checks import Use, check_use
from stllm.doctor.doctor import run_tasks
from stllm.evaluation.benchmarks.mvbench import TASKS
from stllm.toy.world import write_world
from tests.helpers.videos import write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """Write a video of 2 s at 10 frames per second, with its index at the front, so that a truncated copy opens."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    return write_video(path, num_frames=20, fps=10, container_options={"movflags": "+faststart"})


def put(video: Path, *places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, place)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(path)
    return path


def record(video: str, answer: Any = "a dog runs over the green field", **fields) -> dict[str, Any]:
    return {"video": video, "QA": [{"i": "", "q": "What happens?", "a": answer}], **fields}


def doctor(capsys, *argv: object, code: int = 1) -> dict[str, Any]:
    """Return the report of `stllm doctor ... --json`, and check the exit code."""
    assert main(["doctor", *map(str, argv), "--json", "--num-workers", "0"]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == code, captured.err
    return json.loads(captured.out)


def named(report: dict[str, Any]) -> Counter[tuple[str, str]]:
    """Return (kind, last part of the subject) of every fault."""
    return Counter((fault["kind"], fault["subject"].rsplit("/", 1)[-1]) for fault in report["faults"])


@pytest.fixture
def planted(tmp_path, video) -> Path:
    """Write a training set with ten kinds of faults, and valid records between them."""
    media = tmp_path / "media"
    put(video, *(media / f"{name}.mp4" for name in ("good", "also", "same", "SAME")), tmp_path / "stray.mp4")
    (media / "text.mp4").write_text("404: not found")
    (media / "empty.mp4").touch()
    (media / "cut.mp4").write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    picture(media / "picture.jpg")
    records = [
        record("good.mp4"),
        record("lost.mp4"),
        record("text.mp4"),
        record("cut.mp4"),
        record("empty.mp4"),
        record("same.mp4"),
        record("also.mp4", start=1.5, end=0.5),
        record("also.mp4", start=5, end=6),
        record("also.mp4", start=0, end=90),
        record("also.mp4", "  "),
        {"video": "also.mp4"},
        record("picture.jpg"),
        record("../stray.mp4"),
        {**record("good.mp4", "Yes."), "start": 0, "end": 1},
        {**record("good.mp4", "no"), "start": 0, "end": 1},
        record("also.mp4", start=0.5, end=1.5),
    ]
    return write_json(tmp_path / "train.json", records)


def test_all_planted_faults_are_found(planted, capsys) -> None:
    report = doctor(capsys, "--anno-path", planted, "--video-dir", planted.parent / "media", "--format", "vc2")
    assert named(report) == {
        ("missing", "lost.mp4"): 1,
        ("unreadable", "text.mp4"): 1,
        ("unreadable", "cut.mp4"): 1,
        ("empty file", "empty.mp4"): 1,
        ("colliding names", "same.mp4"): 1,
        ("bounds", "start, end"): 1,
        ("bounds", "also.mp4"): 2,
        ("empty answer", "QA 1"): 1,
        ("incomplete", "QA"): 1,
        ("wrong medium", "picture.jpg"): 1,
        ("outside", "stray.mp4"): 1,
        ("contradiction", "good.mp4"): 1,
    }
    assert len(report["counts"]) == 10 and sum(report["counts"].values()) == len(report["faults"]) == 13
    assert (report["num_records"], report["num_media"]) == (16, 8)
    sentences = {fault["sentence"] for fault in report["faults"]}
    assert any("found text ('404: not found')" in sentence for sentence in sentences)
    assert any("end is 90 s, but the video lasts 2.00 s" in sentence for sentence in sentences)
    assert all(fault["where"] for fault in report["faults"])
    where = {fault["subject"].rsplit("/", 1)[-1]: fault["where"] for fault in report["faults"]}
    assert where["lost.mp4"] == f"{planted}, record 2"


@pytest.mark.parametrize("pair", [{"q": ["why?"], "a": "x"}, {"i": {"a": 1}, "q": "why?", "a": "x"}])
def test_a_question_that_is_not_text_is_reported_as_in_training(tmp_path, video, capsys, pair) -> None:
    put(video, tmp_path / "good.mp4")
    path = write_json(tmp_path / "train.json", [record("good.mp4"), {"video": "good.mp4", "QA": [pair]}])
    (fault,) = doctor(capsys, "--anno-path", path, "--format", "vc2")["faults"]
    with pytest.raises(AnnotationError) as error:
        JsonRecords(path)[1]
    assert str(error.value) == f"{fault['where']}: {fault['sentence']}" and "expected a text" in fault["sentence"]


def test_faults_are_grouped_and_limited(planted, capsys) -> None:
    records = [record(f"lost{number}.mp4") for number in range(25)]
    write_json(planted, json.loads(planted.read_text()) + records)
    argv = ["doctor", "--anno-path", str(planted), "--video-dir", f"{planted.parent}/media", "--format", "vc2"]
    assert main([*argv, "--decode", "none", "--num-workers", "0"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "26 missing: media that are not there" in captured.out
    assert "  ... and 6 more (--all lists them)" in lines
    assert sum("lost" in line for line in lines) == 20
    assert captured.err.startswith("found ") and captured.err.count("\n") == 1 and "26 missing" in captured.err
    assert main([*argv, "--all"]) == 1
    assert sum("lost" in line for line in capsys.readouterr().out.splitlines()) == 26


def test_decode_none_checks_sizes_and_all_finds_damage(tmp_path, capsys) -> None:
    path = write_video(tmp_path / "damaged.mp4", num_frames=60, container_options={"movflags": "+faststart"})
    damaged = bytearray(path.read_bytes())
    damaged[-600:-300] = bytes(300)
    path.write_bytes(damaged)
    (tmp_path / "empty.mp4").touch()
    anno = write_json(tmp_path / "train.json", [record("damaged.mp4"), record("empty.mp4")])
    argv = ("--anno-path", anno, "--format", "vc2", "--decode")
    empty = ("empty file", "empty.mp4")
    assert named(doctor(capsys, *argv, "none")) == {empty: 1}
    assert named(doctor(capsys, *argv, "first")) == {empty: 1}
    assert named(doctor(capsys, *argv, "all")) == {empty: 1, ("unreadable", "damaged.mp4"): 1}


def test_valid_data_has_no_faults(tmp_path, video, capsys, monkeypatch) -> None:
    put(video, tmp_path / "a.mp4", tmp_path / "b.mp4")
    picture(tmp_path / "c.png")
    captions = [{"image": "c.png", "caption": text} for text in ("red", "a square")]
    jsonl = tmp_path / "own.jsonl"
    jsonl.write_text("\n".join(json.dumps(line) for line in [record("a.mp4", start=0, end=1.9), {}, record("b.mp4")]))
    jsonl.write_text(jsonl.read_text().replace("{}\n", "\n"))
    for anno in (write_json(tmp_path / "pairs.json", captions), jsonl):
        report = doctor(capsys, "--anno-path", anno, "--format", "vc2", "--decode", "all", code=0)
        assert (report["num_records"], report["faults"]) == (2, [])
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--anno-path", "own.jsonl", "--format", "vc2"]) == 0
    assert capsys.readouterr().out == "nothing found in 2 records, 2 media\n"


@pytest.mark.parametrize(
    ("content", "subject", "words"),
    [
        ('[{"video": "a.mp4", "QA": []}, {"video"', "file", "not valid JSON"),
        ('{"video": "a.mp4"', "file", "not valid JSON"),
        ("[]", "file", "found no record"),
        ("", "file", "found no record"),
        ('[{"video": "a", "question": "q", "candidates": ["x", "y"], "answer": "x"}]', "format", "an MVBench task"),
        ('[{"Q": "q", "A": "a", "video_name": "a"}]', "format", "a VcgBench ground truth"),
        ('[{"question": "q", "answer": "a", "video_name": "a"}]', "format", "a VideoQA ground truth"),
        ('[{"id": "1", "image": "a.jpg", "conversations": []}]', "format", "LLaVA's conversations"),
        ("[3]", "record", "expected a mapping"),
    ],
)
def test_a_file_of_another_format_is_reported(tmp_path, capsys, content, subject, words) -> None:
    anno = tmp_path / "train.json"
    anno.write_text(content)
    report = doctor(capsys, "--anno-path", anno, "--format", "vc2")
    fault = next(fault for fault in report["faults"] if fault["kind"] == "annotation")
    assert fault["subject"] == subject and words in fault["sentence"] and str(anno) in fault["where"]


def test_every_broken_line_of_jsonl_is_reported(tmp_path, video, capsys) -> None:
    put(video, tmp_path / "a.mp4")
    anno = tmp_path / "own.jsonl"
    anno.write_text("\n".join([json.dumps(record("a.mp4")), "{", "nonsense", "[1]", json.dumps(record("a.mp4"))]))
    report = doctor(capsys, "--anno-path", anno, "--format", "vc2")
    assert [fault["where"] for fault in report["faults"]] == [f"{anno}, line {number}" for number in (2, 3, 4)]
    assert report["num_records"] == 2


def test_a_missing_file_or_folder_is_one_fault(tmp_path, capsys) -> None:
    report = doctor(capsys, "--anno-path", tmp_path / "no.json", "--format", "vc2")
    assert named(report) == {("annotation", "file"): 1}
    anno = write_json(tmp_path / "train.json", [record(f"deep/{number}.mp4") for number in range(9)])
    report = doctor(capsys, "--anno-path", anno, "--video-dir", tmp_path / "gone", "--format", "vc2")
    assert named(report) == {("missing", "deep"): 1}
    assert report["faults"][0]["where"].endswith("record 1 and 8 more")


def item(video: str, **changed) -> dict[str, Any]:
    return {"video": video, "question": "Which?", "candidates": ["left", "right"], "answer": "left", **changed}


@pytest.fixture
def mvbench(tmp_path, video) -> Path:
    """Write MVBench with three tasks: media in the official folder, in a fallback folder, and as frames."""
    media = tmp_path / "video"
    put(video, media / "star/Charades_v1_480/a.mp4", media / "data0613/star/Charades_v1_480/b.mp4")
    put(video, media / "perception/videos/c.mp4")
    for number in range(1, 4):
        picture(media / f"tvqa/frames_fps3_hq/d/{number:05d}.jpg")
    bounds = {"start": 0.0, "end": 1.0}
    write_json(tmp_path / "json/action_sequence.json", [item("a.mp4", **bounds), item("b.mp4", **bounds)])
    write_json(tmp_path / "json/object_shuffle.json", [item("c.mp4")])
    write_json(tmp_path / "json/episodic_reasoning.json", [item("d", **bounds)])
    return tmp_path


def test_valid_mvbench_has_no_faults(mvbench, capsys) -> None:
    report = doctor(capsys, "--anno-path", mvbench, "--format", "mvbench", "--decode", "all", code=0)
    assert (report["num_records"], report["num_media"]) == (4, 4)
    one = mvbench / "json/object_shuffle.json"
    argv = ("--anno-path", one, "--video-dir", mvbench / "video", "--format", "mvbench")
    assert doctor(capsys, *argv, code=0)["num_records"] == 1


def test_faults_of_mvbench_are_found(mvbench, video, capsys) -> None:
    put(video, mvbench / "video/tvqa/frames_fps3_hq/film.mp4")
    items = [
        item("c.mp4", answer="up", question="Whither?"),
        item("c.mp4", answer="right", question="whither?"),
        item("c.mp4", candidates=["left", "left", "right"]),
        item("c.mp4", candidates=["left"]),
        item("c.mp4", candidates="left or right"),
        item("c.mp4", question=" "),
        item("gone.mp4"),
        {"question": "Which?"},
    ]
    write_json(mvbench / "json/object_shuffle.json", items)
    write_json(mvbench / "json/action_sequence.json", [item("a.mp4"), item("a.mp4", start=1, end=1)])
    write_json(mvbench / "json/episodic_reasoning.json", [item("film.mp4", start=0, end=1)])
    write_json(mvbench / "json/action_sequenc.json", [])
    report = doctor(capsys, "--anno-path", mvbench, "--format", "mvbench")
    assert named(report) == {
        ("candidates", "answer"): 1,
        ("candidates", "candidates"): 4,
        ("contradiction", "c.mp4"): 1,
        ("empty question", "question"): 1,
        ("missing", "gone.mp4"): 1,
        ("incomplete", "answer"): 1,
        ("incomplete", "video"): 1,
        ("bounds", "start, end"): 2,
        ("wrong medium", "film.mp4"): 1,
        ("annotation", "file"): 1,
    }
    assert any("did you mean 'action_sequence.json'" in fault["sentence"] for fault in report["faults"])
    assert main(["doctor", "--anno-path", str(mvbench), "--format", "mvbench", "--num-workers", "0"]) == 1
    said = capsys.readouterr().err.strip()
    faults, kinds = said.removeprefix("found ").split(" faults in ")[0], said.rpartition(": ")[2].split(", ")
    num_faults = sum(not fault["note"] for fault in report["faults"])
    assert int(faults) == sum(int(kind.split()[0]) for kind in kinds) == num_faults
    assert not any("contradiction" in kind for kind in kinds)  # a note


def test_the_tasks_of_mvbench() -> None:
    assert len(TASKS) == len({task.file for task in TASKS}) == 20
    assert sum(task.bounded for task in TASKS) == 5 and sum(task.media == "frames" for task in TASKS) == 1
    assert {"fine_grained_pose.json", "action_sequence.json"} < {task.file for task in TASKS}


def test_an_mvbench_folder_without_json_is_reported(tmp_path, capsys) -> None:
    report = doctor(capsys, "--anno-path", tmp_path, "--format", "mvbench")
    assert named(report) == {("annotation", "folder"): 1}


def test_faults_of_vcgbench_are_found(tmp_path, video, capsys) -> None:
    media = tmp_path / "videos"
    put(video, media / "v_a.mp4", media / "v_b.mkv")
    general = [{"Q": "What?", "A": "A dog runs.", "video_name": name} for name in ("v_a", "v_b")]
    two = [{"Q1": "What?", "Q2": "Who?", "A": "A dog runs.", "video_name": "v_a"}]
    argv = ("--video-dir", media, "--format", "vcgbench", "--anno-path")
    for content in (general, two):
        assert doctor(capsys, *argv, write_json(tmp_path / "qa.json", content), code=0)["num_media"] == len(content)
    put(video, media / "v_a.avi")
    bad = [*general, {"Q": "", "A": "x", "video_name": "v_b"}, {"Q1": "?", "A": "", "video_name": "v_b"}, {"Q": "?"}]
    bad += [{"Q": "?", "A": "x", "video_name": "v_c"}]
    report = doctor(capsys, *argv, write_json(tmp_path / "qa.json", bad))
    assert named(report) == {
        ("colliding names", "v_a"): 1,
        ("empty question", "Q"): 1,
        ("incomplete", "record"): 1,
        ("empty answer", "A"): 1,
        ("incomplete", "A"): 1,
        ("incomplete", "video_name"): 1,
        ("missing", "v_c"): 1,
    }


def test_all_forms_of_videoqa_are_read(tmp_path, video, capsys) -> None:
    media = tmp_path / "videos"
    put(video, media / "one.avi", media / "video7010.mp4", media / "v_act.mkv", media / "named.mp4")
    argv = ("--video-dir", media, "--format", "videoqa", "--anno-path")
    msvd = [{"video_name": "one.avi", "question_id": 1, "question": "who?", "answer": "dog"}]
    msvd += [{"video": "named", "id": 2, "question": "who?", "answer": "dog"}]
    assert doctor(capsys, *argv, write_json(tmp_path / "test_qa.json", msvd), code=0)["num_media"] == 2
    msrvtt = [{"video_id": 7010, "id": 5, "question": "who?", "answer": "dog", "category_id": 3}]
    assert doctor(capsys, *argv, write_json(tmp_path / "test_qa.json", msrvtt), code=0)["num_media"] == 1
    asked = [{"video_name": "act", "question": "who?", "question_id": "act_1"}]
    questions = write_json(tmp_path / "test_q.json", asked)
    answers = [{"answer": "dog", "type": 3, "question_id": "act_1"}]
    elsewhere = write_json(tmp_path / "gold.json", answers)
    assert doctor(capsys, *argv, questions, "--answers-path", elsewhere, code=0)["num_media"] == 1
    write_json(tmp_path / "test_a.json", answers)
    assert doctor(capsys, *argv, questions, code=0)["num_records"] == 1


def test_faults_of_videoqa_are_found(tmp_path, video, capsys) -> None:
    put(video, tmp_path / "act.mp4")
    asked = [{"video_name": "act", "question": "who?", "question_id": key} for key in ("1", "2", "2", "3")]
    answers = [{"answer": answer, "question_id": key} for key, answer in [("1", "dog"), ("2", ""), ("9", "x")]]
    answers += [{"answer": "cat", "question_id": "1"}, {"answer": "cat"}]
    write_json(tmp_path / "test_a.json", answers)
    anno = write_json(tmp_path / "test_q.json", asked)
    report = doctor(capsys, "--anno-path", anno, "--format", "videoqa")
    assert named(report) == {
        ("duplicate id", "question 2"): 1,
        ("duplicate id", "question 1"): 1,
        ("empty answer", "answer"): 2,
        ("empty answer", "question 3"): 1,
        ("incomplete", "answer 9"): 1,
        ("incomplete", "question_id"): 1,
    }


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_faults_of_shards_are_found(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    png = picture(tmp_path / "x.png").read_bytes()
    good = [("a.png", png), ("a.txt", b"red"), ("b.png", png), ("b.txt", b"red")]
    bad = [("c.png", png), ("d.txt", b"text"), ("e.png", png), ("e.txt", b""), ("f.png", b"x"), ("f.txt", b"text")]
    write_shard(tmp_path / "0.tar", good)
    argv = ("--format", "shards", "--decode", "all", "--anno-path", tmp_path / "*.tar")
    assert doctor(capsys, *argv, code=0)["num_shards"] == 1
    write_shard(tmp_path / "1.tar", [*good, *bad, ("g.png", png), ("g.json", b"{}")])
    write_shard(tmp_path / "2.tar", good)
    with (tmp_path / "2.tar").open("r+b") as file:
        file.truncate(1700)
    assert named(doctor(capsys, *argv)) == {
        ("incomplete", "caption"): 1,
        ("incomplete", "image"): 1,
        ("empty answer", "caption"): 1,
        ("unreadable", "image"): 1,
        ("empty answer", "g.png"): 1,
        ("unreadable", "2.tar"): 1,
    }


def test_shards_of_clips_are_checked_as_clips(tmp_path, video, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mp4, png = video.read_bytes(), picture(tmp_path / "x.png").read_bytes()
    good = [("a.mp4", mp4), ("a.txt", b"red"), ("b.mp4", mp4), ("b.json", b'{"caption": "red"}'), ("b.png", png)]
    write_shard(tmp_path / "0.tar", good)
    argv = ("--format", "shards", "--decode", "all", "--anno-path", tmp_path / "*.tar")
    assert doctor(capsys, *argv, code=0)["num_shards"] == 1
    bad = [("c.mp4", mp4), ("d.txt", b"text"), ("e.mp4", mp4[: len(mp4) // 2]), ("e.txt", b"text")]
    write_shard(tmp_path / "1.tar", [*good, *bad, ("f.mp4", mp4), ("f.json", b"{}")])
    assert named(doctor(capsys, *argv)) == {
        ("incomplete", "caption"): 1,
        ("incomplete", "video"): 1,
        ("unreadable", "video"): 1,
        ("empty answer", "f.mp4"): 1,
    }


def test_a_configuration_with_several_data_sets(planted, video, capsys) -> None:
    root = planted.parent
    write_shard(root / "0.tar", [("a.png", b"")])
    datasets = {
        "mine": {"anno_path": str(planted), "media_dir": str(root / "media")},
        "text": {"anno_path": str(write_json(root / "text.json", [{"QA": [{"q": "?", "a": "!"}]}])), "media": "text"},
        "pairs": {"type": "image_text", "shards": str(root / "0.tar"), "cache_dir": str(root / "cache")},
        "gone": {"anno_path": str(root / "gone.json"), "media_dir": str(root)},
        "features": {"anno_path": str(planted), "media_dir": str(root / "media"), "features_dir": str(root / "no")},
    }
    config = root / "train.yaml"
    config.write_text(yaml.safe_dump({"datasets": datasets}))
    report = doctor(capsys, "--cfg-path", config)
    found = named(report)
    assert report["num_records"] == 33 and report["num_shards"] == 1
    assert found["missing", "lost.mp4"] == found["incomplete", "caption"] == found["annotation", "file"] == 1
    assert found["missing", "no"] == 1
    alone = ["datasets.mine.media_dir=/nowhere", f"datasets.gone.anno_path={planted}"]
    assert named(doctor(capsys, "--cfg-path", config, "--options", *alone))["missing", "nowhere"] == 1


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--anno-path", "a.json"],
        ["--anno-path", "a.json", "--cfg-path", "b.yaml", "--format", "vc2"],
        ["--anno-path", "a.json", "--format", "vc3"],
        ["--cfg-path", "a.yaml", "--format", "vc2"],
        ["--anno-path", "a.json", "--format", "vc2", "--options", "a=1"],
        ["--anno-path", "a.json", "--format", "vc2", "--answers-path", "b"],
        ["--anno-path", "a.json", "--format", "vc2", "--decode", "some"],
    ],
)
def test_wrong_usage(argv, capsys) -> None:
    assert main(["doctor", *argv]) == 2
    assert "error: " in capsys.readouterr().err


def test_several_processes_find_the_same_faults(planted) -> None:
    media = sorted((planted.parent / "media").glob("*"))
    uses = [Use(str(path), "video", "record 1", clips=[((0.0, 1.0), "record 1")]) for path in media * 2]
    alone = [fault for use in uses for fault in check_use(use, "first")]
    tasks = [partial(check_use, use, "first") for use in uses]
    assert list(run_tasks(tasks, num_workers=2)) == list(run_tasks(tasks, num_workers=0)) == alone
    assert {fault.kind for fault in alone} == {"unreadable", "empty file", "wrong medium"} < set(KINDS)


def test_a_crash_of_a_decoder_is_reported() -> None:
    """A worker dies, as when memory runs out: the command ends with advice for finding the file."""
    faults = [Fault("missing", str(number), "clip.mp4", "gone") for number in range(30)]
    whole: list[Callable[[], list[Fault]]] = [partial(list, [fault]) for fault in faults]
    assert list(run_tasks(whole, num_workers=2)) == faults
    with pytest.raises(UserError, match=r"a process died while it decoded: .*--num-workers 0"):
        list(run_tasks([*whole, partial(os._exit, 9)], num_workers=2))


def test_flatten_writes_one_record_per_pair(tmp_path, video, capsys) -> None:
    """Other keys are kept; the result can be checked and loaded like any data set."""
    put(video, tmp_path / "a.mp4", tmp_path / "b.mp4")
    pairs = [{"i": "é \ud83d", "q": f"question {number}?", "a": f"answer {number}", "x": number} for number in range(3)]
    records: list[dict[str, Any]] = [
        {"video": "a.mp4", "start": 0.5, "QA": pairs[:2], "end": 1.5, "source": {"id": [1, None]}},
        {"video": "b.mp4", "QA": []},
        {"QA": pairs[2:], "video": "b.mp4"},
    ]
    deep, flat = write_json(tmp_path / "train.json", records), tmp_path / "new" / "flat.json"
    assert main(["doctor", "--flatten", str(deep), str(flat)]) == 0
    assert capsys.readouterr().out == (
        f"written to {flat}: 3 records of one question and answer each, from 3 of {deep}; left out, as "
        "they have no question: 1\n"
    )
    first, second, third = json.loads(flat.read_text())
    assert [first, second] == [{**records[0], "QA": [pair]} for pair in pairs[:2]] and third == records[2]
    assert list(first) == list(records[0])
    lines = tmp_path / "train.jsonl"  # one record a line is read, too
    lines.write_text("\n".join(map(json.dumps, records)))
    assert main(["doctor", "--flatten", str(lines), str(tmp_path / "second.json")]) == 0
    assert (tmp_path / "second.json").read_text() == flat.read_text()
    capsys.readouterr()
    argv = ("--anno-path", flat, "--video-dir", tmp_path, "--format", "vc2")
    assert doctor(capsys, *argv, code=0)["data_sets"] == {"vc2": 3}
    loaded = JsonRecords(flat, media_dir=tmp_path)
    turns = [loaded[index].turns for index in range(len(loaded))]
    assert [(len(turn), turn[0].question, turn[0].answer) for turn in turns] == [
        (1, pair["q"], pair["a"]) for pair in pairs
    ]
    assert [loaded[index].bounds for index in range(3)] == [(0.5, 1.5), (0.5, 1.5), None]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            '[{"video": "a.mp4", "QA": [{"q": "", "a": "b"}]}, {"video": "a.mp4", "caption": "c"}]',
            ", record 2: found {",
        ),
        ('[{"video": "a.mp4", "QA": ["b"]}]', ", record 1: found {"),
        ('[{"video": "a.mp4", "QA": {"q": "", "a": "b"}}]', ", record 1: found {"),
        ('{"question": "q", "answer": "a", "video": "v"}', ", record 1: found {"),
        ("[3]", ", record 1: found 3, expected "),
        ('[{"video": "a.mp4", "QA": []}]', ": found no question-and-answer pair in 1 records"),
        ("[]", ": found no question-and-answer pair in 0 records"),
        ("", ": found no question-and-answer pair in 0 records"),
        ('[{"video": "a.mp4", "QA": [{"q": "", "a": "b"}]}', ", line 1, column "),
        ("\xff", ": not UTF-8 text"),
        (None, ": there is no such file"),
    ],
)
def test_flatten_refuses_files_without_pairs(tmp_path, capsys, content, sentence) -> None:
    deep = tmp_path / "in.json"
    if content is not None:
        deep.write_text(content, encoding="latin-1")
    assert main(["doctor", "--flatten", str(deep), str(tmp_path / "out.json")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {deep}{sentence}") and captured.err.count("\n") == 1
    assert "unexpected" not in captured.err and "expected" in captured.err
    assert captured.out == "" and sorted(path.name for path in tmp_path.iterdir()) == ["in.json"][content is None :]


def test_flatten_does_not_overwrite_and_refuses_other_options(tmp_path, capsys) -> None:
    deep = write_json(tmp_path / "in.json", [record("a.mp4")])
    for taken in (deep, tmp_path):
        assert main(["doctor", "--flatten", str(deep), str(taken)]) == 1
        assert f"{taken} exists already, expected a new file" in capsys.readouterr().err
    assert json.loads(deep.read_text()) == [record("a.mp4")]
    assert main(["doctor", "--flatten", str(deep), str(deep / "below.json")]) == 1
    assert "unexpected" not in capsys.readouterr().err
    for further in (["--cfg-path", "x"], ["--anno-path", "x", "--format", "vc2"], ["--json"], ["--format", "vc2"]):
        assert main(["doctor", "--flatten", str(deep), str(tmp_path / "out.json"), *further]) == 2
    assert not (tmp_path / "out.json").exists()


def test_a_question_longer_than_the_models_positions_is_reported(tmp_path, video, capsys) -> None:
    """Without a configuration, words are counted; with one, tokens including visual ones."""
    write_world(tmp_path / "toy", num_train=10, num_test=4, seed=1)
    put(video, tmp_path / "a.mp4")
    pair = {"i": "", "q": "why", "a": "a square moves"}
    long, half = {**pair, "q": "why " * 3000}, {**pair, "q": "why " * 350}
    anno = write_json(
        tmp_path / "train.json", [{"video": "a.mp4", "QA": [pair, long]}, {"video": "a.mp4", "QA": [half, half]}]
    )
    report = doctor(capsys, "--anno-path", anno, "--format", "vc2")
    (fault,) = report["faults"]
    assert (fault["kind"], fault["where"], fault["subject"]) == ("too long", f"{anno}, record 1", "QA 2")
    assert fault["sentence"].startswith("the question has 3000 words, so at least as many tokens, but Vicuna has 2048")

    model = {
        "model_type": "instructblip_vicuna0",
        "llama_model": str(tmp_path / "toy/language_model"),
        "qformer_tokenizer": str(tmp_path / "toy/qformer_tokenizer"),
        "qformer": {"vocab_size": 513},
        "num_query_token": 4,
    }
    entry = {"anno_path": str(anno), "num_frames": 8}
    cfg = {"model": model, "datasets": {"one": entry, "talk": {**entry, "multi_turn": True}}}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(cfg))
    report = doctor(capsys, "--cfg-path", config)
    found = [(fault["kind"], fault["where"][-1], fault["subject"]) for fault in report["faults"]]
    assert found == [("too long", "1", "QA 2"), ("too long", "1", "QA"), ("too long", "2", "QA")]
    assert report["faults"][0]["sentence"].startswith("its prompt and answer have 9044 tokens (32 of them visual)")
    assert report["notes"] == []
    gone = doctor(capsys, "--cfg-path", config, "--options", "model.llama_model=gone/away")
    (note,) = gone["notes"]
    assert note.endswith("because the model's files cannot be read: gone/away is not here")
    assert {fault["kind"] for fault in gone["faults"]} == {"too long"}
