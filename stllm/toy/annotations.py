"""Training annotations of the toy world in VideoChat2-IT's layout: questions about clips and pictures, and text alone.

video|image/<kind>/<set>/train.json    one record a medium: every question openly, then as choice; for qa_sampling
                         packed.json   for multi_turn: two records a medium, in which no answer gives away a later one
                         open.json     the same without options: a third of the tokens
video/caption/toy_story, toy_path      what happens in a clip; the place of each of its things, frame by frame
image/caption/toy_seen                 what a picture shows
text/<set>/told.json                   a scene in words, and choices about it
           letters.json                options with their letters, which are learned slowly from choices alone
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stllm.datasets.samples import keyed_numpy
from stllm.processors.templates import REQUEST, Turn, lettered
from stllm.toy.questions import ACTIONS, MOVING, NUM_OPTIONS, Example, Generator, pick, shuffled
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
from stllm.toy.tasks import PICTURES, RARE, TASKS, ToyTask, World

TELLING = tuple(task for task in (*TASKS, RARE, PICTURES) if not task.corpus.startswith(("caption/", "conversation/")))
COLUMNS = ("far left", "left", "center", "right", "far right")
ROWS = ("top", "upper", "middle", "lower", "bottom")
AGAIN_REQUEST, STORY_REQUEST, PICTURE_REQUEST = "Tell it again.", "What happens in the video?", "Tell the image."
FOLLOW_REQUEST = "Tell the {}."  # a shape: no scene has two of one
FRAMES = 8  # in words
GROWN = 1.25  # of its radius: from there on texts say that a thing grows
QUESTIONS, RETOLD = 3, 0.2  # about a scene, at most; the share of scenes that are told again
LOOKUPS, CHOICES = 5, 3  # letters asked for at once; choices among the same options
WORDS = (*COLORS, *DIRECTIONS, *ACTIONS.values(), *PATTERNS, *MOVING, "yes", "no")

Fields = dict[str, Any]
Records = list[tuple[str, Fields]]  # annotation files, and a record for each


def training_records(folder: str, seed: int, index: int, example: Example, medium: Fields) -> Records:
    """Records of clip or picture `index` of a set.

    folder: of the set. seed: of the order of questions. medium: its file, and bounds.
    """
    found = [(f"{folder}/train.json", record(medium, example.turns))]
    for turns in example.conversations(keyed_numpy(seed, index)):
        # a long instruction stands before a conversation, not before each of its turns
        once = (replace(turn, instruction="") if turn.question else turn for turn in turns[1:])
        found.append((f"{folder}/packed.json", record(medium, (turns[0], *once))))
    talks = example.conversations(keyed_numpy(seed, index), choices=False)
    return [*found, *((f"{folder}/open.json", record(medium, turns)) for turns in talks)]


def clip_records(example: Example, medium: Fields) -> Records:
    """A clip in words: its story, and the path of each thing."""
    paths = [follow_turn(thing, times_of(example)) for thing in example.scene.things]
    return [
        ("vc2/video/caption/toy_story/train.json", record(medium, [Turn(STORY_REQUEST, example.story)])),
        ("vc2/video/caption/toy_path/train.json", record(medium, paths)),
    ]


def picture_records(example: Example, medium: Fields) -> Records:
    """A picture in words."""
    seen = [Turn(PICTURE_REQUEST, seen_in_words(example.scene))]
    return [("vc2/image/caption/toy_seen/train.json", record(medium, seen))]


def text_records(world: World, task: ToyTask, index: int) -> Records:
    """Two training conversations without media, about scenes of a task of TELLING."""
    name = Path(task.corpus).name
    return [
        (f"vc2/text/{name}/told.json", record({}, text_conversation(world, task, index))),
        (f"vc2/text/{name}/letters.json", record({}, letters_conversation(world, task, index))),
    ]


def record(medium: Fields, turns: Sequence[Turn]) -> Fields:
    """A record of VideoChat2-IT. medium: {} for text alone."""
    return {**medium, "QA": [{"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in turns]}


def text_conversation(world: World, task: ToyTask, index: int) -> tuple[Turn, ...]:
    """A training conversation about a scene of a task of TELLING: the scene in words, and questions."""
    return tell(*world.draw(replace(task, corpus=f"text/{task.corpus}"), "train", index))


def letters_conversation(world: World, task: ToyTask, index: int) -> tuple[Turn, ...]:
    """A training conversation about options and their letters."""
    return look_up(*world.draw(replace(task, corpus=f"letters/{task.corpus}"), "train", index))


def tell(example: Example, generator: Generator) -> tuple[Turn, ...]:
    """The scene in words, and choices about it, no fact twice; before half of the choices, the same question openly.

    An answer just given teaches the model to look up its letter; choices alone teach that much later. Some scenes are
    told a second time first, which teaches the model to look back.
    """
    other = 1 - int(generator.integers(2))
    turns: list[Turn] = []
    for asked in shuffled(generator, [asked for asked in example.asked if asked.only != other])[:QUESTIONS]:
        choice = replace(asked.as_choice(), instruction="")
        turns += pick(generator, ((choice,), (asked.openly(), choice)))
    if not turns or generator.random() < RETOLD:
        turns.insert(0, Turn(AGAIN_REQUEST, example.story))
    return replace(turns[0], instruction=example.story), *turns[1:]


def look_up(example: Example, generator: Generator) -> tuple[Turn, ...]:
    """Two turns of LOOKUPS letters each, and CHOICES whose answers the question gives.

    The options are those of a question about the scene, or random words.
    """
    asked = pick(generator, example.asked)
    if generator.integers(2):  # words that are seldom options together teach to look at all of them
        number = int(generator.integers(2, NUM_OPTIONS + 1))
        asked = replace(asked, options=tuple(shuffled(generator, WORDS)[:number]))
    lookups = []
    for _ in range(2):
        numbers = [int(number) for number in generator.integers(len(asked.options), size=LOOKUPS)]
        named = ", ".join(asked.options[number] for number in numbers)
        # Letters in brackets were not learned in 1,300 steps
        letters = ", ".join(f"{asked.options[number]} {chr(ord('A') + number)}" for number in numbers)
        lookups.append(Turn(f"Letters of {named}?", letters))
    first, second = lookups
    chosen = (replace(asked, answer=pick(generator, asked.options)) for _ in range(CHOICES))
    return (
        replace(first, question=f"{lettered(asked.options)}\n{first.question}"),
        second,
        *(Turn(f"It is: {choice.answer}.\n{REQUEST}\n", choice.as_choice().answer) for choice in chosen),
    )


def seen_in_words(scene: Scene, time: float = 0.5) -> str:
    """The frame at a time, a part of the clip, shape by shape: "circle nothing, square red far left top, ..."."""
    seen = dict.fromkeys(SHAPES, "nothing") | {thing.shape: _seen(thing, [time])[0] for thing in scene.things}
    return ", ".join(f"{shape} {words}" for shape, words in seen.items()) + "."


def times_of(example: Example) -> list[float]:
    """Times of FRAMES frames of its clip, or of the part that the questions are about; parts of the whole clip."""
    begin, end = example.bounds or (0.0, 1.0)
    return [begin + (end - begin) * float(time) for time in frame_times(FRAMES)]


def follow_turn(thing: Thing, times: Sequence[float]) -> Turn:
    """The thing at each of these times: "red left top, red center top, nothing, ..."."""
    return Turn(FOLLOW_REQUEST.format(thing.shape), ", ".join(_seen(thing, times)) + ".")


def _seen(thing: Thing, times: Sequence[float]) -> list[str]:
    """The color, column and row of a thing at each time, and whether it is larger than usual; or "nothing"."""

    def parts(places: np.ndarray, names: Sequence[str]) -> list[str]:
        return [names[part] for part in (places / UNITS * len(names)).astype(int).clip(0, len(names) - 1)]

    track = follow(thing, np.array(times))
    colors = [COLOR_NAMES[color] for color in nearest_colors(track.color)]
    grows = [f" {ACTIONS['grow']}" if larger else "" for larger in track.radius > GROWN * thing.radius]
    words = zip(colors, parts(track.x, COLUMNS), parts(track.y, ROWS), grows, track.opacity > 0.5, strict=True)
    return [f"{color} {column} {row}{grow}" if there else "nothing" for color, column, row, grow, there in words]
