"""Training annotations of the toy world in VideoChat2-IT's layout: questions about clips and pictures.

Each folder video|image/<kind>/<set> has these files:

train.json    one record per medium: each question without options, then as multiple choice
open.json     one record per medium: its questions without options, and one question per thing about its color and its
              place over time; about a picture also one per shape that is absent. A model learns from these first what
              is in a medium: the answers have no letters
choices.json  multiple choice, each question with its options in several orders. Questions about a medium with the same
              options are one record: trained in one step, they show that the question decides, not the options. Without
              MVBench's instruction, which a recipe can add (`instruction` of a data set)

The questions of a record in open.json and choices.json are independent of each other (qa_sampling: together).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stllm.processors.templates import Turn
from stllm.toy.questions import ACTIONS, Example
from stllm.toy.scenes import COLOR_NAMES, SHAPES, UNITS, Thing, follow, frame_times, nearest_colors

COLUMNS = ("far left", "left", "center", "right", "far right")
ROWS = ("top", "upper", "middle", "lower", "bottom")
FOLLOW_REQUEST = "Tell the {}."  # with a shape: no two things in a scene have the same shape
FRAMES = 8  # number of times at which a text describes a thing
GROWN = 1.25  # a text says that a thing grows if its radius is larger than usual by this factor

Fields = dict[str, Any]
Records = list[tuple[str, Fields]]  # (annotation file, record)


def training_records(folder: str, example: Example, medium: Fields, times: Sequence[float]) -> Records:
    """Make the training records of a clip or a picture.

    folder: folder of the training set. medium: the medium's file and bounds, as fields of a record. times: times at
    which the things are described, from 0 to 1 of the clip; none: do not ask for this.
    """
    things = [follow_turn(thing, times) for thing in example.scene.things if times]
    if "image" in medium and times:  # half of the shapes are absent from a picture, so that a model must look for each
        absent = set(SHAPES) - {thing.shape for thing in example.scene.things}
        things += [Turn(FOLLOW_REQUEST.format(shape), "nothing.") for shape in sorted(absent)]
    questions = [Turn(turn.question or turn.instruction, turn.answer) for turn in example.open_turns]
    questions += [*(asked.without_options() for asked in example.asked), *things]
    records = [("train", example.turns), *([("open", questions)] if questions else [])]
    choices: dict[frozenset[str], list[Turn]] = {}  # options -> all orders of the questions with these options
    for asked in example.asked:
        orders = (replace(order.as_choice(), instruction="") for order in asked.orders())
        choices.setdefault(frozenset(asked.options), []).extend(orders)
    records += [("choices", turns) for turns in choices.values()]
    return [(f"{folder}/{file}.json", record(medium, turns)) for file, turns in records]


def record(medium: Fields, turns: Sequence[Turn]) -> Fields:
    """Make a record in VideoChat2-IT's format. medium: the medium's file and bounds, as fields of the record."""
    return {**medium, "QA": [{"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in turns]}


def times_of(example: Example) -> list[float]:
    """Return `FRAMES` evenly spaced points in time, as fractions of the clip's duration.

    They are in the part that the questions are about (`example.bounds`), or in the whole clip if there are no bounds.
    """
    begin, end = example.bounds or (0.0, 1.0)
    return [begin + (end - begin) * float(time) for time in frame_times(FRAMES)]


def follow_turn(thing: Thing, times: Sequence[float]) -> Turn:
    """Make a question about a thing over time; the answer is "red left top, red center top, nothing, ..."."""
    return Turn(FOLLOW_REQUEST.format(thing.shape), ", ".join(_seen(thing, times)) + ".")


def _seen(thing: Thing, times: Sequence[float]) -> list[str]:
    """Describe a thing at each time: color, column, row, and "grows" if it is larger than usual; or "nothing"."""

    def parts(places: np.ndarray, names: Sequence[str]) -> list[str]:
        return [names[part] for part in (places / UNITS * len(names)).astype(int).clip(0, len(names) - 1)]

    track = follow(thing, np.array(times))
    colors = [COLOR_NAMES[color] for color in nearest_colors(track.color)]
    grows = [f" {ACTIONS['grow']}" if larger else "" for larger in track.radius > GROWN * thing.radius]
    words = zip(colors, parts(track.x, COLUMNS), parts(track.y, ROWS), grows, track.opacity > 0.5, strict=True)
    return [f"{color} {column} {row}{grow}" if there else "nothing" for color, column, row, grow, there in words]
