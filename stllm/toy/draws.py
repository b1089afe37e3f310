"""What scenes are made of, drawn at random: things with their places, backgrounds, times at which something happens."""

from collections.abc import Sequence

from stllm.toy.questions import Generator, pick, shuffled
from stllm.toy.scenes import COLORS, PATTERNS, SHAPES, Background, Cut, Event, Scene, Thing

QUARTERS = ((20, 20), (44, 20), (20, 44), (44, 44))  # of several things, one in each quarter
CORNERS = ((13, 13), (51, 13), (13, 51), (51, 51))  # out of the way of what happens in the middle
SLOTS = 16  # into which a clip is divided for blinks: the frames of a clip of the usual length
HIDDEN = 6  # slots in which something that blinks cannot be seen, however often it blinks


def a_scene(generator: Generator, *things: Thing, cut: Cut | None = None) -> Scene:
    """The things before some background."""
    return Scene(things, a_background(generator, pick(generator, PATTERNS)), cut)


def a_background(generator: Generator, pattern: str) -> Background:
    """Of that pattern, dark enough for every colour to be seen."""
    shade, angle = int(generator.integers(45, 135)), int(generator.integers(180))
    red, green, blue = (int(level) for level in generator.integers(-14, 15, 3))
    return Background(pattern, shade, angle, (red, green, blue))


def a_thing(generator: Generator, *events: Event, color: str | None = None) -> Thing:
    """The thing that a clip is about, near the middle of the picture."""
    x, y = (int(place) for place in generator.integers(28, 37, 2))
    color = color or pick(generator, COLORS)
    return Thing(color, pick(generator, SHAPES), x, y, int(generator.integers(7, 11)), events)


def bystanders(generator: Generator, thing: Thing, *, other_than: Sequence[str] = ()) -> tuple[Thing, ...]:
    """Nobody, or one small thing of another colour and shape in a corner. other_than: colours that it has not."""
    if generator.integers(2):
        return ()
    color = pick(generator, [color for color in COLORS if color not in (thing.color, *other_than)])
    shape = pick(generator, [shape for shape in SHAPES if shape != thing.shape])
    return (Thing(color, shape, *pick(generator, CORNERS), 5),)


def several(
    generator: Generator,
    events: Sequence[tuple[Event, ...]],
    *,
    places: Sequence[tuple[int, int]] = QUARTERS,
    radii: tuple[int, int] = (5, 8),
    colors: Sequence[str] = tuple(COLORS),
) -> tuple[Thing, ...]:
    """One thing for each of the events, at places of their own; colours and shapes are all different.

    radii: the smallest, and the one after the largest.
    """
    hues, shapes, chosen = shuffled(generator, colors), shuffled(generator, SHAPES), shuffled(generator, places)
    things = []
    for color, shape, (x, y), does in zip(hues, shapes, chosen, events, strict=False):  # as many as events
        right, down = (int(way) for way in generator.integers(-3, 4, 2))
        things.append(Thing(color, shape, x + right, y + down, int(generator.integers(*radii)), does))
    return tuple(things)


def a_moment(generator: Generator) -> float:
    """A time near the middle of a clip, as likely before it as after it.

    It never is the middle, so that the middle frame, which begins there, is as likely before that time as after it.
    """
    return pick(generator, (5, 6, 7, 9, 10, 11)) / SLOTS


def turning(generator: Generator, color: str) -> Event:
    """Takes another colour near the middle of the clip."""
    middle = a_moment(generator)
    return Event("turn", middle - 1.5 / 32, middle + 1.5 / 32, color)


def blinks(generator: Generator, count: int) -> tuple[Event, ...]:
    """Hidden `count` times, each for two slots at least.

    Neither how long it is hidden in all, nor whether it is in the middle frame, depends on the count.
    """
    in_the_middle = generator.integers(SLOTS) < HIDDEN
    while True:
        hidden = 2 + generator.multinomial(HIDDEN - 2 * count, [1 / count] * count)
        least = [1, *([2] * (count - 1)), 1]  # slots in which it is seen: before, between, after
        seen = least + generator.multinomial(SLOTS - HIDDEN - sum(least), [1 / (count + 1)] * (count + 1))
        ends = [int(slot) for slot in (seen[:-1] + hidden).cumsum()]
        spans = [(end - int(length), end) for end, length in zip(ends, hidden, strict=True)]
        if in_the_middle == any(start <= SLOTS // 2 < end for start, end in spans):
            return tuple(Event("blink", _between(start), _between(end)) for start, end in spans)


def _between(slot: int) -> float:
    """Where a slot begins, moved aside a little: no frame of a clip of 8, 16, 32 or 64 lies at that time."""
    return slot / SLOTS - 1 / 64 + 1 / 512
