"""Scenes of the toy world: what is in a clip and what happens when, as data; and their pictures, by numpy alone.

A new shape, colour, background or kind of event is one entry of a table here.

Letters: T frames, S pixels a side.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNITS = 64  # places and sizes are whole 64ths of the picture's side, from its upper left corner
STEP = 28.0  # units: how far a thing moves
HOP = 16.0  # units: how far it jumps or steps aside
SWELLING = 0.8  # how much of its radius it gains
TEXTURE = 22.0  # levels of 255: half the contrast of a background's pattern
GRAIN, FLICKER = 7.0, 4.0  # levels of 255: noise of the whole clip, noise of each frame

COLORS = {
    "red": (220, 45, 45),
    "green": (45, 185, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (170, 55, 200),
    "white": (245, 245, 245),
}
COLOR_NAMES, LEVELS = tuple(COLORS), np.array(list(COLORS.values()), float)  # levels: (colors, 3)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Event:
    """What a thing does between two times. kind: a key of EVENTS; start, end: parts of the clip, from 0 to 1.

    value: the direction of a move, the new colour of a change. extent: how far it goes, in STEPs or HOPs.
    """

    kind: str
    start: float
    end: float
    value: str = ""
    extent: float = 1.0


@dataclass(frozen=True)
class Thing:
    """A coloured shape at (x, y), the middle of its path if it moves."""

    color: str
    shape: str
    x: int
    y: int
    radius: int
    events: tuple[Event, ...] = ()

    @property
    def name(self) -> str:
        """As texts call it: "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Background:
    """pattern: a key of PATTERNS; shade: its middle level of 255; angle: of the pattern, in degrees.

    tint: what is added to red, green and blue, in levels.
    """

    pattern: str
    shade: int
    angle: int
    tint: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Cut:
    """Another background from a time on, a part of the clip."""

    time: float
    background: Background


@dataclass(frozen=True)
class Scene:
    """Everything in a clip except for its noise. Later things cover earlier ones."""

    things: tuple[Thing, ...]
    background: Background
    cut: Cut | None = None

    def digest(self) -> int:
        """A number that depends on all of the scene and on nothing else, the same on every machine."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:8], "big")


@dataclass
class Track:
    """A thing over the frames: x, y, radius (units) and opacity, each (T,); color (T, 3), levels of 255."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    opacity: np.ndarray
    color: np.ndarray


def frame_times(num_frames: int) -> np.ndarray:
    """When the frames of a clip are, (T,), parts of the clip."""
    return (np.arange(num_frames) + 0.5) / num_frames


def render(scene: Scene, *, times: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """The frames at these times, (T, S, S, 3) uint8 RGB. times: (T,), parts of the clip. generator: draws the noise."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (UNITS / size)
    clip = generator.standard_normal((len(times), size, size, 3), np.float32) * np.float32(FLICKER)
    grain = generator.standard_normal((size, size, 3), np.float32) * np.float32(GRAIN)
    canvas = np.empty_like(clip)
    canvas[:] = _backdrop(scene, times, axis)
    for thing in scene.things:
        track = follow(thing, times)
        rows, columns = _span(track.y, track, axis), _span(track.x, track, axis)
        alpha = _coverage(thing.shape, track, axis[rows], axis[columns], size)[..., None]  # (T, rows, columns, 1)
        part = canvas[:, rows, columns]
        part += alpha * (track.color[:, None, None, :].astype(np.float32) - part)
    clip += canvas
    clip += grain
    np.clip(np.rint(clip, out=clip), 0, 255, out=clip)
    return clip.astype(np.uint8)


def follow(thing: Thing, times: np.ndarray) -> Track:
    """Where and how the thing is at each time. times: (T,), parts of the clip."""
    count = len(times)
    track = Track(
        x=np.full(count, float(thing.x)),
        y=np.full(count, float(thing.y)),
        radius=np.full(count, float(thing.radius)),
        opacity=np.ones(count),
        color=np.tile(np.array(COLORS[thing.color], float), (count, 1)),
    )
    for event in thing.events:
        progress = np.clip((times - event.start) / (event.end - event.start), 0, 1)
        EVENTS[event.kind](track, progress, event)
    return track


def nearest_colors(levels: np.ndarray) -> np.ndarray:
    """Numbers of COLOR_NAMES, (T,). levels: (T, 3), of 255."""
    distances: np.ndarray = np.abs(levels[:, None] - LEVELS).sum(-1)  # (T, colors)
    return distances.argmin(-1)


# ---- events: each changes the track in place. progress: (T,), 0 before the event, 1 after it ------------------------


def _move(track: Track, progress: np.ndarray, event: Event) -> None:
    right, down = DIRECTIONS[event.value]
    way = event.extent * STEP * (progress - 0.5)  # the middle frame tells nothing of the direction
    track.x += right * way
    track.y += down * way


def _jump(track: Track, progress: np.ndarray, event: Event) -> None:
    track.y -= event.extent * HOP * np.sin(np.pi * progress)


def _step_aside(track: Track, progress: np.ndarray, event: Event) -> None:
    track.x += event.extent * HOP * np.sin(np.pi * progress)


def _grow(track: Track, progress: np.ndarray, event: Event) -> None:
    track.radius *= 1 + SWELLING * np.sin(np.pi * progress)


def _vanish(track: Track, progress: np.ndarray, event: Event) -> None:
    track.opacity *= 1 - np.minimum(1, 1.5 * np.sin(np.pi * progress))


def _turn(track: Track, progress: np.ndarray, event: Event) -> None:
    track.color += progress[:, None] * (np.array(COLORS[event.value], float) - track.color)


def _appear(track: Track, progress: np.ndarray, event: Event) -> None:
    track.opacity *= progress


def _disappear(track: Track, progress: np.ndarray, event: Event) -> None:
    track.opacity *= 1 - progress


def _blink(track: Track, progress: np.ndarray, event: Event) -> None:
    track.opacity *= ~_during(progress)


def _flash(track: Track, progress: np.ndarray, event: Event) -> None:
    track.opacity *= _during(progress)


def _during(progress: np.ndarray) -> np.ndarray:
    return (progress > 0) & (progress < 1)


EVENTS: dict[str, Callable[[Track, np.ndarray, Event], None]] = {
    "move": _move,
    "jump": _jump,
    "step aside": _step_aside,
    "grow": _grow,
    "vanish": _vanish,
    "turn": _turn,
    "appear": _appear,
    "disappear": _disappear,
    "blink": _blink,
    "flash": _flash,
}


# ---- shapes: x, y in radii from the middle; below 1 inside, 1 at the edge -------------------------------------------


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) / 0.85


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y, np.abs(x) * 0.866 - y * 0.5) / 0.55


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.maximum(across / 0.33, along)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def _span(places: np.ndarray, track: Track, axis: np.ndarray) -> slice:
    """The pixels along one axis that the thing ever reaches, with two to spare for soft edges."""
    reach = 1.1 * track.radius + 2 * (axis[1] - axis[0])  # a triangle's tip is 1.1 radii away
    first, last = np.searchsorted(axis, ((places - reach).min(), (places + reach).max()))
    return slice(int(first), int(last))


def _coverage(shape: str, track: Track, rows: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """How much of each pixel the thing covers, (T, rows, columns), its edge softened over one pixel.

    rows, columns: the pixels' places in units.
    """
    radius = track.radius.astype(np.float32)[:, None, None]
    x = (columns[None, None, :] - track.x.astype(np.float32)[:, None, None]) / radius  # (T, 1, columns)
    y = (rows[None, :, None] - track.y.astype(np.float32)[:, None, None]) / radius  # (T, rows, 1)
    pixels = radius * np.float32(size / UNITS)
    inside = np.clip((1 - SHAPES[shape](x, y)) * pixels + 0.5, 0, 1)
    return inside * track.opacity.astype(np.float32)[:, None, None]


# ---- backgrounds: x along the pattern, y across it, in parts of the picture; from -1 to 1 ---------------------------

PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda x, y: 0 * (x + y),
    "striped": lambda x, y: np.sin(30 * (x + 0 * y)),
    "checked": lambda x, y: np.sign(np.sin(20 * x) * np.sin(20 * y)),
    "wavy": lambda x, y: np.sin(16 * x + 2 * np.sin(12 * y)),
    "shaded": lambda x, y: 2.2 * (x + 0 * y),
}


def _backdrop(scene: Scene, times: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The background of each frame, (T, S, S, 3), or (1, S, S, 3) where it stays the same."""
    before = _background(scene.background, axis)[None]
    if scene.cut is None:
        return before
    return np.where((times < scene.cut.time)[:, None, None, None], before, _background(scene.cut.background, axis))


def _background(background: Background, axis: np.ndarray) -> np.ndarray:
    """(S, S, 3), levels of 255."""
    angle = np.float32(np.deg2rad(background.angle))
    across, down = axis[None, :] / UNITS - 0.5, axis[:, None] / UNITS - 0.5
    x = across * np.cos(angle) + down * np.sin(angle)
    y = down * np.cos(angle) - across * np.sin(angle)
    pattern = np.float32(TEXTURE) * PATTERNS[background.pattern](x, y).astype(np.float32)
    return (pattern + background.shade)[:, :, None] + np.array(background.tint, np.float32)
