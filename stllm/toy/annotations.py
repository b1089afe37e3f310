"""Training annotations of the toy world in VideoChat2-IT's layout: questions about clips and pictures.

video|image/<kind>/<set>/train.json    one record a medium: every question openly, then as choice; for qa_sampling
                         asked.json    one record a question, for multi_turn: openly and then as choice, where the
                                       answer just given teaches the model to find its letter; as choice only; and
                                       for each of a clip's things its place, frame by frame
                         choices.json  of clips, one record a question: as choice, with MVBench's long instruction
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stllm.processors.templates import Turn
from stllm.toy.questions import ACTIONS, Example
from stllm.toy.scenes import COLOR_NAMES, UNITS, Thing, follow, frame_times, nearest_colors

COLUMNS = ("far left", "left", "center", "right", "far right")
ROWS = ("top", "upper", "middle", "lower", "bottom")
FOLLOW_REQUEST = "Tell the {}."  # a shape: no scene has two of one
FRAMES = 8  # in words
GROWN = 1.25  # of its radius: from there on texts say that a thing grows

Fields = dict[str, Any]
Records = list[tuple[str, Fields]]  # annotation files, and a record for each


def training_records(folder: str, example: Example, medium: Fields, *, paths: bool = True) -> Records:
    """Records of a clip or a picture of a set.

    folder: of the set. medium: its file, and bounds. paths: whether the places of its things are asked for.
    """
    whole = (f"{folder}/train.json", record(medium, example.turns))
    choices = [asked.as_choice() for asked in example.asked]
    short = [replace(choice, instruction="") for choice in choices]
    talks: list[tuple[Turn, ...]] = [(turn,) for turn in (*example.told, *short)]
    talks += [(asked.openly(), choice) for asked, choice in zip(example.asked, short, strict=True)]
    if paths:
        talks += [(follow_turn(thing, times_of(example)),) for thing in example.scene.things]
    records = [whole, *((f"{folder}/asked.json", record(medium, turns)) for turns in talks)]
    if "video" in medium:
        records += [(f"{folder}/choices.json", record(medium, [choice])) for choice in choices]
    return records


def record(medium: Fields, turns: Sequence[Turn]) -> Fields:
    """A record of VideoChat2-IT."""
    return {**medium, "QA": [{"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in turns]}


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
