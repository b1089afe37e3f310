"""Choice of the frames of a video to look at: pure functions from counts and seconds to frame indices.

Sources: the frame sampling rules of training, chat and MVBench as published (arXiv 2404.00308 and its protocols);
`tests/golden/sampling.json` holds numbers computed by the published system. Rounding is half to even, as numpy's.

Letters: n frames wanted, N frames in the video; seconds are turned into frame indices by the average frame rate.
"""

import math
import random
from itertools import pairwise

import numpy as np

from stllm.common.errors import UserError, unknown_name

RULES = ("rand", "middle", "fps<x>", "uniform", "segment")
MAX_PARTS = 5  # named in a message
MIN_SEGMENTS, MAX_SEGMENTS = 4, 16  # MVBench's bounds on one frame a second (`segment` with num_frames=0)

Bounds = tuple[float, float]
Generator = np.random.Generator | random.Random


class BoundsError(UserError):
    """A bound in seconds that is empty, lies outside the video or holds no frame of it."""


def rand(num_frames: int, *, total_frames: int, generator: Generator) -> list[int]:
    """One random index in each of n equal intervals (training).

    An interval [start, end) gives an index of [start, end - 1), or its start when that is empty. A video shorter than n
    is padded with its last index, so n indices always come back. Raises UserError when either count is below 1.
    """
    draw = generator.randrange if isinstance(generator, random.Random) else generator.integers
    picked = [int(draw(start, max(start + 1, end - 1))) for start, end in _intervals(num_frames, total_frames)]
    return picked + picked[-1:] * (num_frames - len(picked))


def middle(num_frames: int, *, total_frames: int) -> list[int]:
    """The middle index of each of n equal intervals (training without randomness); padded as in `rand`."""
    picked = [(start + end - 1) // 2 for start, end in _intervals(num_frames, total_frames)]
    return picked + picked[-1:] * (num_frames - len(picked))


def at_rate(rate: float, *, total_frames: int, fps: float, max_num_frames: int = -1) -> list[int]:
    """The frames shown at (k + 1/2) / rate seconds, k = 0, 1, ... (training's `fps<rate>`).

    rate: frames a second to take. max_num_frames: keep only the first ones; 0 or below keeps all.
    A video too short to hold the first of them gives its middle frame, so that a clip is never empty.
    """
    _check_total(total_frames)
    _check_rate(fps, "the video's frame rate")
    _check_rate(rate, "the sampled rate")
    seconds = np.arange(0.5 / rate, total_frames / fps + 0.5 / rate, 1 / rate)
    indices = np.around(seconds * fps).astype(int)
    picked = [int(index) for index in indices if index < total_frames] or [(total_frames - 1) // 2]
    return picked[:max_num_frames] if max_num_frames > 0 else picked


def uniform(num_frames: int, *, total_frames: int) -> list[int]:
    """Middles of n segments of [0, N - 1] (chat, VcgBench, VideoQA); min(n, N) indices, not padded."""
    _check_total(total_frames)
    _check_wanted(num_frames)
    count = min(num_frames, total_frames)
    edges = np.round((total_frames - 1) / count * np.arange(count + 1)).astype(int)
    return [int(index) for index in (edges[:-1] + edges[1:]) // 2]


def segment(
    num_frames: int, *, total_frames: int, fps: float, bounds: Bounds | None = None, first_index: int = 0
) -> list[int]:
    """MVBench's rule: middles of n segments of the bounded part, duplicates allowed.

    num_frames: 0 means one frame a second of the part's length, at least 4 and at most 16 (the published setting).
    bounds: (start, end) in seconds; an end past the video's is cut to it.
    first_index: 1 for frame folders, whose files count from 1: the indices are then file numbers, else 0.
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
        # At the very edge rounding can step outside the video; the published code would then ask for a missing frame.
        first = min(max(first_index, round(start * fps)), final)
        last = max(first, min(round(min(end, total_frames / fps + 1) * fps), final))
        duration = total_frames / fps - start if math.isinf(end) else bounds[1] - bounds[0]
    if num_frames == 0:
        num_frames = int(min(max(duration, MIN_SEGMENTS), MAX_SEGMENTS))
    size = (last - first) / num_frames
    return [int(first + size / 2 + round(size * i)) for i in range(num_frames)]


def bounded(bounds: Bounds, *, total_frames: int, fps: float) -> tuple[int, int]:
    """The frames shown within [start, end) seconds, as (first, count): those i with start*fps <= i < end*fps.

    For training clips: sample `count` frames by any rule and add `first`. An end past the video's is cut to it.
    Raises BoundsError (a UserError) for a bound that is empty, lies outside the video or holds no frame.
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
    """The frames whose own time lies in [start, end), as (first, count); first counts from 0.

    seconds: (N,) when each frame is shown, ascending. duration: of the video, for the message.
    Raises BoundsError for a bound that is empty, lies outside the video or holds no frame: it names the parts that do.
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
    """Frame indices by a rule's name: `rand`, `middle`, `fps<x>` (as `fps0.5`), `uniform` or `segment`.

    num_frames: frames wanted; for `fps<x>` the most to take (0 or below: all), for `segment` 0 means one a second.
    bounds: (start, end) in seconds; `segment` has its own rounding, every other rule sees only `bounded` frames.
    first_index: what a reader calls its first frame (`MediaInfo.first_index`), added to every index.
    generator: the randomness of `rand`, which needs one.
    Returns ascending indices. Raises UserError for an unknown rule, no frames, or a bound outside the video.
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
    """(start, end) of min(n, N) equal intervals of [0, N)."""
    _check_total(total_frames)
    _check_wanted(num_frames)
    edges = [int(edge) for edge in np.linspace(0, total_frames, min(num_frames, total_frames) + 1)]
    return list(pairwise(edges))


def _check_bounds(bounds: Bounds, duration: float) -> Bounds:
    """The bound with its start at 0 at the least; UserError when nothing of the video (in seconds) lies in it."""
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
