"""Opening of videos, gifs, images and frame folders with one function.

Container videos are decoded by a library of the registry `readers` (`pyav`, `decord`, `torchcodec`); pictures are
always read with Pillow. The kind of a file is detected from its content, not from its extension.
"""

import os
from pathlib import Path

from stllm.common.files import user_path
from stllm.common.registry import readers
from stllm.media.images import GIF_FPS, FrameFolderReader, ImageReader, open_picture
from stllm.media.info import MediaError, Member, Reader, kind_of, read_head
from stllm.media.libraries import DecordReader
from stllm.media.time_bound import now_reading
from stllm.media.video import PyAvReader

__all__ = ["DecordReader", "MediaError", "PyAvReader", "Reader", "open_media"]

AUTO = "pyav"  # the only library that returned correct frames for all test files (see libraries.py)


def open_media(path: str | Path | Member, *, reader: str = "auto", fps: float | None = None) -> Reader:
    """Open a video, gif, image or frame folder. Close the returned reader, or use it in a `with`.

    reader: library for container videos: "auto" (pyav), or a name in the registry.
    fps: frames per second of a frame folder (default 3; 5 for six-digit names) or an animated picture (default 25,
    whatever delays the file contains).
        Videos have their own times, and images have none.
    Raises MediaError if the path cannot be read as a medium, and UserError for an unknown reader.
    """
    now_reading(path)
    path = path if isinstance(path, Member) else user_path(path)
    video_reader = readers.get(AUTO if reader == "auto" else reader)
    if fps is not None and not 0 < fps < float("inf"):
        raise MediaError(f"{path}: fps is {fps}; expected a positive number of frames a second")
    if not isinstance(path, Member) and os.path.isdir(path):  # Path.is_dir raises an error for a name that is too long
        return FrameFolderReader(path, fps=fps)
    if kind_of(read_head(path)) == "picture":
        return open_picture(path, fps=GIF_FPS if fps is None else fps)
    try:
        opened: Reader = video_reader(path)
    except MediaError:
        try:  # some pictures, such as TGA, have no signature
            return ImageReader(path)
        except MediaError:
            pass
        raise
    return opened
