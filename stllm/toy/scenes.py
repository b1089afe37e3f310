"""Scenes of the toy world: things, events and background of a clip as data, and their frames, drawn with numpy.

To add a color, shape or background, add an entry to a table. To add a kind of event, add a case to `follow`.
Letters: T frames, S height and width in pixels.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNITS = 64  # side of a picture in units; places and sizes are in units, from the upper left corner
STEP = 28.0  # distance of a move, in units
HOP = 16.0  # distance of a jump or a step aside, in units
SWELLING = 0.8  # a growing thing gains this share of its radius
TEXTURE = 22.0  # amplitude of a background's pattern, in levels of 255
GRAIN, FLICKER = 7.0, 4.0  # standard deviation of the noise of a clip and of each frame, in levels of 255

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
    """An action of a thing. kind: a case of `follow`. start, end: times, from 0 to 1 of the clip.

    value: direction of a move, or new color of a turn. extent: distance, in STEPs or HOPs.
    """

    kind: str
    start: float
    end: float
    value: str = ""
    extent: float = 1.0


@dataclass(frozen=True)
class Thing:
    """A colored shape.

    x, y, radius: its center and size, in 64ths of the picture's side. If it moves, (x, y) is the middle of its path.
    """

    color: str
    shape: str
    x: int
    y: int
    radius: int
    events: tuple[Event, ...] = ()

    @property
    def name(self) -> str:
        """The thing's name in texts, such as "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Background:
    """A background. pattern: a key of PATTERNS. shade: mean level of 255. angle: rotation of the pattern in degrees.

    tint: levels that are added to red, green and blue.
    """

    pattern: str
    shade: int
    angle: int
    tint: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Cut:
    """A change of background. time: position in the clip, from 0 to 1."""

    time: float
    background: Background


@dataclass(frozen=True)
class Scene:
    """The contents of a clip without its noise. Later things cover earlier ones."""

    things: tuple[Thing, ...]
    background: Background
    cut: Cut | None = None

    def digest(self) -> int:
        """Return a hash of the scene that is the same on every machine."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:8], "big")


@dataclass
class Track:
    """A thing at each of T times.

    x, y, radius: (T,), in 64ths of the picture's side. opacity: (T,), from 0 to 1. color: (T, 3), RGB from 0 to 255.
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    opacity: np.ndarray
    color: np.ndarray


def frame_times(num_frames: int) -> np.ndarray:
    """Return the times of a clip's frames, (T,), from 0 to 1 of the clip."""
    return (np.arange(num_frames) + 0.5) / num_frames


def follow(thing: Thing, times: np.ndarray) -> Track:
    """Compute the place, size and color of a thing at each time. times: (T,), from 0 to 1 of the clip."""
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
        swing = np.sin(np.pi * progress)  # 0 at both ends of the event, 1 in the middle
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
    """Return the index in COLOR_NAMES of the nearest color, (T,). levels: (T, 3), of 255."""
    distances: np.ndarray = np.abs(levels[:, None] - LEVELS).sum(-1)  # (T, colors)
    return distances.argmin(-1)


Function = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Functions of x and y, in radii from the center. The value is below 1 inside the shape, and 1 at its edge.
SHAPES: dict[str, Function] = {
    "circle": np.hypot,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) / 0.85,
    "triangle": lambda x, y: np.maximum(y, np.abs(x) * 0.866 - y * 0.5) / 0.55,
    "cross": lambda x, y: np.maximum(np.minimum(np.abs(x), np.abs(y)) / 0.33, np.maximum(np.abs(x), np.abs(y))),
}

# Functions of x and y along the pattern's axes, as a share of the picture. The value is from -1 (dark) to 1.
PATTERNS: dict[str, Function] = {
    "plain": lambda x, y: 0 * (x + y),
    "striped": lambda x, y: np.sin(30 * (x + 0 * y)),
    "checked": lambda x, y: np.sign(np.sin(20 * x) * np.sin(20 * y)),
    "wavy": lambda x, y: np.sin(16 * x + 2 * np.sin(12 * y)),
    "shaded": lambda x, y: 2.2 * (x + 0 * y),
}


def render(scene: Scene, *, times: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the frames at these times, (T, S, S, 3) uint8 RGB. times: (T,), from 0 to 1. generator: makes the noise."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (UNITS / size)  # centers of the pixels in units
    clip = generator.standard_normal((len(times), size, size, 3), np.float32) * np.float32(FLICKER)
    grain = generator.standard_normal((size, size, 3), np.float32) * np.float32(GRAIN)
    canvas = np.empty_like(clip)
    canvas[:] = _background(scene.background, axis)
    if scene.cut is not None:
        canvas[times >= scene.cut.time] = _background(scene.cut.background, axis)
    for thing in scene.things:
        track = follow(thing, times)
        # Draw only pixels that the thing reaches, and two more for soft edges. A triangle's tip is 1.1 radii away.
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
    """Draw a background, (S, S, 3), in levels of 255. axis: centers of the pixels in units, (S,)."""
    angle = np.float32(np.deg2rad(background.angle))
    across, down = axis[None, :] / UNITS - 0.5, axis[:, None] / UNITS - 0.5
    x = across * np.cos(angle) + down * np.sin(angle)
    y = down * np.cos(angle) - across * np.sin(angle)
    pattern = np.float32(TEXTURE) * PATTERNS[background.pattern](x, y).astype(np.float32)
    return (pattern + background.shade)[:, :, None] + np.array(background.tint, np.float32)
