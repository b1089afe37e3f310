"""The toy world in words alone, for the language model's own first stage.

A scene is told by what happens, and asked about as clips and pictures are; some are told again first, which teaches to
look back. Options are looked up, too: which letter stands before which answer is slow to be learned from choices alone.
What is seen in one frame, or of one thing in all frames, is told here too, for pictures and clips to be asked about.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stllm.processors.choices import REQUEST, lettered
from stllm.processors.templates import Turn
from stllm.toy.clips import World
from stllm.toy.questions import NUM_OPTIONS, Example, Generator, pick, shuffled
from stllm.toy.scenes import (
    COLOR_NAMES,
    COLORS,
    DIRECTIONS,
    PATTERNS,
    SHAPES,
    UNITS,
    Scene,
    Thing,
    follow,
    frame_times,
    nearest_colors,
)
from stllm.toy.tasks import PICTURES, RARE, TASKS, ToyTask
from stllm.toy.video_questions import ACTIONS, MOVING

TELLING = tuple(task for task in (*TASKS, RARE, PICTURES) if not task.corpus.startswith(("caption/", "conversation/")))
COLUMNS = ("far left", "left", "center", "right", "far right")
ROWS = ("top", "upper", "middle", "lower", "bottom")
AGAIN_REQUEST, STORY_REQUEST, PICTURE_REQUEST = "Tell it again.", "What happens in the video?", "Tell the image."
FOLLOW_REQUEST = "Tell the {}."  # a shape: no scene has two of one
FRAMES = 8  # in words
GROWN = 1.25  # of its radius: from there on it is told that a thing grows
QUESTIONS, RETOLD = 3, 0.2  # about a scene, at most; the share of scenes that are told again
LOOKUPS, CHOICES = 5, 3  # letters asked for at once; choices among the same options
WORDS = (*COLORS, *DIRECTIONS, *ACTIONS.values(), *PATTERNS, *MOVING, "yes", "no")


def text_conversation(world: World, task: ToyTask, index: int) -> tuple[Turn, ...]:
    """A training conversation about a scene of a task of TELLING: the scene told, and asked about."""
    example, generator = world.draw(replace(task, corpus=f"text/{task.corpus}"), "train", index)
    return tell(example, generator)


def tell(example: Example, generator: Generator) -> tuple[Turn, ...]:
    """The scene told, and choices about it, no fact twice; half of the choices follow the same question, asked openly.

    An answer that was just given teaches where its letter is looked up; alone, choices teach that much later. Now and
    then the scene is told again first, which teaches to look back.
    """
    other = 1 - int(generator.integers(2))
    turns: list[Turn] = []
    for asked in shuffled(generator, [asked for asked in example.asked if asked.only != other])[:QUESTIONS]:
        choice = replace(asked.as_choice(), instruction="")
        turns += pick(generator, ((choice,), (asked.openly(), choice)))
    if not turns or generator.random() < RETOLD:
        turns.insert(0, Turn(AGAIN_REQUEST, example.story))
    return replace(turns[0], instruction=example.story), *turns[1:]


def letters_conversation(world: World, task: ToyTask, index: int) -> tuple[Turn, ...]:
    """The options of a question of a task of TELLING, or any words, looked up many times, then chosen from."""
    example, generator = world.draw(replace(task, corpus=f"letters/{task.corpus}"), "train", index)
    return look_up(example, generator)


def look_up(example: Example, generator: Generator) -> tuple[Turn, ...]:
    """Two turns of LOOKUPS letters each, and CHOICES in the words of a choice, whose answers are given."""
    asked = pick(generator, example.asked)
    if generator.integers(2):  # words that are seldom options together tell that all of them are to be looked at
        number = int(generator.integers(2, NUM_OPTIONS + 1))
        asked = replace(asked, options=tuple(shuffled(generator, WORDS)[:number]))
    first, second = _lookups(asked.options, generator), _lookups(asked.options, generator)
    chosen = (replace(asked, answer=pick(generator, asked.options)) for _ in range(CHOICES))
    return (
        replace(first, question=f"{lettered(asked.options)}\n{first.question}"),
        second,
        *(Turn(f"It is: {choice.answer}.\n{REQUEST}\n", choice.as_choice().answer) for choice in chosen),
    )


def _lookups(options: tuple[str, ...], generator: Generator) -> Turn:
    """Letters of some options, some asked for twice. Written in brackets they were not learned in 1,300 steps."""
    numbers = [int(number) for number in generator.integers(len(options), size=LOOKUPS)]
    named = ", ".join(options[number] for number in numbers)
    return Turn(f"Letters of {named}?", ", ".join(f"{options[number]} {chr(65 + number)}" for number in numbers))


def seen_in_words(scene: Scene, time: float = 0.5) -> str:
    """What is seen at a time, a part of the clip, shape by shape: "circle nothing, square red far left top, ..."."""
    seen = dict.fromkeys(SHAPES, "nothing") | {thing.shape: _seen(thing, [time])[0] for thing in scene.things}
    return ", ".join(f"{shape} {words}" for shape, words in seen.items()) + "."


def times_of(example: Example) -> list[float]:
    """When FRAMES frames of its clip are, or of the part that is meant; parts of the whole clip."""
    begin, end = example.bounds or (0.0, 1.0)
    return [begin + (end - begin) * float(time) for time in frame_times(FRAMES)]


def follow_turn(thing: Thing, times: Sequence[float]) -> Turn:
    """What is seen of a thing at these times: "red left top, red center top, nothing, ..."."""
    return Turn(FOLLOW_REQUEST.format(thing.shape), ", ".join(_seen(thing, times)) + ".")


def _seen(thing: Thing, times: Sequence[float]) -> list[str]:
    """A thing at each time: its color, column, row, and whether it is larger than usual; or nothing."""
    track = follow(thing, np.array(times))
    seen = zip(nearest_colors(track.color), _parts(track.x, COLUMNS), _parts(track.y, ROWS), strict=True)
    words = [f"{COLOR_NAMES[color]} {COLUMNS[column]} {ROWS[row]}" for color, column, row in seen]
    grows = [f" {ACTIONS['grow']}" if larger else "" for larger in track.radius > GROWN * thing.radius]
    there = track.opacity > 0.5
    return [word + grow if visible else "nothing" for word, grow, visible in zip(words, grows, there, strict=True)]


def _parts(places: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """In which part of the picture's side each place is, of as many as there are names."""
    return (places / UNITS * len(names)).astype(int).clip(0, len(names) - 1)
