"""The interface of all readers of media: a description of the medium, its frames by index, and their times."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from stllm.common.errors import UserError

logger = logging.getLogger(__name__)

Frame = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3) RGB


class MediaError(UserError):
    """A file that cannot be read as asked: names the path first, what was found, what was expected, what to do.

    cause: "missing", "unreadable" or "bounds" (the part asked for lies outside the medium).
    """

    def __init__(self, message: str, *, cause: str = "unreadable") -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class MediaInfo:
    """Description of a medium.

    kind: "video" (a container file), "gif" (any animated picture), "frames" (a folder of pictures) or "image".
    num_frames: frames the medium promises; a file that was cut promises more than can be read.
    fps: average frames a second (1 for an image).
    width, height: pixels as shown, after rotation; of the first frame.
    first_index: the number of the first frame: 0, but 1 for frame folders, whose indices are the file numbers
        themselves: valid indices are first_index .. first_index + num_frames - 1 for every reader.
    """

    kind: str
    num_frames: int
    fps: float
    width: int
    height: int
    first_index: int = 0

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_frames / self.fps


_decoder_options: dict[str, str] = {}  # of FFmpeg's decoders, for every video that is opened


@contextmanager
def limited_pixels(most: int) -> Iterator[None]:
    """Within it, all decoders of this process refuse pictures and frames of more than `most` pixels before decoding.

    Both libraries check every size that they find, in a file's header as well as in later frames' own: Pillow with its
    own global setting, FFmpeg with the decoders' option `max_pixels`. It is for a process that reads strangers' files.
    """
    from PIL import Image

    before, options_before = Image.MAX_IMAGE_PIXELS, decoder_options()
    Image.MAX_IMAGE_PIXELS = most // 2  # Pillow warns above this, and refuses above twice as much
    _decoder_options["max_pixels"] = str(most)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
        _decoder_options.clear()
        _decoder_options.update(options_before)


def decoder_options() -> dict[str, str]:
    """Options with which FFmpeg's decoders are opened."""
    return dict(_decoder_options)


@lru_cache(maxsize=4096)
def warn_once(path: str, what: str) -> None:
    """One note a file and fault, however often the file is read."""
    logger.warning("%s: %s", path, what)


ReaderT = TypeVar("ReaderT", bound="Reader")


class Reader(Protocol):
    """Frames of one medium. Use it as a context manager, or call `close`.

    seconds: (num_frames,) when each frame is shown, after the first one; evenly spaced where a cut file lacks frames.
    """

    path: Path
    info: MediaInfo
    seconds: "np.ndarray[Any, np.dtype[np.float64]]"

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """The frames of those indices, (H, W, 3) uint8 RGB, in the order asked, one at a time; repeats are allowed.

        Ascending indices are the fast way. Raises MediaError for an index outside the medium or a frame that cannot be
        decoded.
        """
        ...

    def times(self, indices: Sequence[int]) -> list[float]:
        """The times of those frames, in seconds after the first frame. Raises MediaError as `frames` does."""
        self.check(indices)
        return [float(self.seconds[index - self.info.first_index]) for index in indices]

    def check(self, indices: Sequence[int]) -> None:
        """Raises MediaError when an index lies outside the medium."""
        first, last = self.info.first_index, self.info.first_index + self.info.num_frames - 1
        for index in indices:
            if not first <= index <= last:
                raise MediaError(
                    f"{self.path}: frame {index} was asked for, but the {self.info.kind} has frames {first} to {last}; "
                    "sample indices by the reader's own info"
                )

    def close(self) -> None:
        """Gives back the file and the decoder, where the reader holds any; calling it twice does no harm."""
        return

    def __enter__(self: ReaderT) -> ReaderT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
