"""Questions of the toy world: a question with its answer and options, asked with and without the options.

Multiple-choice prompts have MVBench's wording. The options of a question differ in their first word, because a small
model finds a letter by the word after it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from stllm.processors.templates import ANSWER_BEGINS, REQUEST, SYSTEM, Turn, question_block
from stllm.toy.scenes import COLORS, DIRECTIONS, PATTERNS, SHAPES, UNITS, Event, Scene, Thing

T = TypeVar("T")
Generator = np.random.Generator

NUM_OPTIONS = 4  # if there are more candidates
DIRECTION_QUESTIONS = ("In which direction does the {} move?", "What direction is the {} moving?")
ACTIONS = {"jump": "jumps", "grow": "grows", "vanish": "vanishes", "step aside": "steps aside"}
BLINKING, THINGS = ("1", "2", "3"), ("1", "2", "3", "4")  # options of counting questions
BEGINNING, END = "at the beginning of the video", "at the end of the video"
THIRDS = (13, 32, 51)  # centers of a picture's thirds, in units
ROWS = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
PLACES = {place: (x, y) for y, row in zip(THIRDS, ROWS, strict=True) for x, place in zip(THIRDS, row, strict=True)}


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and its options in the order of the prompt."""

    question: str
    answer: str
    options: tuple[str, ...]

    def without_options(self) -> Turn:
        """Return the question without options."""
        return Turn(self.question, self.answer)

    def orders(self) -> "list[Asked]":
        """Return the question with its options rotated in each way, so that the answer has each letter once."""
        rotated = (self.options[count:] + self.options[:count] for count in range(len(self.options)))
        return [replace(self, options=options) for options in rotated]

    def as_choice(self) -> Turn:
        """Return the question with its options. The prompt has exactly MVBench's tokens, which a small model needs."""
        letter = chr(ord("A") + self.options.index(self.answer))
        return Turn(
            f"{question_block(self.question, self.options)}\n{REQUEST}\n",
            f"{ANSWER_BEGINS}{letter}) {self.answer}",
            f"{SYSTEM}\n",
        )


@dataclass(frozen=True)
class Example:
    """One clip or picture with questions and answers.

    story: description of the scene. asked: questions with options, each about another fact; a test uses the first one.
    open_turns: turns without options, such as a caption. length: length of the clip / usual length.
    bounds: start and end of the part that the questions are about, from 0 to 1 of the clip.
    """

    scene: Scene
    story: str
    asked: tuple[Asked, ...] = ()
    open_turns: tuple[Turn, ...] = ()
    length: float = 1.0
    bounds: tuple[float, float] | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Each question without options and then as multiple choice, followed by the turns of `open_turns`."""
        return (
            *(turn for asked in self.asked for turn in (asked.without_options(), asked.as_choice())),
            *self.open_turns,
        )


def ask(generator: Generator, question: str, answer: str, candidates: Iterable[str]) -> Asked:
    """Make a question with all candidates as options, shuffled."""
    return Asked(question, answer, tuple(shuffled(generator, candidates)))


def ask_among(generator: Generator, question: str, answer: str, candidates: Iterable[str]) -> Asked:
    """Make a question with the answer and some of the other candidates, `NUM_OPTIONS` options in total."""
    wrong = shuffled(generator, [candidate for candidate in candidates if candidate != answer])
    return ask(generator, question, answer, [answer, *wrong[: NUM_OPTIONS - 1]])


def ask_whether(generator: Generator, question: str, answer: bool) -> Asked:
    """Make a question whose answer is yes or no."""
    return ask(generator, question, "yes" if answer else "no", ("yes", "no"))


def pick(generator: Generator, choices: Iterable[T]) -> T:
    """Draw one of the choices, all equally likely."""
    listed = list(choices)
    return listed[int(generator.integers(len(listed)))]


def shuffled(generator: Generator, choices: Iterable[T]) -> list[T]:
    """Return the choices in random order."""
    listed = list(choices)
    return [listed[number] for number in generator.permutation(len(listed))]


# ---- about clips ----------------------------------------------------------------------------------------------------


def direction_question(generator: Generator, thing: Thing) -> Asked:
    """Ask in which direction a thing moves."""
    (way,) = (event.value for event in thing.events if event.kind == "move")
    question = pick(generator, DIRECTION_QUESTIONS).format(thing.name)
    return ask(generator, question, way, DIRECTIONS)


def whether_question(generator: Generator, thing: Thing, kind: str) -> Asked:
    """Ask whether a thing moves or blinks. kind: "move" or "blink"."""
    return ask_whether(generator, f"Does the {thing.name} {kind}?", any(event.kind == kind for event in thing.events))


def blink_question(generator: Generator, thing: Thing) -> Asked:
    """Ask how often a thing blinks."""
    count = sum(event.kind == "blink" for event in thing.events)
    return ask(generator, f"How many times does the {thing.name} blink?", str(count), BLINKING)


def sequence_questions(generator: Generator, name: str, kinds: Sequence[str]) -> list[Asked]:
    """Ask what a thing does first, last, and after another action; the questions are shuffled.

    kinds: the actions of the thing, in order.
    """

    def question(when: str, kind: str) -> Asked:
        return ask(generator, f"What does the {name} do {when}?", ACTIONS[kind], ACTIONS.values())

    asked = [question("first", kinds[0]), question("last", kinds[-1])]
    if len(kinds) > 2:  # with two actions, the answer would always be the other one
        number = int(generator.integers(len(kinds) - 1))
        asked.append(question(f"after it {ACTIONS[kinds[number]]}", kinds[number + 1]))
    return shuffled(generator, asked)


def color_questions(generator: Generator, thing: Thing) -> list[Asked]:
    """Ask for a thing's color at the beginning and at the end. Both questions have both colors as options."""
    (after,) = (event.value for event in thing.events if event.kind == "turn")
    others = shuffled(generator, [color for color in COLORS if color not in (thing.color, after)])[:2]
    options = [thing.color, after, *others]
    return [
        ask(generator, f"What color is the {thing.shape} {when}?", color, options)
        for when, color in shuffled(generator, ((BEGINNING, thing.color), (END, after)))
    ]


def background_questions(generator: Generator, scene: Scene) -> list[Asked]:
    """Ask how the background changes, with the reversed change as an option, and how it is before and after."""
    assert scene.cut is not None
    before, after = scene.background.pattern, scene.cut.background.pattern
    others = shuffled(generator, [pattern for pattern in PATTERNS if pattern not in (before, after)])[:2]
    pairs = ((before, after), (after, before), tuple(others), tuple(others[::-1]))
    changes = [f"{first} to {second}" for first, second in pairs]
    return [
        ask(generator, "How does the background change?", changes[0], changes),
        *(
            ask(generator, f"What is the background like {when}?", pattern, [before, after, *others])
            for when, pattern in ((BEGINNING, before), (END, after))
        ),
    ]


def story(generator: Generator, scene: Scene) -> str:
    """Describe a scene: a sentence for each thing, and one for a change of background, in random order."""
    sentences = [f"A {thing.name} {deed(thing.events)}." for thing in scene.things]
    if scene.cut is not None:
        sentences.append(f"The background changes from {scene.background.pattern} to {scene.cut.background.pattern}.")
    return " ".join(shuffled(generator, sentences))


def deed(events: Sequence[Event]) -> str:
    """Describe the actions of a thing, such as "jumps, then it grows"."""
    blinks = sum(event.kind == "blink" for event in events)
    deeds = {
        **ACTIONS,
        "blink": f"blinks {blinks} time{'s' if blinks > 1 else ''}",
        "flash": "flashes",
        "appear": "appears",
        "disappear": "disappears",
    }
    words = [f"{event.kind}s {event.value}" if event.value else deeds[event.kind] for event in events]  # moves, turns
    between = ", then it " if any(event.kind in ACTIONS for event in events) else " and "
    return between.join(dict.fromkeys(words)) or "stands still"  # several blinks give one text


# ---- about pictures -------------------------------------------------------------------------------------------------


def picture_questions(generator: Generator, things: Sequence[Thing], pattern: str) -> list[Asked]:
    """Make questions that a single frame answers, in random order. pattern: pattern of the background."""
    thing = pick(generator, things)
    asked = [ask_among(generator, f"What color is the {thing.shape}?", thing.color, COLORS)]
    thing = pick(generator, things)
    shapes = [f"the {shape}" for shape in SHAPES]
    asked.append(ask(generator, f"Which shape is {thing.color}?", f"the {thing.shape}", shapes))
    thing = pick(generator, things)
    asked.append(ask_among(generator, f"Where is the {thing.name}?", place_of(thing), PLACES))
    thing = pick(generator, things)  # wrong options: first the other things in the picture, then absent ones
    present = [f"a {other.name}" for other in things if other is not thing]
    absent = shuffled(generator, [f"a {color} {shape}" for color in COLORS for shape in SHAPES])
    wrong = [*present, *(name for name in absent if name not in (*present, f"a {thing.name}"))]
    options = [f"a {thing.name}", *wrong[: NUM_OPTIONS - 1]]
    asked.append(ask(generator, f"What is {place_of(thing)}?", f"a {thing.name}", options))
    asked.append(ask(generator, "How many things are there?", str(len(things)), THINGS))
    asked.append(existence_questions(generator, things)[0])
    asked.append(ask_among(generator, "What is the background like?", pattern, PATTERNS))
    if len(things) > 1:
        first, second = shuffled(generator, things)[:2]
        right, down = first.x - second.x, first.y - second.y
        across = abs(right) >= abs(down)  # use the axis on which they are further apart
        sides = ("left of", "right of") if across else ("above", "below")
        question = f"Is the {first.name} {sides[0]} or {sides[1]} the {second.name}?"
        asked.append(ask(generator, question, sides[(right if across else down) > 0], sides))
    return shuffled(generator, asked)


def picture_caption(scene: Scene) -> str:
    """Describe a picture: its things with their places, and its background."""
    named = [f"a {thing.name} {place_of(thing)}" for thing in scene.things]
    text = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"{text[0].upper()}{text[1:]}. The background is {scene.background.pattern}."


def place_of(thing: Thing) -> str:
    """Describe the place of a thing by the third of the picture, horizontally and vertically."""
    return ROWS[thing.y * 3 // UNITS][thing.x * 3 // UNITS]


def existence_questions(generator: Generator, things: Sequence[Thing]) -> list[Asked]:
    """Ask whether a present and an absent thing are there, in random order.

    The absent thing has a color that no thing has, or the color of one thing and the shape of another.
    """
    present = pick(generator, things).name
    nowhere = [color for color in COLORS if color not in {thing.color for thing in things}]
    absent = f"{pick(generator, nowhere)} {pick(generator, SHAPES)}"
    if len(things) > 1 and generator.integers(2):
        first, second = shuffled(generator, things)[:2]
        absent = f"{first.color} {second.shape}"
    return shuffled(
        generator,
        [ask_whether(generator, f"Is there a {name}?", there) for name, there in ((present, True), (absent, False))],
    )
