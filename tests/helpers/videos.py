"""Test videos, rendered with PyAV. Each frame carries its number in its pixels, so that tests can recognise it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stllm.media.video import VideoSource

NUM_BITS = 16  # of the number in a frame: a grid of 4 x 4 blocks, white for one
GRID = 4


def importable(package: str) -> bool:
    """Check whether a package, and the libraries that it loads, are there."""
    try:
        import_module(package)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def frame_code(index: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Return a picture that carries `index` (below 65536), (H, W, 3) uint8. size: (width, height)."""
    width, height = size
    bits = np.array([index >> bit & 1 for bit in range(NUM_BITS)], np.uint8).reshape(GRID, GRID)
    rows = np.arange(height) * GRID // height
    columns = np.arange(width) * GRID // width
    return np.repeat(bits[rows][:, columns, None] * np.uint8(255), 3, axis=2)


def read_code(frame: np.ndarray) -> int:
    """Return the number in a decoded frame of any size, (H, W, 3) uint8."""
    height, width = frame.shape[:2]
    rows = (np.arange(GRID) * 2 + 1) * height // (2 * GRID)
    columns = (np.arange(GRID) * 2 + 1) * width // (2 * GRID)
    bits = frame[rows][:, columns].mean(axis=2).reshape(-1) > 127
    return sum(1 << bit for bit in range(NUM_BITS) if bits[bit])


def write_video(
    path: Path | str,
    *,
    num_frames: int = 30,
    fps: int | Fraction = 25,
    size: tuple[int, int] = (64, 64),
    frames: Iterable[np.ndarray] | None = None,
    times: Sequence[int] | None = None,
    start: int = 0,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    gop: int = 12,
    b_frames: int | None = None,
    rotation: float = 0,
    mirrored: bool = False,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a video. The extension determines its format.

    size: (width, height). frames: (H, W, 3) uint8 RGB; default: `frame_code` of 0, 1, ...
    times: presentation times in milliseconds, for a variable frame rate; start: the number of the first one without.
    options: the encoder's. gop: frames from one keyframe to the next. rotation (degrees), mirrored: as a phone notes.
    """
    pictures = frames if frames is not None else (frame_code(index, size) for index in range(num_frames))
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if rotation or mirrored:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a display matrix")
            stream.set_display_rotation(rotation, hflip=mirrored)
        time_base = 1 / Fraction(fps) if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = time_base
        stamps: Iterable[int] = itertools.count(start) if times is None else times
        for picture, stamp in zip(pictures, stamps, strict=False):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def copy_packets(source: Path, path: Path, *, first_keyframe: int = 0) -> Path:
    """Copy the packets to another container, from a keyframe on, as tools do that cut without decoding."""
    with av.open(str(source)) as reading, av.open(str(path), "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        num_keyframes = 0
        for packet in reading.demux(stream):
            num_keyframes += packet.is_keyframe
            if packet.size and num_keyframes > first_keyframe:
                packet.stream = copy
                writing.mux(packet)
    return path


def write_audio(path: Path) -> Path:
    """Write a file with sound but without pictures."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Work:
    """Counts the seeks and the decoded frames of all videos from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_seeks = self.num_decoded = 0
        decode = VideoSource.decode

        def counting(source: VideoSource, key: int | None, **options: Any) -> Iterator[Any]:
            self.num_seeks += key is not None
            for item in decode(source, key, **options):
                self.num_decoded += 1
                yield item

        monkeypatch.setattr(VideoSource, "decode", counting)
