"""What the toy world asks: one small function a task, from a random generator to a scene with questions and answers.

A new task is one function and one line of `TASKS`. The benchmark's names and media folders are MVBench's own, so that
its reader finds everything where it looks for it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stllm.conversation.templates import Turn
from stllm.datasets.toy_scenes import COLORS, DIRECTIONS, PATTERNS, SHAPES, Background, Event, Scene, Thing

T = TypeVar("T")
Generator = np.random.Generator

# Training asks for an option in the words in which MVBench is asked (its system sentence, its answer's beginning).
OPTION_INSTRUCTION = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
OPTION_REQUEST = "Only give the best option."
CAPTION_INSTRUCTIONS = ("Describe the video.", "What happens in the video?", "Give a caption of this video.")
IMAGE_INSTRUCTIONS = ("Describe the image.", "What is in the image?", "Give a caption of this image.")
ACTIONS = {
    "jump": ("it jumps", "jumps"),
    "grow": ("it grows", "grows"),
    "vanish": ("it vanishes", "vanishes"),
    "step aside": ("it steps aside", "steps aside"),
}
DIRECTION_QUESTIONS = ("In which direction does the {} move?", "What direction is the {} moving?")
TOWARDS = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
PLACES = ((21, 21), (43, 21), (21, 43), (43, 43))  # of things that stand still, one in each quarter
CORNERS = ((13, 13), (51, 13), (13, 51), (51, 51))  # out of the way of what moves


@dataclass(frozen=True)
class Example:
    """One clip, what is asked about it, and answered.

    candidates: the options that an answer is chosen from, in the order shown; none where answers are free.
    length: of the clip, in clips of the usual length. bounds: which part of it is meant, from 0 to 1.
    """

    scene: Scene
    turns: tuple[Turn, ...]
    candidates: tuple[str, ...] = ()
    length: float = 1.0
    bounds: tuple[float, float] | None = None


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
    """Where does it move? The path's middle says nothing about it."""
    towards = _pick(generator, DIRECTIONS)
    start, end = int(generator.integers(0, 6)) / 32, int(generator.integers(27, 33)) / 32
    mover = _thing(generator, events=(Event("move", start, end, towards),))
    question = _pick(generator, DIRECTION_QUESTIONS)
    scene = _scene(generator, mover, *_bystanders(generator, mover))
    return _choice(generator, scene, question.format(mover.name), TOWARDS[towards], list(TOWARDS.values()))


def action_sequence(generator: Generator) -> Example:
    """What does it do first, or last, within the bounds? A third action lies outside them."""
    kinds = [str(kind) for kind in generator.permutation(list(ACTIONS))[:3]]
    events = tuple(Event(kind, number / 3, (number + 1) / 3) for number, kind in enumerate(kinds))
    actor = _thing(generator, events=events)
    begin = int(generator.integers(2))
    which = int(generator.integers(2))
    question = f"What does the {actor.name} do {('first', 'last')[which]}?"
    scene = _scene(generator, actor, *_bystanders(generator, actor))
    texts = [text for text, _ in ACTIONS.values()]
    example = _choice(generator, scene, question, ACTIONS[kinds[begin + which]][0], texts)
    bounds = (begin / 3, (begin + 2) / 3)
    return Example(example.scene, example.turns, example.candidates, length=1.5, bounds=bounds)


def state_change(generator: Generator) -> Example:
    """Which color does it have at the beginning, or at the end? Both are among the options."""
    before, after, *others = (str(color) for color in generator.permutation(list(COLORS))[:4])
    changing = _thing(generator, color=before, events=(_turning(generator, after),))
    which = int(generator.integers(2))
    question = f"What color is the {changing.shape} at the {('beginning', 'end')[which]} of the video?"
    scene = _scene(generator, changing, *_bystanders(generator, changing))
    return _choice(generator, scene, question, (before, after)[which], [before, after, *others])


def object_existence(generator: Generator) -> Example:
    """Is it there? One frame is enough: the control of the other tasks."""
    things = _standing(generator, int(generator.integers(2, 4)))
    present = bool(generator.integers(2))
    absent = sorted(set(COLORS) - {thing.color for thing in things})
    named = _pick(generator, things).name if present else f"{_pick(generator, absent)} {_pick(generator, SHAPES)}"
    question = _pick(generator, ("Is there a {} in the video?", "Does the video show a {}?")).format(named)
    return _choice(generator, _scene(generator, *things), question, "yes" if present else "no", ["yes", "no"])


def caption(generator: Generator) -> Example:
    """One sentence on what happens."""
    kind = _pick(generator, ("move", "sequence", "turn", "stand"))
    if kind == "stand":
        things = _standing(generator, 2)
        text = f"A {things[0].name} and a {things[1].name} stand still."
        return Example(_scene(generator, *things), (_described(generator, text, CAPTION_INSTRUCTIONS),))
    if kind == "move":
        towards = _pick(generator, DIRECTIONS)
        events: tuple[Event, ...] = (Event("move", 0.0, 1.0, towards),)
        deed = f"moves {TOWARDS[towards]}"
    elif kind == "turn":
        color = _pick(generator, COLORS)
        events = (_turning(generator, color),)
        deed = f"turns {color}"
    else:
        first, then = (str(kind) for kind in generator.permutation(list(ACTIONS))[:2])
        events = (Event(first, 0.0, 0.5), Event(then, 0.5, 1.0))
        deed = f"{ACTIONS[first][1]}, then it {ACTIONS[then][1]}"
    colors = [color for color in COLORS if color != events[0].value]
    thing = _thing(generator, color=_pick(generator, colors), events=events)
    return Example(_scene(generator, thing), (_described(generator, f"A {thing.name} {deed}.", CAPTION_INSTRUCTIONS),))


def conversation(generator: Generator) -> Example:
    """Three questions in one conversation, each answer short."""
    before, after = (str(color) for color in generator.permutation(list(COLORS))[:2])
    towards = _pick(generator, DIRECTIONS)
    thing = _thing(generator, color=before, events=(Event("move", 0.0, 1.0, towards), _turning(generator, after)))
    turns = (
        Turn("Which shape is in the video?", f"a {thing.shape}"),
        Turn("In which direction does it move?", TOWARDS[towards]),
        Turn("Which color does it have at the end?", after),
    )
    return Example(_scene(generator, thing), turns)


def picture(generator: Generator) -> Example:
    """A single picture: a question about it, and its caption."""
    things = _standing(generator, int(generator.integers(1, 4)))
    asked = _pick(generator, things)
    question = Turn(f"What color is the {asked.shape} in the image?", asked.color)
    return Example(
        _scene(generator, *things), (question, _described(generator, picture_caption(things), IMAGE_INSTRUCTIONS))
    )


def picture_caption(things: Sequence[Thing]) -> str:
    """One sentence that names everything in a picture."""
    named = [f"a {thing.name}" for thing in things]
    text = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"{text[0].upper()}{text[1:]}."


TASKS = (
    ToyTask("vqa/toy_direction", moving_direction, "moving_direction", "clevrer/video_validation"),
    ToyTask("reasoning/toy_sequence", action_sequence, "action_sequence", "star/Charades_v1_480"),
    ToyTask("reasoning/toy_state", state_change, "state_change", "perception/videos"),
    ToyTask("vqa/toy_existence", object_existence, "object_existence", "clevrer/video_validation"),
    ToyTask("caption/toy_caption", caption),
    ToyTask("conversation/toy_conversation", conversation),
)
PICTURES = ToyTask("vqa/toy_picture", picture)


def options_text(question: str, candidates: Sequence[str]) -> str:
    """MVBench's question block: the question and its lettered options."""
    lines = [f"({chr(ord('A') + number)}) {candidate}" for number, candidate in enumerate(candidates)]
    return "\n".join([f"Question: {question}", "Options:", *lines])


def _choice(generator: Generator, scene: Scene, question: str, answer: str, candidates: list[str]) -> Example:
    """One question, asked openly and with shuffled options."""
    options = tuple(str(candidate) for candidate in generator.permutation(candidates))
    letter = chr(ord("A") + options.index(answer))
    chosen = Turn(
        f"{options_text(question, options)}\n{OPTION_REQUEST}",
        f"Best option:({letter}) {answer}",
        OPTION_INSTRUCTION,
    )
    return Example(scene, (Turn(question, answer), chosen), options)


def _described(generator: Generator, text: str, instructions: Sequence[str]) -> Turn:
    return Turn("", text, _pick(generator, instructions))


def _turning(generator: Generator, color: str) -> Event:
    start = int(generator.integers(10, 20)) / 32
    return Event("turn", start, start + 3 / 32, color)


def _scene(generator: Generator, *things: Thing) -> Scene:
    pattern, shade, angle = _pick(generator, PATTERNS), int(generator.integers(50, 160)), int(generator.integers(180))
    return Scene(things, Background(pattern, shade, angle))


def _thing(generator: Generator, *, events: tuple[Event, ...], color: str | None = None) -> Thing:
    """The thing that a clip is about, near the middle of the picture."""
    x, y = (int(place) for place in generator.integers(28, 37, 2))
    color = color or _pick(generator, COLORS)
    return Thing(color, _pick(generator, SHAPES), x, y, int(generator.integers(7, 10)), events)


def _bystanders(generator: Generator, thing: Thing) -> tuple[Thing, ...]:
    """Nobody, or one small thing of another color and shape in a corner."""
    if generator.integers(2):
        return ()
    color = _pick(generator, [color for color in COLORS if color != thing.color])
    shape = _pick(generator, [shape for shape in SHAPES if shape != thing.shape])
    return (Thing(color, shape, *_pick(generator, CORNERS), 5),)


def _standing(generator: Generator, count: int) -> tuple[Thing, ...]:
    """Things that stand still, their colors and shapes all different."""
    colors, shapes = (generator.permutation(list(names))[:count] for names in (COLORS, SHAPES))
    places = generator.permutation(PLACES)[:count] + generator.integers(-3, 4, (count, 2))
    return tuple(
        Thing(str(color), str(shape), int(x), int(y), int(generator.integers(6, 10)))
        for color, shape, (x, y) in zip(colors, shapes, places, strict=True)
    )


def _pick(generator: Generator, choices: Iterable[T]) -> T:
    """One of them, each as likely."""
    listed = list(choices)
    return listed[int(generator.integers(len(listed)))]
