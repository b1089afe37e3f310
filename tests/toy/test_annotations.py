"""The toy world in words: the paths of things, what conversations end with, and that a seed is a seed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from stllm.processors.templates import Turn
from stllm.toy.annotations import FRAMES, follow_turn, times_of, training_records
from stllm.toy.scenes import SHAPES, Event, Thing
from stllm.toy.tasks import PICTURES, TASKS, World, mixed

WORLD = World(1, 16, 64)


def test_a_path_says_color_place_size_and_absence() -> None:
    """A thing that moves right and is then away; one that grows; one that takes another color."""
    away = (Event("move", 0.0, 0.5, "right"), Event("disappear", 0.5, 0.51))
    grows, turns = (Event("grow", 0.0, 1.0),), (Event("turn", 0.4, 0.41, "blue"),)
    paths = [follow_turn(Thing("red", "circle", 32, 6, 8, events), [0.0, 0.5, 0.9]) for events in (away, grows, turns)]
    assert {path.question for path in paths} == {"Tell the circle."}
    assert [path.answer for path in paths] == [
        "red left top, red right top, nothing.",
        "red center top, red center top grows, red center top.",
        "red center top, blue center top, blue center top.",
    ]


def test_times_are_those_of_the_part_that_is_meant() -> None:
    example, _ = WORLD.draw(TASKS[0], "train", 0)
    assert times_of(example) == [(number + 0.5) / FRAMES for number in range(FRAMES)]
    assert times_of(replace(example, bounds=(0.5, 1.0)))[0] == pytest.approx(0.5 + 0.25 / FRAMES)


def test_each_question_is_asked_in_several_ways() -> None:
    """Openly, and as choice with the options in each order; things are told."""
    task = next(task for task in TASKS if task.make is mixed)
    example, _ = WORLD.draw(task, "train", 0)
    found: dict[str, list[list[Turn]]] = {}
    for name, fields in training_records("set", example, {"video": "a.mp4"}, times_of(example)):
        assert fields["video"] == "a.mp4"
        found.setdefault(name, []).append([Turn(turn["q"], turn["a"], turn["i"]) for turn in fields["QA"]])
    assert found["set/train.json"] == [list(example.turns)]
    story = Turn("What happens in the video?", example.story)
    things = [follow_turn(thing, times_of(example)) for thing in example.scene.things]
    assert found["set/open.json"] == [[story, *(asked.without_options() for asked in example.asked), *things]]
    choices = found["set/choices.json"]
    for asked in example.asked:
        turn = replace(asked.as_choice(), instruction="")  # recipes add MVBench's
        (record,) = (record for record in choices if turn in record)
        orders = [other for other in record if f"Question: {asked.question}\n" in other.question]
        letters = sorted(str(turn.answer).removeprefix("Best option:(")[0] for turn in orders)
        assert letters == list("ABCD"[: len(asked.options)])
    assert sum(map(len, choices)) == sum(len(asked.options) for asked in example.asked)
    assert len(choices) == len({frozenset(asked.options) for asked in example.asked}) < len(example.asked)
    assert not any(turn.instruction for record in choices for turn in record)
    picture, _ = WORLD.draw(PICTURES, "train", 0)
    (opened,) = [
        fields["QA"]
        for name, fields in training_records("set", picture, {"image": "a.png"}, [0.5])
        if name == "set/open.json"
    ]
    told = {turn["q"]: turn["a"] for turn in opened if turn["q"].startswith("Tell the ")}
    present = {f"Tell the {thing.shape}." for thing in picture.scene.things}
    assert len(told) == len(SHAPES) and {ask for ask, answer in told.items() if answer != "nothing."} == present
    bare = training_records("set", example, {"image": "a.png"}, [])
    assert not any("Tell the " in turn["q"] for _, fields in bare for turn in fields["QA"])


def test_a_seed_draws_the_same_in_every_process() -> None:
    """Python orders sets of strings differently in each process."""
    code = (
        "import json; from stllm.toy.tasks import *\n"
        "world = World(1, 16, 64)\n"
        "drawn = [world.draw(task, 'train', i)[0] for task in (*TASKS, RARE, PICTURES) for i in range(12)]\n"
        "print(json.dumps([[turn.question, turn.answer] for example in drawn for turn in example.turns]))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1 and len(json.loads(said.pop())) > 100


def test_other_indices_are_other_scenes() -> None:
    stories = [WORLD.draw(TASKS[0], "train", index)[0].story for index in range(30)]
    assert len(np.unique(np.array(stories, dtype=str))) > 25
