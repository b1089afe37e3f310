"""The reader decord: it gives the frames of PyAV, and PyAV replaces it where it would be wrong."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stllm.media import info as media_info
from stllm.media.video import DecordReader, PyAvReader
from tests.helpers.videos import read_code, write_video


@pytest.fixture(autouse=True)
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    media_info.warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def codes(reader: DecordReader, indices: list[int]) -> list[int]:
    return [read_code(frame) for frame in reader.frames(indices)]


@pytest.mark.parametrize("options", [{"b_frames": 3}, {"rotation": 90}, {"start": 50}])
def test_both_readers_give_the_same_bytes(
    tmp_path: Path, options: dict[str, Any], notes: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("decord")
    video = write_video(tmp_path / "video.mp4", num_frames=60, **options)
    wanted = [40, 3, 3, 59, 0]
    with DecordReader(video) as decord, PyAvReader(video) as pyav:
        assert decord.info == pyav.info
        assert decord.times(wanted) == pyav.times(wanted)
        for found, expected in zip(decord.frames(wanted), pyav.frames(wanted), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert not notes.records


def test_pyav_replaces_decord_if_the_size_of_pictures_is_limited(
    tmp_path: Path, notes: pytest.LogCaptureFixture
) -> None:
    """Decord would also decode a later frame of any size."""
    pytest.importorskip("decord")
    video = write_video(tmp_path / "video.mp4", num_frames=5)
    with media_info.limited_pixels(64 * 64), DecordReader(video) as reader:
        assert codes(reader, [3]) == [3]
        assert reader._decord is None
    assert "PyAV reads it instead" in notes.records[0].message


WRONG_WITH_DECORD: dict[str, dict[str, Any]] = {
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}},
    "b_frames.avi": {"codec": "mpeg4", "b_frames": 2},
    "b_frames.ts": {"b_frames": 3},
    "mirrored.mp4": {"mirrored": True},
}


@pytest.mark.parametrize("kind", WRONG_WITH_DECORD)
def test_pyav_replaces_decord_on_files_that_decord_reads_wrongly(
    tmp_path: Path, kind: str, notes: pytest.LogCaptureFixture
) -> None:
    video = write_video(tmp_path / kind, num_frames=60, **WRONG_WITH_DECORD[kind])
    with DecordReader(video) as reader, PyAvReader(video) as pyav:
        for found, expected in zip(reader.frames([34, 10, 23]), pyav.frames([34, 10, 23]), strict=True):
            np.testing.assert_array_equal(found, expected)
    with DecordReader(video):
        pass
    assert [kind in record.message and "PyAV reads it instead" in record.message for record in notes.records] == [True]


def test_pyav_replaces_decord_if_it_is_not_installed(
    tmp_path: Path, notes: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with DecordReader(write_video(tmp_path / "video.mp4")) as reader:
        assert codes(reader, [3, 20]) == [3, 20]
    assert "decord cannot open it" in notes.text


def test_pyav_replaces_decord_if_it_fails_while_reading(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    class Failing:
        def __getitem__(self, index: int) -> np.ndarray:
            if index > 5:
                raise RuntimeError("Error sending packet.\nstack")
            return np.zeros((64, 64, 3), np.uint8)

    with DecordReader(write_video(tmp_path / "video.mp4")) as reader:
        reader._decord = Failing()
        assert codes(reader, [1, 9, 2]) == [0, 9, 2]
    assert "decord failed at frame 9 (Error sending packet.); PyAV reads it instead" in notes.text
