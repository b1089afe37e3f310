"""Files of the toy world: videos of every kind, frame folders, pictures, shards, annotations.

The same input gives the same bytes: encoders run in one thread, and no file contains a time or a random number.
"""

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import av
import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

Encoder = tuple[str, dict[str, str]]
Append = Callable[[str, Mapping[str, Any]], None]  # appends a record to an annotation file

# settings with which shapes of a few pixels keep their colors
H264: Encoder = ("libx264", {"preset": "veryfast", "crf": "18"})
MPEG4: Encoder = ("mpeg4", {"qmin": "2", "qmax": "2"})
VP9: Encoder = ("libvpx-vp9", {"crf": "20", "b": "0"})
ENCODERS: dict[str, Encoder] = {".mp4": H264, ".mov": H264, ".mkv": H264, ".avi": MPEG4, ".webm": VP9}
GIF_DELAY = 40  # milliseconds per frame: 25 frames per second


def write_video(path: Path, clip: np.ndarray, fps: int) -> None:
    """Write a clip, (T, H, W, 3) uint8 RGB. The extension, a key of ENCODERS or .gif (25 fps), selects the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        first, *others = map(Image.fromarray, clip)
        first.save(path, save_all=True, append_images=others, duration=GIF_DELAY, loop=0)
        return
    codec, options = encoder(path.suffix)
    av.logging.set_level(None)  # logging may block the encoding threads, see media/video.py
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options={**options, "threads": "1"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_frames(folder: Path, clip: np.ndarray) -> None:
    """Write a clip, (T, H, W, 3) uint8 RGB, as a folder of pictures 00001.jpg, 00002.jpg, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(clip, start=1):
        Image.fromarray(picture).save(folder / f"{number:05d}.jpg", quality=95)


@contextmanager
def annotation_files(root: Path) -> Iterator[Append]:
    """Yield a function that appends a record to an annotation file below `root`.

    The files are JSON lists with one record per line. They are complete when the block ends.
    """
    files: dict[str, TextIO] = {}

    def append(name: str, record: Mapping[str, Any]) -> None:
        file = files.get(name)
        if file is None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = files[name] = stack.enter_context(path.open("w", encoding="utf-8"))
        file.write((",\n" if file.tell() else "[\n") + json.dumps(record))

    with ExitStack() as stack:
        yield append
        for file in files.values():
            file.write("\n]\n")


def png_bytes(picture: np.ndarray) -> bytes:
    """Encode a picture, (H, W, 3) uint8 RGB, as PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, pairs: Iterable[tuple[str, bytes, str]]) -> None:
    """Write a webdataset shard from (name, PNG, text): a `<name>.png` and a `<name>.txt` for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, picture, text in pairs:
            for ending, content in (("png", picture), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{name}.{ending}")  # no time and owner, so that the bytes are reproducible
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@cache
def encoder(extension: str) -> Encoder:
    """Return codec and options for an extension. If PyAV has no H.264 encoder, use MPEG-4 and log it once."""
    codec, options = ENCODERS[extension]
    if codec != H264[0]:
        return codec, options
    if codec not in av.codecs_available:
        log.info(
            "the installed PyAV %s has no H.264 encoder (libx264): %s files are MPEG-4 instead; "
            "PyAV's own wheels have it (pip install av)",
            av.__version__,
            extension,
        )
        return MPEG4
    # With AVX-512, x264 may encode the same clip to different bytes (observed with PyAV 18.1).
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    has_avx512 = cpuinfo.is_file() and "avx512" in cpuinfo.read_text(errors="replace")
    return codec, options | ({"x264-params": "asm=AVX2"} if has_avx512 else {})
