"""Reading with decord or torchcodec by name: the same frames, and PyAV wherever they cannot be trusted."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.media import info as media_info
from stllm.media import libraries
from stllm.media.libraries import DecordReader, LibraryReader, TorchCodecCudaReader, TorchCodecReader
from stllm.media.video import PyAvReader
from tests.helpers.videos import importable, read_code, write_video


@pytest.fixture(autouse=True)
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    media_info.warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def codes(reader: PyAvReader, indices: list[int]) -> list[int]:
    return [read_code(frame) for frame in reader.frames(indices)]


@pytest.mark.parametrize("reader", [DecordReader, TorchCodecReader])
@pytest.mark.parametrize("options", [{"b_frames": 3}, {"rotation": 90}, {"start": 50}])
def test_both_readers_give_the_same_bytes(
    tmp_path: Path, reader: type[LibraryReader], options: dict[str, Any], notes: pytest.LogCaptureFixture
) -> None:
    if not importable(reader.library):
        pytest.skip(f"{reader.library} is not installed")
    video = write_video(tmp_path / "video.mp4", num_frames=60, **options)
    wanted = [40, 3, 3, 59, 0]
    with reader(video) as other, PyAvReader(video) as pyav:
        assert other.info == pyav.info
        assert other.times(wanted) == pyav.times(wanted)
        for found, expected in zip(other.frames(wanted), pyav.frames(wanted), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert other._video is not None
    assert not notes.records


def test_pyav_serves_where_the_size_of_pictures_is_limited(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    """Decord would decode a later frame of any size."""
    pytest.importorskip("decord")
    video = write_video(tmp_path / "video.mp4", num_frames=5)
    with media_info.limited_pixels(64 * 64), DecordReader(video) as reader:
        assert codes(reader, [3]) == [3]
        assert reader._video is None
    assert "PyAV reads it instead" in notes.records[0].message


WRONG_WITH_DECORD: dict[str, dict[str, Any]] = {
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}},
    "b_frames.avi": {"codec": "mpeg4", "b_frames": 2},
    "b_frames.ts": {"b_frames": 3},
    "mirrored.mp4": {"mirrored": True},
}


@pytest.mark.parametrize("kind", WRONG_WITH_DECORD)
def test_pyav_serves_where_decord_is_wrong(tmp_path: Path, kind: str, notes: pytest.LogCaptureFixture) -> None:
    video = write_video(tmp_path / kind, num_frames=60, **WRONG_WITH_DECORD[kind])
    with DecordReader(video) as reader, PyAvReader(video) as pyav:
        for found, expected in zip(reader.frames([34, 10, 23]), pyav.frames([34, 10, 23]), strict=True):
            np.testing.assert_array_equal(found, expected)
    with DecordReader(video):
        pass
    assert [kind in record.message and "PyAV reads it instead" in record.message for record in notes.records] == [True]


def test_pyav_serves_when_decord_is_not_installed(
    tmp_path: Path, notes: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with DecordReader(write_video(tmp_path / "video.mp4")) as reader:
        assert codes(reader, [3, 20]) == [3, 20]
    assert "decord cannot open it" in notes.text


def test_pyav_serves_when_decord_fails_in_the_middle(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    class Failing:
        def __getitem__(self, index: int) -> np.ndarray:
            if index > 5:
                raise RuntimeError("Error sending packet.\nstack")
            return np.zeros((64, 64, 3), np.uint8)

    with DecordReader(write_video(tmp_path / "video.mp4")) as reader:
        reader._video = Failing()
        assert codes(reader, [1, 9, 2]) == [0, 9, 2]
    assert "decord failed at frame 9 (Error sending packet.); PyAV reads it instead" in notes.text


ALL_KINDS: dict[str, dict[str, Any]] = {
    **WRONG_WITH_DECORD,
    "plain.mp4": {},
    "keyframes.mp4": {"gop": 250, "b_frames": 3, "size": (322, 242)},
    "variable.mp4": {"times": [40 * number + number % 3 * 7 for number in range(60)]},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "hevc.mp4": {"codec": "libx265"},
    "program.mpg": {"codec": "mpeg2video"},
    "fragments.mp4": {"b_frames": 3, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
}
BY_PYAV = {"b_frames.avi", "b_frames.ts", "mirrored.mp4", "program.mpg"}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_frame_of_torchcodec_is_pyav_s(tmp_path: Path, kind: str, notes: pytest.LogCaptureFixture) -> None:
    if not importable("torchcodec"):
        pytest.skip("torchcodec is not installed")
    video = write_video(tmp_path / kind, num_frames=60, **ALL_KINDS[kind])
    wanted = [*range(60), *np.random.default_rng(0).integers(0, 60, 30).tolist()]
    with TorchCodecReader(video) as reader, PyAvReader(video) as pyav:
        for found, expected in zip(reader.frames(wanted), pyav.frames(wanted), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert (reader._video is None) == (kind in BY_PYAV)
    assert len(notes.records) == (kind in BY_PYAV)


@pytest.mark.parametrize("name", ["copy.avi", "gap.mp4", "numbered.avi", "pts_is_dts.mkv", "transparent.mov"])
def test_torchcodec_on_media_from_the_field(name: str) -> None:
    """In pts_is_dts.mkv only the times of its frames show that torchcodec gives wrong ones."""
    if not importable("torchcodec"):
        pytest.skip("torchcodec is not installed")
    path = Path(__file__).parent / "cases" / name
    with TorchCodecReader(path) as reader, PyAvReader(path) as pyav:
        every = range(pyav.info.num_frames)
        for found, expected in zip(reader.frames(every), pyav.frames(every), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_without_a_gpu_pyav_reads_for_torchcodec_cuda(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    if not importable("torchcodec") or torch.cuda.is_available():
        pytest.skip("torchcodec is not installed, or there is a GPU")
    with TorchCodecCudaReader(write_video(tmp_path / "video.mp4")) as reader:
        assert codes(reader, [3, 20]) == [3, 20]
    assert "torchcodec cannot open it" in notes.text and "PyAV reads it instead" in notes.text


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'torchcodec'"), RuntimeError("no lib\nmore")])
def test_torchcodec_that_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package or FFmpeg's libraries are missing."""

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] == "torchcodec":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    libraries._torchcodec.cache_clear()
    video = write_video(tmp_path / "video.mp4")
    with pytest.raises(UserError, match=rf"cannot be loaded \({str(error).splitlines()[0]}\): install the torchcodec"):
        TorchCodecReader(video)
    asked = ["chat", "--device", "cpu", "--video", str(video), "--question", "What?", "--reader", "torchcodec"]
    assert main(asked) == 1
    assert "reader torchcodec: the package cannot be loaded" in capsys.readouterr().err
