"""`stllm toy`: what it says, what it refuses, and that a world is whole or not there."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.toy import media as toy_media
from stllm.toy import world as toy_world
from stllm.toy.media import write_video
from stllm.toy.world import write_world
from tests.helpers.twins import files

LEAST: dict[str, Any] = {"num_train": 1, "num_test": 1, "seed": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("toy") / "world"
    write_world(target, **LEAST)
    return target


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--output", str(tmp_path / "world"), "--num-train", "6", "--num-test", "4"]) == 0
    captured = capsys.readouterr()
    assert "9 training clips of 9 sets, 6 test clips of 6" in captured.out
    assert f"TOY_ROOT={tmp_path / 'world'} stllm train" in captured.out
    assert captured.err == ""


def test_a_folder_that_holds_files_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(root)
    assert main(["toy", "--output", str(root)]) == 1
    assert f"{root} holds a toy world already, expected a new or an empty folder" in capsys.readouterr().err
    assert main(["toy", "--output", str(root / "vc2"), "--overwrite"]) == 1  # no world: it is nobody's to remove
    assert f"{root / 'vc2'} holds files already, expected a new or an empty folder" in capsys.readouterr().err
    assert files(root) == before


@pytest.mark.parametrize("broken", ["write_shard", "write_qformer_tokenizer"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy_world, broken, full)
    with pytest.raises(UserError, match="no space left on the disk"):
        write_world(tmp_path / "world", num_train=1, num_test=1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(UserError, match="nothing was written"):
        write_world(tmp_path / "world", num_train=10, num_test=4, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_a_world_as_a_whole(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "world"
    shutil.copytree(root, target)
    (target / "notes.txt").write_text("of the old world")
    write_world(target, **LEAST, overwrite=True)
    assert files(target) == files(root)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_world_stays_when_its_replacement_fails(root: Path, monkeypatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    before = files(root)
    monkeypatch.setattr(toy_world, "write_shard", fail)
    with pytest.raises((KeyboardInterrupt, UserError)):
        write_world(root, **{**LEAST, "seed": 1}, overwrite=True)
    assert files(root) == before
    assert list(root.parent.iterdir()) == [root]


def test_what_a_killed_run_left_is_removed_and_a_running_one_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left, busy, other = (
        tmp_path / f".{name}.partial" for name in (f"w.{gone.stdout.strip()}", f"w.{running.pid}", "w.x")
    )
    for folder in (left, busy, other):
        (folder / "vc2").mkdir(parents=True)
    try:
        monkeypatch.setattr(toy_world, "write_language_model", lambda *_: None)
        write_world(tmp_path / "w", **LEAST)
    finally:
        running.communicate(b"\n")
    assert {path.name for path in tmp_path.iterdir()} == {"w", busy.name, other.name}


def test_mpeg4_stands_in_where_pyav_has_no_h264(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    toy_media.encoder.cache_clear()
    caplog.set_level("INFO", logger="stllm")
    clip = np.full((8, 64, 64, 3), (220, 45, 45), np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip, 4)
    toy_media.encoder.cache_clear()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_allclose(pictures, clip, atol=12)
    (note,) = (record.getMessage() for record in caplog.records)
    assert "has no H.264 encoder (libx264): .mp4 files are MPEG-4 instead" in note


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def forbidden(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert main(["toy", "--output", str(tmp_path / "w")]) == 1
    assert f"no permission ({tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--num-train=0", "expected a whole number from 1"),
        ("--num-frames=65", "expected a whole number from 8 to 64"),
        ("--size=63", "expected a whole number from 64 to 112"),
        ("--size=71", "expected an even number"),
    ],
)
def test_sizes_out_of_range(option: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--output", "d", option]) == 2
    assert words in capsys.readouterr().err
