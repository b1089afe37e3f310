"""Frame sampling: pure functions that choose the frames of a video by index.

Sources: the published sampling rules of training, chat and MVBench (arXiv 2404.00308 and its protocols);
`tests/golden/sampling.json` holds results of the published code. Halves are rounded to even, as numpy does.

n frames to sample (num_frames), N frames in the video (total_frames). Seconds are converted to indices by the average
frame rate, except in `within`.
"""

import math
import random
from itertools import pairwise

import numpy as np

from stllm.common.errors import UserError, unknown_name

RULES = ("rand", "middle", "fps<x>", "uniform", "segment")
MAX_PARTS = 5  # the most parts of a video that a message names
MIN_SEGMENTS, MAX_SEGMENTS = 4, 16  # MVBench's limits for one frame a second (`segment` with num_frames=0)

Bounds = tuple[float, float]
Generator = np.random.Generator | random.Random


class BoundsError(UserError):
    """Raised if the part between two bounds in seconds is empty, lies outside the video or holds none of its frames."""


def rand(num_frames: int, *, total_frames: int, generator: Generator) -> list[int]:
    """Return one random index of each of n equal intervals (for training).

    The index is drawn from [start, end - 1) of the interval [start, end), or is start if that is empty. If the video
    has fewer than n frames, the last index is repeated, so n indices are returned in any case. Raises UserError if
    either number is below 1.
    """
    draw = generator.randrange if isinstance(generator, random.Random) else generator.integers
    picked = [int(draw(start, max(start + 1, end - 1))) for start, end in _intervals(num_frames, total_frames)]
    return picked + picked[-1:] * (num_frames - len(picked))


def middle(num_frames: int, *, total_frames: int) -> list[int]:
    """Return the middle index of each of n equal intervals (for training without randomness), padded as in `rand`."""
    picked = [(start + end - 1) // 2 for start, end in _intervals(num_frames, total_frames)]
    return picked + picked[-1:] * (num_frames - len(picked))


def at_rate(rate: float, *, total_frames: int, fps: float, max_num_frames: int = -1) -> list[int]:
    """Return the frames shown at (k + 1/2) / rate seconds for k = 0, 1, ... (the rule `fps<rate>` of training).

    rate: frames to sample from each second. max_num_frames: the most frames to return, the first ones (0 or below:
    all). If the video ends before the first of these times, its middle frame is returned.
    """
    _check_total(total_frames)
    _check_rate(fps, "the video's frame rate")
    _check_rate(rate, "the sampled rate")
    seconds = np.arange(0.5 / rate, total_frames / fps + 0.5 / rate, 1 / rate)
    indices = np.around(seconds * fps).astype(int)
    picked = [int(index) for index in indices if index < total_frames] or [(total_frames - 1) // 2]
    return picked[:max_num_frames] if max_num_frames > 0 else picked


def uniform(num_frames: int, *, total_frames: int) -> list[int]:
    """Return the middles of min(n, N) equal segments of [0, N - 1], without padding (for chat, VcgBench, VideoQA)."""
    _check_total(total_frames)
    _check_wanted(num_frames)
    count = min(num_frames, total_frames)
    edges = np.round((total_frames - 1) / count * np.arange(count + 1)).astype(int)
    return [int(index) for index in (edges[:-1] + edges[1:]) // 2]


def segment(
    num_frames: int, *, total_frames: int, fps: float, bounds: Bounds | None = None, first_index: int = 0
) -> list[int]:
    """Return the middles of n equal segments of the bounded part, by MVBench's rule. An index may occur twice.

    num_frames: 0 means one frame a second of the part's length, at least 4 and at most 16 (the published setting).
    bounds: (start, end) in seconds; an end past the video's is cut to it.
    first_index: the index of the first frame: 1 for frame folders, whose indices are the file numbers; otherwise 0.
    Raises UserError for a bound that is empty or lies outside the video.
    """
    _check_total(total_frames)
    _check_rate(fps, "the video's frame rate")
    if num_frames < 0:
        raise UserError(f"num_frames is {num_frames}; expected 0 (one frame a second, 4 to 16) or more")
    final = total_frames - 1 + first_index  # the last valid index: N of the protocol
    first, last, duration = first_index, final, final / fps
    if bounds is not None:
        start, end = _check_bounds(bounds, total_frames / fps)
        # Rounding can give an index just outside the video, for which the published code would fail.
        first = min(max(first_index, round(start * fps)), final)
        last = max(first, min(round(min(end, total_frames / fps + 1) * fps), final))
        duration = total_frames / fps - start if math.isinf(end) else bounds[1] - bounds[0]
    if num_frames == 0:
        num_frames = int(min(max(duration, MIN_SEGMENTS), MAX_SEGMENTS))
    size = (last - first) / num_frames
    return [int(first + size / 2 + round(size * i)) for i in range(num_frames)]


def bounded(bounds: Bounds, *, total_frames: int, fps: float) -> tuple[int, int]:
    """Return (first, count) of the frames i with start*fps <= i < end*fps. An end beyond the video's is allowed.

    To sample from a part of a video, sample from `count` frames by any rule and add `first` to the indices.
    Raises BoundsError (a UserError) if the part is empty, lies outside the video or holds no frame.
    """
    _check_total(total_frames)
    _check_rate(fps, "the video's frame rate")
    start, end = _check_bounds(bounds, total_frames / fps)
    first = math.ceil(start * fps)
    stop = math.ceil(end * fps) if end * fps < total_frames else total_frames
    if stop <= first:
        raise BoundsError(
            f"the bound {_seconds(bounds)} holds no frame of a video of {total_frames} frames at {fps:g} fps; "
            f"expected at least {1 / fps:.3g} s: widen it, or leave this part out"
        )
    return first, stop - first


def within(bounds: Bounds, *, seconds: np.ndarray, duration: float) -> tuple[int, int]:
    """Return (first, count) of the frames that are shown within [start, end) seconds. first counts from 0.

    seconds: (N,), the time at which each frame is shown, ascending. duration: the video's duration in seconds.
    Raises BoundsError if the part is empty, lies outside the video or holds no frame. Its message names parts that have
    frames.
    """
    start, end = _check_bounds(bounds, max(duration, float(seconds[-1])))
    first, stop = (int(place) for place in np.searchsorted(seconds, (start, end)))
    if stop > first:
        return first, stop - first
    gaps = np.diff(seconds)
    splits = np.flatnonzero(gaps >= max(min(end, duration) - start, 2 * float(np.median(gaps)))) if len(gaps) else gaps
    parts = [f"{round(part[0], 3):g} to {round(part[-1], 3):g} s" for part in np.split(seconds, splits.astype(int) + 1)]
    shown = ", ".join(parts[:MAX_PARTS]) + (f" and {len(parts) - MAX_PARTS} more parts" if parts[MAX_PARTS:] else "")
    raise BoundsError(
        f"no frame is shown within {_seconds(bounds)}; the {len(seconds)} frames of the video are at {shown}: "
        "choose a part that holds some of them"
    )


def sample_indices(
    rule: str,
    *,
    num_frames: int,
    total_frames: int,
    fps: float,
    bounds: Bounds | None = None,
    first_index: int = 0,
    generator: Generator | None = None,
) -> list[int]:
    """Return the indices of the frames that a rule chooses, ascending.

    rule: `rand`, `middle`, `fps<x>` (such as `fps0.5`), `uniform` or `segment`: see the functions `rand`, `middle`,
        `at_rate`, `uniform` and `segment`.
    num_frames: the number of frames. For `fps<x>` it is the maximum (0 or below: all); for `segment` 0 means one frame
        a second.
    bounds: the part to sample from, (start, end) in seconds. `segment` rounds by its own rule, the others by `bounded`.
    first_index: the index of the medium's first frame (`MediaInfo.first_index`), added to every index.
    generator: the random generator, which only `rand` needs.
    Raises UserError for an unknown rule, for no frames, and for bounds outside the video.
    """
    if rule == "segment":
        return segment(num_frames, total_frames=total_frames, fps=fps, bounds=bounds, first_index=first_index)
    offset, count = 0, total_frames
    if bounds is not None:
        offset, count = bounded(bounds, total_frames=total_frames, fps=fps)
    if rule == "rand":
        if generator is None:
            raise UserError("sampling 'rand' needs a random generator: pass one, or sample by 'middle'")
        indices = rand(num_frames, total_frames=count, generator=generator)
    elif rule == "middle":
        indices = middle(num_frames, total_frames=count)
    elif rule == "uniform":
        indices = uniform(num_frames, total_frames=count)
    else:
        try:
            rate = float(rule[3:] if rule.startswith("fps") else "")
        except ValueError:
            raise UserError(unknown_name("sampling", rule, RULES)) from None
        indices = at_rate(rate, total_frames=count, fps=fps, max_num_frames=num_frames)
    return [first_index + offset + index for index in indices]


def _intervals(num_frames: int, total_frames: int) -> list[tuple[int, int]]:
    """Return (start, end) of each of min(n, N) equal intervals of [0, N)."""
    _check_total(total_frames)
    _check_wanted(num_frames)
    edges = [int(edge) for edge in np.linspace(0, total_frames, min(num_frames, total_frames) + 1)]
    return list(pairwise(edges))


def _check_bounds(bounds: Bounds, duration: float) -> Bounds:
    """Return the bounds with a start of at least 0. Raises BoundsError if they are empty or outside the video."""
    start, end = bounds
    if math.isnan(start) or math.isnan(end) or end <= start:
        raise BoundsError(f"the bound {_seconds(bounds)} is empty; expected start < end in seconds: correct it")
    if end <= 0 or start >= duration:
        raise BoundsError(
            f"the bound {_seconds(bounds)} lies outside the video, which lasts {duration:.2f} s; "
            f"expected a part of [0, {duration:.2f}] s: correct the bound or the video's name"
        )
    return max(start, 0.0), end


def _seconds(bounds: Bounds) -> str:
    return f"[{bounds[0]:g}, {'end' if math.isinf(bounds[1]) else f'{bounds[1]:g}'}] s"


def _check_total(total_frames: int) -> None:
    if total_frames < 1:
        raise UserError(f"the video has {total_frames} frames; expected at least 1: check that the file is whole")


def _check_wanted(num_frames: int) -> None:
    if num_frames < 1:
        raise UserError(f"num_frames is {num_frames}; expected 1 or more")


def _check_rate(rate: float, what: str) -> None:
    if not (rate > 0 and math.isfinite(rate)):
        raise UserError(f"{what} is {rate}; expected a positive number of frames a second")
