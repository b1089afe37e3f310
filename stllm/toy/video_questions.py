"""What is asked about clips: one function a kind of question; and what happens in them, told in words.

The options of a question differ in their first word: a small model finds a letter by the word that follows it.
"""

from collections.abc import Callable, Sequence

from stllm.toy.questions import Asked, Generator, ask, ask_whether, pick, shuffled
from stllm.toy.scenes import COLORS, DIRECTIONS, PATTERNS, Event, Scene, Thing

DIRECTION_QUESTIONS = ("In which direction does the {} move?", "What direction is the {} moving?")
ACTIONS = {"jump": "jumps", "grow": "grows", "vanish": "vanishes", "step aside": "steps aside"}
MOVING, BLINKING = ("0", "1", "2", "3"), ("1", "2", "3")  # how many things move, how many times one blinks
BEGINNING, END = "at the beginning of the video", "at the end of the video"


def direction_question(generator: Generator, thing: Thing) -> Asked:
    """Where does it move?"""
    (way,) = (event.value for event in thing.events if event.kind == "move")
    question = pick(generator, DIRECTION_QUESTIONS).format(thing.name)
    return ask(generator, question, way, DIRECTIONS)


def moving_question(generator: Generator, things: Sequence[Thing]) -> Asked:
    """How many of them move?"""
    count = sum(_does(thing, "move") for thing in things)
    return ask(generator, "How many things move?", str(count), MOVING)


def whether_question(generator: Generator, thing: Thing, kind: str) -> Asked:
    """Does it move, or blink?"""
    return ask_whether(generator, f"Does the {thing.name} {kind}?", _does(thing, kind))


def blink_question(generator: Generator, thing: Thing) -> Asked:
    """How often does it blink?"""
    count = sum(event.kind == "blink" for event in thing.events)
    return ask(generator, f"How many times does the {thing.name} blink?", str(count), BLINKING)


def sequence_questions(generator: Generator, name: str, kinds: Sequence[str]) -> list[Asked]:
    """What does the thing do first, last, and after something else? In any order. kinds: its actions in their order."""

    def question(when: str, kind: str, only: int) -> Asked:
        return ask(generator, f"What does the {name} do {when}?", ACTIONS[kind], ACTIONS.values(), only=only)

    asked = [question("first", kinds[0], 0), question("last", kinds[-1], len(kinds) < 3)]
    if len(kinds) > 2:  # of two actions, the one that is not named would be the answer
        number = int(generator.integers(len(kinds) - 1))
        asked.append(question(f"after it {ACTIONS[kinds[number]]}", kinds[number + 1], 1))
    return shuffled(generator, asked)


def color_questions(generator: Generator, thing: Thing) -> list[Asked]:
    """Which color does it have at the beginning, at the end? In any order; both are among the options of both."""
    (after,) = (event.value for event in thing.events if event.kind == "turn")
    others = shuffled(generator, [color for color in COLORS if color not in (thing.color, after)])[:2]
    options = [thing.color, after, *others]
    return [
        ask(generator, f"What color is the {thing.shape} {when}?", color, options)
        for when, color in shuffled(generator, ((BEGINNING, thing.color), (END, after)))
    ]


def background_questions(generator: Generator, scene: Scene) -> list[Asked]:
    """How does the background change, with the same change backwards among the options; how is it before, after?"""
    assert scene.cut is not None
    before, after = scene.background.pattern, scene.cut.background.pattern
    others = shuffled(generator, [pattern for pattern in PATTERNS if pattern not in (before, after)])[:2]
    pairs = ((before, after), (after, before), tuple(others), tuple(others[::-1]))
    changes = [f"{first} to {second}" for first, second in pairs]
    return [
        ask(generator, "How does the background change?", changes[0], changes, only=0),
        *(
            ask(generator, f"What is the background like {when}?", pattern, [before, after, *others], only=1)
            for when, pattern in ((BEGINNING, before), (END, after))
        ),
    ]


# ---- stories --------------------------------------------------------------------------------------------------------


def story(generator: Generator, scene: Scene) -> str:
    """What happens: a sentence for each thing and one for another background, in any order."""
    sentences = [f"A {thing.name} {deed(thing.events)}." for thing in scene.things]
    if scene.cut is not None:
        sentences.append(f"The background changes from {scene.background.pattern} to {scene.cut.background.pattern}.")
    return " ".join(shuffled(generator, sentences))


def deed(events: Sequence[Event]) -> str:
    """What a thing does: "jumps, then it grows"."""
    deeds = dict.fromkeys(DEEDS[event.kind](event, events) for event in events)  # blinks are told once
    between = ", then it " if any(event.kind in ACTIONS for event in events) else " and "
    return between.join(deeds) or "stands still"


def _blinks(event: Event, events: Sequence[Event]) -> str:
    count = sum(other.kind == event.kind for other in events)
    return f"blinks {count} time{'s' if count > 1 else ''}"


# From an event, and all events of the same thing.
DEEDS: dict[str, Callable[[Event, Sequence[Event]], str]] = {
    **dict.fromkeys(ACTIONS, lambda event, events: ACTIONS[event.kind]),
    "move": lambda event, events: f"moves {event.value}",
    "turn": lambda event, events: f"turns {event.value}",
    "blink": _blinks,
    "flash": lambda event, events: "flashes",
    "appear": lambda event, events: "appears",
    "disappear": lambda event, events: "disappears",
}


def _does(thing: Thing, kind: str) -> bool:
    return any(event.kind == kind for event in thing.events)
