"""Opening media: one function for videos, gifs, images and frame folders, whichever library reads them.

The registry `readers` names the libraries that decode container videos (`pyav`, `decord`, `torchcodec`); pictures are
always read with Pillow. A file is judged by its content, so a wrong extension does no harm.
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

AUTO = "pyav"  # exact on every file tried; the others are not (see libraries.py)


def open_media(path: str | Path | Member, *, reader: str = "auto", fps: float | None = None) -> Reader:
    """A reader for whatever lies at `path`; close it, or use it in a `with`.

    reader: which library decodes container videos: "auto" (pyav), or a name of the registry.
    fps: how fast a frame folder (default 3; 5 for six-digit names) or an animated picture (default 25) plays; not used
        for videos, which hold their frames' times, and images.
    Raises MediaError when nothing there can be read, UserError for an unknown reader.
    """
    now_reading(path)
    path = path if isinstance(path, Member) else user_path(path)
    video_reader = readers.get(AUTO if reader == "auto" else reader)
    if fps is not None and not 0 < fps < float("inf"):
        raise MediaError(f"{path}: fps is {fps}; expected a positive number of frames a second")
    if not isinstance(path, Member) and os.path.isdir(path):  # unlike Path.is_dir, of a name that is too long, too
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
