"""Media that take too long: train, extract, evaluate and doctor skip them, and stop if the storage hangs."""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stllm.cli import main
from stllm.common.registry import readers
from stllm.media import images as picture_readers
from stllm.media import time_bound
from stllm.media.video import PyAvReader
from tests.helpers.evaluation import evaluate, write_set
from tests.helpers.training import read_log, write_recipe
from tests.helpers.videos import write_video

SECONDS = 1.0  # a tiny video takes a hundredth; under load one of them may fail, too, and the tests allow it
GIVEN_UP = "its reading was given up after 1 s: check the file and its storage, or raise "


def write_slow_gif(path: Path) -> Path:
    """Write 300 frames of 3,000 x 3,000 pixels in 2 MB. Each takes 0.02 to 0.1 seconds to decode."""
    frame = BytesIO()
    Image.new("1", (3000, 3000)).save(frame, "GIF")
    data = frame.getvalue()
    head = 13 + 3 * 2 ** ((data[10] & 7) + 1)  # with the table of colours
    path.write_bytes(data[:head] + data[head:-1] * 300 + data[-1:])
    return path


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Register a reader that never returns for files called hang* or vid*. Returns its name."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    kept_open = os.open(pipe, os.O_RDWR)  # so that a reader waits for data, not for a writer

    class HangingReader(PyAvReader):
        def __init__(self, path: str | Path) -> None:
            if Path(path).name.startswith(("hang", "vid")):
                with pipe.open("rb", buffering=0) as file:
                    file.read(1)
            super().__init__(path)

    readers.get("pyav")  # all are registered
    monkeypatch.setitem(readers._entries, "hanging", HangingReader)
    yield "hanging"
    os.write(kept_open, b"0" * 100)
    os.close(kept_open)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("good_0", "good_1", "hang_0"):
        write_video(folder / f"{name}.mp4", num_frames=8)
    return folder


def recipe_of(names: list[str], media: Path, toy: Path, **entry: Any) -> Path:
    records = [{"video": name, "QA": [{"q": "What number is it?", "a": name}]} for name in names]
    (media.parent / "train.json").write_text(json.dumps(records))
    mine = {"anno_path": str(media.parent / "train.json"), "media_dir": str(media), "num_frames": 4, **entry}
    run: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "max_bad_fraction": 0.9,
        "media_seconds": SECONDS,
    }
    return write_recipe(media.parent / "recipe.yaml", toy, datasets={"mine": mine}, **run)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_training_skips_and_counts_a_slow_medium(
    media: Path, toy: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = write_slow_gif(media / "slow.gif")
    recipe = recipe_of(["good_0.mp4", "good_1.mp4", "slow.gif"], media, toy)
    assert main(["train", "--cfg-path", str(recipe), "--options", f"run.dataloader_num_workers={workers}"]) == 0
    assert f"{slow}: {GIVEN_UP}run.media_seconds" in capsys.readouterr().err
    log = read_log(media.parent / "run")
    assert log[-1]["step"] == 2 and log[-1]["skipped_samples"] >= 2  # once an epoch of one step


def test_a_file_whose_reading_never_returns_is_a_bad_sample(
    media: Path, toy: Path, hanging: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(["good_0.mp4", "good_1.mp4", "hang_0.mp4"], media, toy, reader=hanging)
    assert main(["train", "--cfg-path", str(recipe), "--options", "run.dataloader_num_workers=1"]) == 0
    assert f"{media / 'hang_0.mp4'}: {GIVEN_UP}run.media_seconds" in capsys.readouterr().err
    assert read_log(media.parent / "run")[-1]["skipped_samples"] >= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_many_hanging_readings_stop_the_run(
    media: Path, toy: Path, hanging: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 4):
        write_video(media / f"hang_{number}.mp4", num_frames=8)
    recipe = recipe_of([f"hang_{number}.mp4" for number in range(4)], media, toy, reader=hanging)
    options = (f"run.dataloader_num_workers={workers}", "run.media_seconds=0.05")
    assert main(["train", "--cfg-path", str(recipe), "--options", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"error: {media}/hang_\d.mp4: 8 media could not be read within 0.05 s each, and their reading has not ended "
        "yet: the storage hangs; check it, then run the same command again, or raise run.media_seconds",
        error,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_many_hanging_readings_stop_an_evaluation(
    tmp_path: Path, hanging: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_set(tmp_path / "set", num_videos=9, num_questions=1)
    limits = ("--media-seconds", "0.05", "--num-workers", str(workers))
    assert evaluate(data, tmp_path / "out", *limits, "--options", f"evaluation.reader={hanging}") == 1
    assert "8 media could not be read within 0.05 s each" in capsys.readouterr().err.splitlines()[-1]
    lines = (tmp_path / "out" / "msvd.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"] is None for line in lines] == [False] * 7  # what was found out is kept


def test_extraction_leaves_out_a_slow_medium(media: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = write_slow_gif(media / "slow.gif")
    recipe = recipe_of(["good_0.mp4", "good_1.mp4", "slow.gif"], media, toy)
    words = ["extract", "--cfg-path", str(recipe), "--output", str(media.parent / "features"), "--num-workers", "1"]
    assert main([*words, "--media-seconds", str(SECONDS), "--options", "model.freeze_vit=True"]) == 0
    printed = capsys.readouterr()
    assert f"{slow}: {GIVEN_UP}--media-seconds" in printed.err
    assert re.search(r"[12] could not be read and were left out", printed.out)


def test_evaluation_records_a_failure_and_its_decoding_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(picture_readers, "to_rgb", shown.append)
    data = write_set(tmp_path / "set", num_videos=2, num_questions=1)
    slow = write_slow_gif(data / "videos" / "vid1.mp4")
    # of one frame the 150th
    assert evaluate(data, tmp_path / "out", "--num-frames", "1", "--media-seconds", str(SECONDS)) == 0
    lines = (tmp_path / "out" / "msvd.jsonl").read_text().splitlines()
    errors = {record["video"]: record["error"] for record in map(json.loads, lines)}
    assert errors == {"vid0.mp4": None, "vid1.mp4": f"{slow}: {GIVEN_UP}--media-seconds"}
    for thread in threading.enumerate():
        if thread.name == "reading":
            thread.join()
    assert not shown  # the frames between were not decoded


def test_the_doctor_names_a_slow_medium(media: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_slow_gif(media / "slow.gif")
    recipe = recipe_of(["good_0.mp4", "slow.gif"], media, toy)
    words = ["doctor", "--cfg-path", str(recipe), "--json", "--num-workers", "0", "--decode", "all"]
    assert main([*words, "--media-seconds", str(SECONDS)]) == 1
    faults = {fault["subject"]: fault for fault in json.loads(capsys.readouterr().out)["faults"]}
    assert faults[str(media / "slow.gif")]["kind"] == "unreadable"
    assert faults[str(media / "slow.gif")]["sentence"] == f"{GIVEN_UP}--media-seconds"


@pytest.mark.parametrize("value", ["-1", ".nan", "soon"])
def test_an_invalid_time_limit_is_refused(
    media: Path, toy: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(["good_0.mp4"], media, toy)
    assert main(["train", "--cfg-path", str(recipe), "--options", f"run.media_seconds={value}"]) == 1
    assert "run.media_seconds" in capsys.readouterr().err


def test_a_limit_of_zero_means_no_limit() -> None:
    found = [time_bound.read_within(seconds, threading.current_thread, medium="it", setting="x") for seconds in (0, 9)]
    assert found[0] is threading.current_thread() and found[1] is not found[0]
    with pytest.raises(ZeroDivisionError):
        time_bound.read_within(9, lambda: 1 / 0, medium="it", setting="x")


def test_fetching_a_shard_does_not_count_towards_the_limit() -> None:
    def read() -> int:
        with time_bound.unbounded():
            time.sleep(0.3)
        return 7

    assert time_bound.read_within(0.1, read, medium="it", setting="x") == 7
