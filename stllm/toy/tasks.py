"""What the toy world asks: one small function a task, from a random generator to a scene with questions and answers.

A new task is one function and one line of `TASKS`. The benchmark's names and media folders are MVBench's own, so that
its reader finds everything where it looks for it. Tasks of time are drawn so that their middle frame, and the set of
their frames without an order, say as little about the answer as can be; training asks more about the same clip.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from stllm.processors.templates import Turn
from stllm.toy.draws import a_background, a_moment, a_scene, a_thing, blinks, bystanders, several, turning
from stllm.toy.pictures import existence_questions, picture
from stllm.toy.questions import Example, Generator, ask, ask_among, pick, shuffled
from stllm.toy.scenes import COLORS, DIRECTIONS, PATTERNS, SHAPES, Cut, Event, Thing
from stllm.toy.video_questions import (
    ACTIONS,
    background_questions,
    blink_question,
    color_questions,
    deed,
    direction_question,
    moving_question,
    sequence_questions,
    story,
    whether_question,
)

CAPTION_INSTRUCTIONS = ("Describe the video.", "What happens in the video?", "Give a caption of this video.")
NEAR = 0.6  # STEPs or HOPs: how far things go that share a picture
LONG = 8.0  # clips of the usual length: 64 frames, which is the most there is, even where the usual ones have 8


@dataclass(frozen=True)
class ToyTask:
    """A kind of clip.

    corpus: folder of its training set, as VideoChat2-IT names them. benchmark: MVBench's name of it, "" where it is not
    tested; media_dir: MVBench's folder for its media.
    """

    corpus: str
    make: Callable[[Generator], Example]
    benchmark: str = ""
    media_dir: str = ""


def moving_direction(generator: Generator) -> Example:
    """Where does it move, alone or among others that move? The path's middle says nothing about it."""
    count = int(generator.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    start, end = int(generator.integers(0, 6)) / 32, int(generator.integers(27, 33)) / 32
    moves = [Event("move", start, end, pick(generator, DIRECTIONS), NEAR if count > 1 else 1.0) for _ in range(count)]
    movers = several(generator, [(move,) for move in moves]) if count > 1 else (a_thing(generator, *moves),)
    others = bystanders(generator, movers[0]) if count == 1 else ()
    scene = a_scene(generator, *movers, *others)
    return Example(scene, story(generator, scene), tuple(direction_question(generator, mover) for mover in movers))


def moving_count(generator: Generator) -> Example:
    """How many of several things move?"""
    things = _some_moving(generator, int(generator.integers(4)), int(generator.integers(3, 5)))
    scene = a_scene(generator, *things)
    whether = (whether_question(generator, thing, "move") for thing in shuffled(generator, things)[:2])
    return Example(scene, story(generator, scene), (moving_question(generator, things), *whether))


def action_sequence(generator: Generator) -> Example:
    """What does it do first, last, or after something else, within the bounds? Another action lies outside them."""
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
    """How often does it blink?"""
    thing = a_thing(generator, *blinks(generator, int(generator.integers(1, 4))))
    scene = a_scene(generator, thing, *bystanders(generator, thing))
    whether = whether_question(generator, pick(generator, scene.things), "blink")
    return Example(scene, story(generator, scene), (blink_question(generator, thing), whether))


def state_change(generator: Generator) -> Example:
    """Which color does it have at the beginning, or at the end? Both are among the options."""
    before, after = shuffled(generator, COLORS)[:2]
    thing = a_thing(generator, turning(generator, after), color=before)
    scene = a_scene(generator, thing, *bystanders(generator, thing, other_than=(after,)))
    return Example(scene, story(generator, scene), tuple(color_questions(generator, thing)))


def scene_transition(generator: Generator) -> Example:
    """How does the background change?"""
    before, after = shuffled(generator, PATTERNS)[:2]
    cut = Cut(a_moment(generator), a_background(generator, after))
    scene = replace(a_scene(generator, a_thing(generator), cut=cut), background=a_background(generator, before))
    return Example(scene, story(generator, scene), tuple(background_questions(generator, scene)))


def object_existence(generator: Generator) -> Example:
    """Is it there? One frame is enough: the control of the other tasks."""
    things = _some_moving(generator, int(generator.integers(2)), int(generator.integers(2, 4)))
    scene = a_scene(generator, *things)
    return Example(scene, story(generator, scene), tuple(existence_questions(generator, things)))


def rare_event(generator: Generator) -> Example:
    """What flashes? It shows in two or three of 64 frames: a few frames can miss it, an average hardly has it."""
    first, frames = int(generator.integers(3, 58)), int(generator.integers(2, 4))
    flash = Event("flash", first / 64, (first + frames) / 64)
    x, y = (int(place) for place in generator.integers(26, 39, 2))
    color, shape = pick(generator, COLORS), pick(generator, SHAPES)  # whatever else is there
    flashing = Thing(color, shape, x, y, int(generator.integers(16, 23)), (flash,))
    scene = a_scene(generator, *_some_moving(generator, int(generator.integers(2)), 2), flashing)
    asked = (
        ask_among(generator, "What color is the thing that flashes?", color, COLORS),
        ask(generator, "What shape flashes?", f"a {shape}", [f"a {name}" for name in SHAPES]),
    )
    return Example(scene, story(generator, scene), asked, length=LONG)


def mixed(generator: Generator) -> Example:
    """Several things that each do something else, perhaps before another background: many questions about one clip."""
    deeds = shuffled(generator, ("move", "move", "turn", "blink", "act", "stand"))[: int(generator.integers(2, 5))]
    *_, after = colors = shuffled(generator, COLORS)
    kinds = shuffled(generator, ACTIONS)[:3]
    events: dict[str, Callable[[], tuple[Event, ...]]] = {
        "move": lambda: (Event("move", 0.0, 1.0, pick(generator, DIRECTIONS), NEAR),),
        "turn": lambda: (turning(generator, after),),
        "blink": lambda: blinks(generator, int(generator.integers(1, 4))),
        "act": lambda: tuple(
            Event(kind, number / 3, (number + 1) / 3, extent=NEAR) for number, kind in enumerate(kinds)
        ),
        "stand": lambda: (),
    }
    things = several(generator, [events[name]() for name in deeds], colors=colors[:-1])
    changes = generator.integers(3) == 0
    before, other = shuffled(generator, PATTERNS)[:2]
    cut = Cut(a_moment(generator), a_background(generator, other)) if changes else None
    scene = replace(a_scene(generator, *things, cut=cut), background=a_background(generator, before))
    asked = [moving_question(generator, things), *existence_questions(generator, things)]
    for name, thing in zip(deeds, things, strict=True):
        asked += {
            "move": lambda thing: [direction_question(generator, thing)],
            "turn": lambda thing: color_questions(generator, thing),
            "blink": lambda thing: [blink_question(generator, thing)],
            "act": lambda thing: sequence_questions(generator, thing.name, kinds),
            "stand": lambda thing: [whether_question(generator, thing, "move")],
        }[name](thing)
    asked += background_questions(generator, scene) if changes else []
    text = story(generator, scene)
    return Example(scene, text, tuple(asked), told=(Turn("What happens in the video?", text),))


def caption(generator: Generator) -> Example:
    """One sentence for each thing on what happens to it."""
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
    return Example(scene, text, told=(Turn("", text, pick(generator, CAPTION_INSTRUCTIONS)),))


def conversation(generator: Generator) -> Example:
    """Three questions in one conversation, each answer short."""
    before, after = shuffled(generator, COLORS)[:2]
    towards = pick(generator, DIRECTIONS)
    thing = a_thing(generator, Event("move", 0.0, 1.0, towards), turning(generator, after), color=before)
    scene = a_scene(generator, thing)
    turns = (
        Turn("Which shape is in the video?", f"a {thing.shape}"),
        Turn("In which direction does it move?", towards),
        Turn("Which color does it have at the end?", after),
    )
    return Example(scene, f"A {thing.name} {deed(thing.events)}.", told=turns)


TASKS = (
    ToyTask("vqa/toy_direction", moving_direction, "moving_direction", "clevrer/video_validation"),
    ToyTask("vqa/toy_moving_count", moving_count, "moving_count", "clevrer/video_validation"),
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


def _some_moving(generator: Generator, count: int, total: int) -> tuple[Thing, ...]:
    """Several things of which that many move, each in its own quarter."""
    moves = [(Event("move", 0.0, 1.0, pick(generator, DIRECTIONS), NEAR),) for _ in range(count)]
    still: list[tuple[Event, ...]] = [()] * (total - count)
    return several(generator, [*moves, *still], radii=(4, 8))
