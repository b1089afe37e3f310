"""Scenes of the toy world: the contents of a clip and its events, as data, and their frames, drawn with numpy.

A new color, shape or background is one entry of a table; a new kind of event is one case of `follow`.
T frames, S pixels a side.
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
    """An action of a thing between two times, which are parts of the clip from 0 to 1. kind: a case of `follow`.

    value: the direction of a move, the new color of a turn. extent: the distance, in STEPs or HOPs.
    """

    kind: str
    start: float
    end: float
    value: str = ""
    extent: float = 1.0


@dataclass(frozen=True)
class Thing:
    """A colored shape at (x, y), the middle of its path if it moves."""

    color: str
    shape: str
    x: int
    y: int
    radius: int
    events: tuple[Event, ...] = ()

    @property
    def name(self) -> str:
        """Its name in texts: "red circle"."""
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
    """A change of background. time: a part of the clip."""

    time: float
    background: Background


@dataclass(frozen=True)
class Scene:
    """Everything in a clip except for its noise. Later things cover earlier ones."""

    things: tuple[Thing, ...]
    background: Background
    cut: Cut | None = None

    def digest(self) -> int:
        """A number that depends on the whole scene and on nothing else, the same on every machine."""
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
    """Times of a clip's frames, (T,), parts of the clip."""
    return (np.arange(num_frames) + 0.5) / num_frames


def follow(thing: Thing, times: np.ndarray) -> Track:
    """Place and look of the thing at each time. times: (T,), parts of the clip."""
    count = len(times)
    track = Track(
        x=np.full(count, float(thing.x)),
        y=np.full(count, float(thing.y)),
        radius=np.full(count, float(thing.radius)),
        opacity=np.ones(count),
        color=np.tile(np.array(COLORS[thing.color], float), (count, 1)),
    )
    for event in thing.events:
        progress = np.clip((times - event.start) / (event.end - event.start), 0, 1)  # 0 before the event, 1 after it
        swing = np.sin(np.pi * progress)  # there and back
        during = (progress > 0) & (progress < 1)
        match event.kind:
            case "move":
                right, down = DIRECTIONS[event.value]
                way = event.extent * STEP * (progress - 0.5)  # the middle frame does not show the direction
                track.x += right * way
                track.y += down * way
            case "jump":
                track.y -= event.extent * HOP * swing
            case "step aside":
                track.x += event.extent * HOP * swing
            case "grow":
                track.radius *= 1 + SWELLING * swing
            case "vanish":
                track.opacity *= 1 - np.minimum(1, 1.5 * swing)
            case "turn":
                track.color += progress[:, None] * (np.array(COLORS[event.value], float) - track.color)
            case "appear":
                track.opacity *= progress
            case "disappear":
                track.opacity *= 1 - progress
            case "blink":
                track.opacity *= ~during
            case "flash":
                track.opacity *= during
            case _:
                raise ValueError(f"unknown kind of event {event.kind!r}")
    return track


def nearest_colors(levels: np.ndarray) -> np.ndarray:
    """Numbers of COLOR_NAMES, (T,). levels: (T, 3), of 255."""
    distances: np.ndarray = np.abs(levels[:, None] - LEVELS).sum(-1)  # (T, colors)
    return distances.argmin(-1)


Function = Callable[[np.ndarray, np.ndarray], np.ndarray]

# x, y: radii from the middle. Below 1 lies inside the shape, 1 at its edge.
SHAPES: dict[str, Function] = {
    "circle": np.hypot,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) / 0.85,
    "triangle": lambda x, y: np.maximum(y, np.abs(x) * 0.866 - y * 0.5) / 0.55,
    "cross": lambda x, y: np.maximum(np.minimum(np.abs(x), np.abs(y)) / 0.33, np.maximum(np.abs(x), np.abs(y))),
}

# x along the pattern, y across it, in parts of the picture. From -1, dark, to 1.
PATTERNS: dict[str, Function] = {
    "plain": lambda x, y: 0 * (x + y),
    "striped": lambda x, y: np.sin(30 * (x + 0 * y)),
    "checked": lambda x, y: np.sign(np.sin(20 * x) * np.sin(20 * y)),
    "wavy": lambda x, y: np.sin(16 * x + 2 * np.sin(12 * y)),
    "shaded": lambda x, y: 2.2 * (x + 0 * y),
}


def render(scene: Scene, *, times: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """The frames at these times, (T, S, S, 3) uint8 RGB. times: (T,), parts of the clip. generator: draws the noise."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (UNITS / size)  # the pixels' places in units
    clip = generator.standard_normal((len(times), size, size, 3), np.float32) * np.float32(FLICKER)
    grain = generator.standard_normal((size, size, 3), np.float32) * np.float32(GRAIN)
    canvas = np.empty_like(clip)
    canvas[:] = _background(scene.background, axis)
    if scene.cut is not None:
        canvas[times >= scene.cut.time] = _background(scene.cut.background, axis)
    for thing in scene.things:
        track = follow(thing, times)
        # only pixels that the thing ever reaches, and two more for soft edges; a triangle's tip is 1.1 radii away
        reach = 1.1 * track.radius + 2 * (axis[1] - axis[0])
        rows, columns = (
            slice(*map(int, np.searchsorted(axis, ((middle - reach).min(), (middle + reach).max()))))
            for middle in (track.y, track.x)
        )
        middle_x, middle_y, radius, opacity = (
            values.astype(np.float32)[:, None, None] for values in (track.x, track.y, track.radius, track.opacity)
        )
        x = (axis[columns][None, None, :] - middle_x) / radius  # (T, 1, columns)
        y = (axis[rows][None, :, None] - middle_y) / radius  # (T, rows, 1)
        pixels = radius * np.float32(size / UNITS)
        alpha = np.clip((1 - SHAPES[thing.shape](x, y)) * pixels + 0.5, 0, 1) * opacity  # edges soft over one pixel
        part = canvas[:, rows, columns]
        part += alpha[..., None] * (track.color[:, None, None, :].astype(np.float32) - part)
    clip += canvas
    clip += grain
    np.clip(np.rint(clip, out=clip), 0, 255, out=clip)
    return clip.astype(np.uint8)


def _background(background: Background, axis: np.ndarray) -> np.ndarray:
    """(S, S, 3), levels of 255."""
    angle = np.float32(np.deg2rad(background.angle))
    across, down = axis[None, :] / UNITS - 0.5, axis[:, None] / UNITS - 0.5
    x = across * np.cos(angle) + down * np.sin(angle)
    y = down * np.cos(angle) - across * np.sin(angle)
    pattern = np.float32(TEXTURE) * PATTERNS[background.pattern](x, y).astype(np.float32)
    return (pattern + background.shade)[:, :, None] + np.array(background.tint, np.float32)
