"""A clip: the frames of a video, gif, frame folder or image, sampled and prepared for the model.

Letters: T frames, S the model's image size.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.media.info import MediaError, MediaInfo, Reader
from stllm.media.open import open_media
from stllm.media.sampling import Bounds, BoundsError, Generator, sample_indices, within
from stllm.media.time_bound import keep_reading
from stllm.media.views import FORWARD, check_view, view_frames, view_order
from stllm.processors.transforms import FrameTransform

__all__ = ["Clip", "MediaError", "MediaInfo", "check_clip", "load_clip"]


@dataclass
class Clip:
    """Prepared frames and where they come from.

    frames: (T, 3, S, S) float32, normalised. indices: as the reader counts. times: seconds after the first frame.
    """

    frames: Tensor
    indices: list[int]
    times: list[float]
    info: MediaInfo
    path: str

    @property
    def digest(self) -> str:
        """A key for the content: equal for equal prepared frames, whatever file they came from (32 hex digits)."""
        frames = self.frames.detach().cpu().contiguous()
        key = hashlib.blake2b(f"{tuple(frames.shape)} {frames.dtype}".encode(), digest_size=16)
        key.update(frames.numpy().data)
        return key.hexdigest()

    def viewed(self, view: str) -> "Clip":
        """The clip, whose frames stand as they were sampled, in that view of views.py."""
        order = view_order(view, len(self.indices))
        return replace(
            self,
            frames=view_frames(view, self.frames),
            indices=[self.indices[place] for place in order],
            times=[self.times[place] for place in order],
        )


def load_clip(
    path: str | Path,
    *,
    num_frames: int,
    sampling: str = "uniform",
    bounds: Bounds | None = None,
    transform: FrameTransform,
    reader: str = "auto",
    fps: float | None = None,
    generator: Generator | None = None,
    view: str = FORWARD,
    own_times: bool = False,
) -> Clip:
    """Opens a medium, samples frames and prepares them one at a time: memory holds one full frame, not T.

    num_frames, sampling, bounds (start and end in seconds), generator: see `sampling.sample_indices`. An image gives
        one frame (T = 1) whatever they are.
    own_times: choose the frames whose own times lie within the bounds, instead of turning bounds into indices by the
        average rate, as training and the benchmarks do. The rule `segment` is a benchmark's and ignores it.
    transform: (H, W, 3) uint8 -> (3, S, S) float32, such as `processors.vision.EvalTransform`.
    reader, fps: see `readers.open_media`.
    view: how the sampled frames are shown, of views.py; indices and times follow.
    Raises MediaError, naming the path, for a file that cannot be read or a bound outside the video.
    """
    check_view(view)
    with open_media(path, reader=reader, fps=fps) as medium:
        indices = _sample(medium, path, sampling, num_frames, bounds, generator, own_times)
        times = medium.times(indices)
        frames = _prepare(medium.frames(indices), len(indices), transform)
        return Clip(frames, indices, times, medium.info, str(path)).viewed(view)


def check_clip(
    path: str | Path,
    *,
    num_frames: int,
    sampling: str = "uniform",
    bounds: Bounds | None = None,
    reader: str = "auto",
    fps: float | None = None,
    own_times: bool = False,
) -> None:
    """Raises what `load_clip` would raise, as far as it shows without decoding the frames; arguments as there."""
    with open_media(path, reader=reader, fps=fps) as medium:
        medium.times(_sample(medium, path, sampling, num_frames, bounds, None, own_times))


def _sample(
    medium: Reader,
    path: str | Path,
    sampling: str,
    num_frames: int,
    bounds: Bounds | None,
    generator: Generator | None,
    own_times: bool,
) -> list[int]:
    """The indices of a clip's frames, as the reader counts; an error names the path."""
    info = medium.info
    if info.kind == "image":
        return [info.first_index]
    first, count = 0, info.num_frames
    try:
        if bounds is not None and own_times and sampling != "segment":
            first, count = within(bounds, seconds=medium.seconds, duration=info.duration)
            bounds = None
        return sample_indices(
            sampling,
            num_frames=num_frames,
            total_frames=count,
            fps=info.fps,
            bounds=bounds,
            first_index=info.first_index + first,
            generator=generator,
        )
    except UserError as error:
        cause = "bounds" if isinstance(error, BoundsError) else "unreadable"
        raise MediaError(f"{path}: {error}", cause=cause) from None


def _prepare(frames: Iterator[np.ndarray], count: int, transform: FrameTransform) -> Tensor:
    """`count` frames through the transform into one tensor, (T, 3, S, S)."""
    prepared = np.empty(0, np.float32)  # filled by numpy: torch's copy would start threads for every frame
    for position, frame in enumerate(frames):
        keep_reading()
        pixels = transform(frame).numpy()
        if position == 0:
            prepared = np.empty((count, *pixels.shape), pixels.dtype)
        prepared[position] = pixels
    return torch.from_numpy(prepared)
