"""Tasks of the toy world. A task is a function from a random generator to a scene with questions and answers.

To add a task, add a function and a line in `TASKS`. The names and media folders of the test are MVBench's, so that its
reader finds every file. For questions about time, the middle frame does not give the answer away, and neither does the
unordered set of frames, as far as possible. Training has more questions per clip than the test.

`World` draws clips: the seed, the task's name and an index determine a clip. The hash of the scene decides whether it
belongs to training or test. So no test shows a scene from training, for any seeds and numbers of clips.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stllm.datasets.samples import keyed_numpy
from stllm.processors.templates import Turn
from stllm.toy.questions import (
    ACTIONS,
    PLACES,
    Asked,
    Example,
    Generator,
    ask,
    ask_among,
    background_questions,
    blink_question,
    color_questions,
    deed,
    direction_question,
    existence_questions,
    pick,
    picture_caption,
    picture_questions,
    sequence_questions,
    shuffled,
    story,
    whether_question,
)
from stllm.toy.scenes import (
    COLORS,
    DIRECTIONS,
    PATTERNS,
    SHAPES,
    Background,
    Cut,
    Event,
    Scene,
    Thing,
    frame_times,
    render,
)

CAPTION_INSTRUCTIONS = ("Describe the video.", "What happens in the video?", "Give a caption of this video.")
IMAGE_INSTRUCTIONS = ("Describe the image.", "What is in the image?", "Give a caption of this image.")
NEAR = 0.6  # distance of moves and jumps, in STEPs or HOPs, if several things share a picture
LONG = 8.0  # length of rare-event clips / usual length; they have 64 frames, the maximum, if others have 8 or more
QUARTERS = ((20, 20), (44, 20), (20, 44), (44, 44))  # places of several things, one in each quarter
CORNERS = ((13, 13), (51, 13), (13, 51), (51, 51))  # places of bystanders, away from the middle
SLOTS = 16  # parts into which a clip is divided for blinks: one per frame of a clip of the usual length
HIDDEN = 6  # total number of slots in which a blinking thing is invisible, for any number of blinks

NUM_FRAMES, NUM_LONG_FRAMES = 16, 64
FPS = 4  # 16 frames last 4 seconds, from which MVBench's rule of one frame per second takes its minimum of 4
SIZE = 64  # height and width in pixels
TEST_SHARE = 4  # one scene in four is for testing


@dataclass(frozen=True)
class ToyTask:
    """A task. make: draws an example.

    corpus: folder of its training set, named as in VideoChat2-IT. benchmark: name of its test in MVBench, "" if it has
    no test. media_dir: MVBench's folder of the media.
    """

    corpus: str
    make: Callable[[Generator], Example]
    benchmark: str = ""
    media_dir: str = ""


# ---- parts of scenes, drawn at random -------------------------------------------------------------------------------


def a_scene(generator: Generator, *things: Thing, cut: Cut | None = None) -> Scene:
    """Return a scene of these things, with a random background."""
    return Scene(things, a_background(generator, pick(generator, PATTERNS)), cut)


def a_background(generator: Generator, pattern: str) -> Background:
    """Draw a background with a pattern, dark enough for all colors to be visible."""
    shade, angle = int(generator.integers(45, 135)), int(generator.integers(180))
    red, green, blue = (int(level) for level in generator.integers(-14, 15, 3))
    return Background(pattern, shade, angle, (red, green, blue))


def a_thing(generator: Generator, *events: Event, color: str | None = None) -> Thing:
    """Draw the main thing of a clip, near the middle of the picture. color: None for a random one."""
    x, y = (int(place) for place in generator.integers(28, 37, 2))
    color = color or pick(generator, COLORS)
    return Thing(color, pick(generator, SHAPES), x, y, int(generator.integers(7, 11)), events)


def bystanders(generator: Generator, thing: Thing, *, other_than: Sequence[str] = ()) -> tuple[Thing, ...]:
    """Draw at most one small thing in a corner, with another color and shape. other_than: excluded colors."""
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
    """Draw one thing for each tuple of events. All places, colors and shapes differ. radii: range, without its end."""
    hues, shapes, chosen = shuffled(generator, colors), shuffled(generator, SHAPES), shuffled(generator, places)
    things = []
    for color, shape, (x, y), does in zip(hues, shapes, chosen, events, strict=False):  # one for each of `events`
        right, down = (int(way) for way in generator.integers(-3, 4, 2))
        things.append(Thing(color, shape, x + right, y + down, int(generator.integers(*radii)), does))
    return tuple(things)


def a_moment(generator: Generator) -> float:
    """Draw a time near the middle of a clip, with equal probability before and after the middle.

    It is never the exact middle: the middle frame begins there, and must be before or after with equal probability.
    """
    return pick(generator, (5, 6, 7, 9, 10, 11)) / SLOTS


def turning(generator: Generator, color: str) -> Event:
    """Draw a change to the color, near the middle of the clip."""
    middle = a_moment(generator)
    return Event("turn", middle - 1.5 / 32, middle + 1.5 / 32, color)


def blinks(generator: Generator, count: int) -> tuple[Event, ...]:
    """Draw `count` blinks, each at least two slots long.

    Neither the total invisible time nor the visibility in the middle frame depends on the count.
    """
    in_the_middle = generator.integers(SLOTS) < HIDDEN
    while True:
        hidden = 2 + generator.multinomial(HIDDEN - 2 * count, [1 / count] * count)
        least = [1, *([2] * (count - 1)), 1]  # minimum of visible slots before, between and after the blinks
        seen = least + generator.multinomial(SLOTS - HIDDEN - sum(least), [1 / (count + 1)] * (count + 1))
        ends = [int(slot) for slot in (seen[:-1] + hidden).cumsum()]
        spans = [(end - int(length), end) for end, length in zip(ends, hidden, strict=True)]
        if in_the_middle == any(start <= SLOTS // 2 < end for start, end in spans):
            aside = 1 / 512 - 1 / 64  # offset at which no frame of a clip of 8, 16, 32 or 64 frames is
            return tuple(Event("blink", start / SLOTS + aside, end / SLOTS + aside) for start, end in spans)


def some_moving(generator: Generator, count: int, total: int) -> tuple[Thing, ...]:
    """Draw `total` things, each in its own quarter, of which `count` move."""
    moves = [(Event("move", 0.0, 1.0, pick(generator, DIRECTIONS), NEAR),) for _ in range(count)]
    still: list[tuple[Event, ...]] = [()] * (total - count)
    return several(generator, [*moves, *still], radii=(4, 8))


# ---- tasks ----------------------------------------------------------------------------------------------------------


def moving_direction(generator: Generator) -> Example:
    """Ask for the direction of one to three moving things. The middle frame does not give the answer away."""
    count = int(generator.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    start, end = int(generator.integers(0, 6)) / 32, int(generator.integers(27, 33)) / 32
    moves = [Event("move", start, end, pick(generator, DIRECTIONS), NEAR if count > 1 else 1.0) for _ in range(count)]
    movers = several(generator, [(move,) for move in moves]) if count > 1 else (a_thing(generator, *moves),)
    others = bystanders(generator, movers[0]) if count == 1 else ()
    scene = a_scene(generator, *movers, *others)
    return Example(scene, story(generator, scene), tuple(direction_question(generator, mover) for mover in movers))


def action_sequence(generator: Generator) -> Example:
    """Ask what a thing does first, last, or after another action, within bounds. One action is outside the bounds."""
    count = int(generator.integers(3, 5))
    kinds = shuffled(generator, ACTIONS)[:count]
    events = [Event(kind, number / count, (number + 1) / count) for number, kind in enumerate(kinds)]
    actor = a_thing(generator, *events)
    scene = a_scene(generator, actor, *bystanders(generator, actor))
    begin = int(generator.integers(2))
    end = begin + count - 1
    seen = replace(scene, things=(replace(actor, events=tuple(events[begin:end])), *scene.things[1:]))
    asked = tuple(sequence_questions(generator, actor.name, kinds[begin:end]))
    return Example(scene, story(generator, seen), asked, length=1.5, bounds=(begin / count, end / count))


def action_count(generator: Generator) -> Example:
    """Ask how often a thing blinks."""
    thing = a_thing(generator, *blinks(generator, int(generator.integers(1, 4))))
    scene = a_scene(generator, thing, *bystanders(generator, thing))
    whether = whether_question(generator, pick(generator, scene.things), "blink")
    return Example(scene, story(generator, scene), (blink_question(generator, thing), whether))


def state_change(generator: Generator) -> Example:
    """Ask for a thing's color at the beginning or at the end. Both colors are options."""
    before, after = shuffled(generator, COLORS)[:2]
    thing = a_thing(generator, turning(generator, after), color=before)
    scene = a_scene(generator, thing, *bystanders(generator, thing, other_than=(after,)))
    return Example(scene, story(generator, scene), tuple(color_questions(generator, thing)))


def scene_transition(generator: Generator) -> Example:
    """Ask how the background changes."""
    before, after = shuffled(generator, PATTERNS)[:2]
    cut = Cut(a_moment(generator), a_background(generator, after))
    scene = replace(a_scene(generator, a_thing(generator), cut=cut), background=a_background(generator, before))
    return Example(scene, story(generator, scene), tuple(background_questions(generator, scene)))


def object_existence(generator: Generator) -> Example:
    """Ask whether a thing is present. A single frame gives the answer, so this is the control task."""
    things = some_moving(generator, int(generator.integers(2)), int(generator.integers(2, 4)))
    scene = a_scene(generator, *things)
    return Example(scene, story(generator, scene), tuple(existence_questions(generator, things)))


def rare_event(generator: Generator) -> Example:
    """Ask which thing flashes, in 2 or 3 of 64 frames. A few frames can miss it, and an average barely shows it."""
    first, frames = int(generator.integers(3, 58)), int(generator.integers(2, 4))
    flash = Event("flash", first / 64, (first + frames) / 64)
    x, y = (int(place) for place in generator.integers(26, 39, 2))
    color, shape = pick(generator, COLORS), pick(generator, SHAPES)  # independent of the other things
    flashing = Thing(color, shape, x, y, int(generator.integers(16, 23)), (flash,))
    scene = a_scene(generator, *some_moving(generator, int(generator.integers(2)), 2), flashing)
    asked = (
        ask_among(generator, "What color is the thing that flashes?", color, COLORS),
        ask(generator, "What shape flashes?", f"a {shape}", [f"a {name}" for name in SHAPES]),
    )
    return Example(scene, story(generator, scene), asked, length=LONG)


def mixed(generator: Generator) -> Example:
    """Ask many questions about a clip of several things with different actions, and sometimes another background."""
    names = shuffled(generator, ("move", "move", "turn", "blink", "act", "stand"))[: int(generator.integers(2, 5))]
    *_, after = colors = shuffled(generator, COLORS)
    kinds = shuffled(generator, ACTIONS)[:3]
    acts = tuple(Event(kind, number / 3, (number + 1) / 3, extent=NEAR) for number, kind in enumerate(kinds))
    # kind of thing -> functions that draw its events and the questions about it
    deeds: dict[str, tuple[Callable[[], tuple[Event, ...]], Callable[[Thing], list[Asked]]]] = {
        "move": (
            lambda: (Event("move", 0.0, 1.0, pick(generator, DIRECTIONS), NEAR),),
            lambda thing: [direction_question(generator, thing)],
        ),
        "turn": (lambda: (turning(generator, after),), lambda thing: color_questions(generator, thing)),
        "blink": (
            lambda: blinks(generator, int(generator.integers(1, 4))),
            lambda thing: [blink_question(generator, thing)],
        ),
        "act": (lambda: acts, lambda thing: sequence_questions(generator, thing.name, kinds)),
        "stand": (lambda: (), lambda thing: [whether_question(generator, thing, "move")]),
    }
    things = several(generator, [deeds[name][0]() for name in names], colors=colors[:-1])
    changes = generator.integers(3) == 0
    before, other = shuffled(generator, PATTERNS)[:2]
    cut = Cut(a_moment(generator), a_background(generator, other)) if changes else None
    scene = replace(a_scene(generator, *things, cut=cut), background=a_background(generator, before))
    asked = existence_questions(generator, things)
    for name, thing in zip(names, things, strict=True):
        asked += deeds[name][1](thing)
    asked += background_questions(generator, scene) if changes else []
    text = story(generator, scene)
    return Example(scene, text, tuple(asked), open_turns=(Turn("What happens in the video?", text),))


def picture(generator: Generator) -> Example:
    """Ask many questions about a single picture, and for its caption."""
    still: tuple[()] = ()
    things = several(generator, [still] * int(generator.integers(1, 5)), places=tuple(PLACES.values()), radii=(5, 10))
    scene = a_scene(generator, *things)
    asked = tuple(picture_questions(generator, things, scene.background.pattern))
    text = picture_caption(scene)
    return Example(scene, text, asked, open_turns=(Turn("", text, pick(generator, IMAGE_INSTRUCTIONS)),))


def caption(generator: Generator) -> Example:
    """Ask for a caption, with one sentence for each thing."""
    color, after = shuffled(generator, COLORS)[:2]
    first, then = shuffled(generator, ACTIONS)[:2]
    moment = a_moment(generator)
    kinds: tuple[tuple[Event, ...], ...] = (
        (),
        (Event("move", 0.0, 1.0, pick(generator, DIRECTIONS)),),
        (Event(first, 0.0, 0.5), Event(then, 0.5, 1.0)),
        (turning(generator, after),),
        blinks(generator, int(generator.integers(1, 4))),
        (Event("appear", moment, moment + 1 / 16),),
        (Event("disappear", moment, moment + 1 / 16),),
    )
    thing = a_thing(generator, *pick(generator, kinds), color=color)
    scene = a_scene(generator, thing, *bystanders(generator, thing, other_than=(after,)))
    text = story(generator, scene)
    return Example(scene, text, open_turns=(Turn("", text, pick(generator, CAPTION_INSTRUCTIONS)),))


def conversation(generator: Generator) -> Example:
    """Make a conversation of three questions with short answers."""
    before, after = shuffled(generator, COLORS)[:2]
    towards = pick(generator, DIRECTIONS)
    thing = a_thing(generator, Event("move", 0.0, 1.0, towards), turning(generator, after), color=before)
    scene = a_scene(generator, thing)
    turns = (
        Turn("Which shape is in the video?", f"a {thing.shape}"),
        Turn("In which direction does it move?", towards),
        Turn("Which color does it have at the end?", after),
    )
    return Example(scene, f"A {thing.name} {deed(thing.events)}.", open_turns=turns)


TASKS = (
    ToyTask("vqa/toy_direction", moving_direction, "moving_direction", "clevrer/video_validation"),
    ToyTask("reasoning/toy_sequence", action_sequence, "action_sequence", "star/Charades_v1_480"),
    ToyTask("vqa/toy_action_count", action_count, "action_count", "perception/videos"),
    ToyTask("reasoning/toy_state", state_change, "state_change", "perception/videos"),
    ToyTask("reasoning/toy_transition", scene_transition, "scene_transition", "scene_qa/video"),
    ToyTask("vqa/toy_existence", object_existence, "object_existence", "clevrer/video_validation"),
    ToyTask("reasoning/toy_mixed", mixed),
    ToyTask("caption/toy_caption", caption),
    ToyTask("conversation/toy_conversation", conversation),
)
RARE = ToyTask("reasoning/toy_rare", rare_event, "unexpected_action", "FunQA_test/test")
PICTURES = ToyTask("vqa/toy_picture", picture)


# ---- clips by number ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Examples and their frames by index. num_frames: frames of a clip of the usual length. size: side in pixels."""

    seed: int
    num_frames: int
    size: int = SIZE

    def draw(self, task: ToyTask, split: str, index: int) -> tuple[Example, np.random.Generator]:
        """Draw example `index` of a task, and return it with the generator of its noise. split: "train" or "test"."""
        generator = keyed_numpy(self.seed, zlib.crc32(f"{split}/{task.corpus}".encode()), index)
        while True:
            example = task.make(generator)
            if split_of(example.scene) == split:
                return example, generator

    def clip(
        self, task: ToyTask, split: str, index: int, fps: float = FPS
    ) -> tuple[Example, np.ndarray, dict[str, float]]:
        """Draw clip `index` of a task: its example, its frames (T, S, S, 3) as uint8 RGB, and its bounds.

        The bounds are the part that the questions are about, {"start": ..., "end": ...} in seconds; {} for all of it.
        split: "train" or "test". fps: frames per second at which the clip will be played.
        """
        example, generator = self.draw(task, split, index)
        count = min(round(example.length * self.num_frames), NUM_LONG_FRAMES)
        frames = render(example.scene, times=frame_times(count), size=self.size, generator=generator)
        if example.bounds is None:
            return example, frames, {}
        start, end = (round(part * count / fps, 3) for part in example.bounds)
        return example, frames, {"start": start, "end": end}

    def picture(self, task: ToyTask, index: int) -> tuple[Example, np.ndarray]:
        """Return a training example of one frame, and its frame, (S, S, 3) uint8 RGB."""
        example, generator = self.draw(task, "train", index)
        return example, render(example.scene, times=frame_times(1), size=self.size, generator=generator)[0]


def split_of(scene: Scene) -> str:
    """Return the split that a scene belongs to: "train" or "test"."""
    return "train" if scene.digest() % TEST_SHARE else "test"
