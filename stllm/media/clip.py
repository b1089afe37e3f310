"""`Media`, a file on disk and what to read of it, and `Clip`, its frames, sampled and prepared for a model.

Letters in shapes: T frames, S the model's image size, H and W the height and width of a frame in the file.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.media.info import MediaError, MediaInfo, Member, Reader
from stllm.media.open import open_media
from stllm.media.sampling import Bounds, BoundsError, Generator, sample_indices, within
from stllm.media.time_bound import keep_reading
from stllm.media.views import FORWARD, check_view, view_frames, view_order
from stllm.processors.transforms import FrameTransform

__all__ = ["Clip", "Media", "MediaError", "MediaInfo", "Stamp", "load_clip"]

Stamp = tuple[Any, ...]  # identifies a medium and the current state of its file


@dataclass(frozen=True)
class Media:
    """A video, gif, frame folder or image on disk or inside another file, and the part of it to read.

    num_frames: frames to sample, see `sampling.sample_indices` (None: the model's default). An image always gives one.
    start, end: seconds (None: the beginning, the end). sampling: a rule of sampling.py.
    reader, fps: see `open_media`. view: a view of views.py, which changes the order or the content of the sampled
        frames.
    own_times: compare start and end with the times at which the frames are shown. False: convert start and end into
        frame numbers by the average frame rate, as training and the benchmarks do; the rule `segment` always does.
    member: the place of the medium inside another file, such as a tar; `path` is then only its name in error messages.
    """

    path: str
    num_frames: int | None = None
    start: float | None = None
    end: float | None = None
    sampling: str = "uniform"
    reader: str = "auto"
    fps: float | None = None
    view: str = FORWARD
    own_times: bool = True
    member: Member | None = None

    def __post_init__(self) -> None:
        """Raise UserError for an unknown view, and for an empty path, which would be read as the current folder."""
        check_view(self.view)
        if not self.path.strip():
            raise UserError("the path of the video is empty: name a file or a folder of frames")

    @property
    def bounds(self) -> Bounds | None:
        """(start, end) in seconds, or None for the whole medium."""
        if self.start is None and self.end is None:
            return None
        return self.start or 0.0, float("inf") if self.end is None else self.end

    def check(self) -> None:
        """Raise the errors of `load_clip` that can be found without decoding the frames."""
        with open_media(self.member or self.path, reader=self.reader, fps=self.fps) as medium:
            medium.times(_sample(self, medium, 1))

    def stamp(self) -> Stamp:
        """Return a key that changes when the files change. It contains their names, sizes and modification times."""
        path, marks = user_path(self.path), []
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            with suppress(OSError, ValueError):  # missing, a dead link, or not a path: reading it reports the fault
                stat = file.stat()
                marks.append((file.name, stat.st_size, stat.st_mtime_ns))
        return self, tuple(marks)


@dataclass
class Clip:
    """The prepared frames of a medium.

    frames: (T, 3, S, S) uint8. indices: their numbers in the file, see `MediaInfo.first_index`. times: seconds from the
    file's first frame to each of them. info: what the reader knows about the file. path: path of the file.
    """

    frames: Tensor
    indices: list[int]
    times: list[float]
    info: MediaInfo
    path: str

    @property
    def digest(self) -> str:
        """A digest of the prepared frames, 32 hex digits. Equal frames from different files have the same digest."""
        frames = self.frames.detach().cpu().contiguous()
        key = hashlib.blake2b(f"{tuple(frames.shape)} {frames.dtype}".encode(), digest_size=16)
        key.update(frames.numpy().data)
        return key.hexdigest()

    def viewed(self, view: str) -> "Clip":
        """Return this clip in a view of views.py. Must be called on a clip in its original order."""
        order = view_order(view, len(self.indices))
        return replace(
            self,
            frames=view_frames(view, self.frames),
            indices=[self.indices[place] for place in order],
            times=[self.times[place] for place in order],
        )


def load_clip(
    media: Media, transform: FrameTransform, *, num_frames: int = 1, generator: Generator | None = None
) -> Clip:
    """Open a medium, sample its frames and prepare them. Only one full-size frame is in memory at a time.

    transform: (H, W, 3) uint8 -> (3, S, S) uint8, such as `processors.transforms.EvalTransform`.
    num_frames: used if `media.num_frames` is None. generator: random generator for the sampling rule `rand`.
    Raises MediaError, which names the path, if the file cannot be read or if start and end lie outside the video.
    """
    with open_media(media.member or media.path, reader=media.reader, fps=media.fps) as medium:
        indices = _sample(media, medium, num_frames, generator)
        times = medium.times(indices)
        prepared = np.empty(0, np.float32)  # numpy, because torch's copy would start threads for every frame
        for place, frame in enumerate(medium.frames(indices)):
            keep_reading()
            pixels = transform(frame).numpy()
            if place == 0:
                prepared = np.empty((len(indices), *pixels.shape), pixels.dtype)
            prepared[place] = pixels
        return Clip(torch.from_numpy(prepared), indices, times, medium.info, media.path).viewed(media.view)


def _sample(media: Media, medium: Reader, num_frames: int, generator: Generator | None = None) -> list[int]:
    """Return the numbers of the frames to read. Raises MediaError, which names the path."""
    info = medium.info
    if info.kind == "image":
        return [info.first_index]
    first, count, bounds = 0, info.num_frames, media.bounds
    try:
        if bounds is not None and media.own_times and media.sampling != "segment":
            first, count = within(bounds, seconds=medium.seconds, duration=info.duration)
            bounds = None
        return sample_indices(
            media.sampling,
            num_frames=num_frames if media.num_frames is None else media.num_frames,
            total_frames=count,
            fps=info.fps,
            bounds=bounds,
            first_index=info.first_index + first,
            generator=generator,
        )
    except UserError as error:
        cause = "bounds" if isinstance(error, BoundsError) else "unreadable"
        raise MediaError(f"{media.path}: {error}", cause=cause) from None
