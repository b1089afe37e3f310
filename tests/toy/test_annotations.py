"""The toy world in words: what a story's conversation asks, what is looked up, and that a seed is a seed."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from stllm.toy.annotations import (
    AGAIN_REQUEST,
    CHOICES,
    FRAMES,
    LOOKUPS,
    QUESTIONS,
    TELLING,
    follow_turn,
    letters_conversation,
    seen_in_words,
    text_conversation,
    times_of,
)
from stllm.toy.scenes import Event, Thing
from stllm.toy.tasks import TASKS, ToyTask, World

WORLD = World(1, 16, 64)
OPTION = re.compile(r"^\((\w)\) (.+)$", re.M)


@pytest.mark.parametrize("task", TELLING, ids=lambda task: task.corpus)
def test_a_story_is_told_and_chosen_about(task: ToyTask) -> None:
    """Each fact is chosen once, its letter before it, and sometimes asked openly just before; some are told again."""
    openly = choices = again = 0
    for index in range(60):
        example, _ = WORLD.draw(replace(task, corpus=f"text/{task.corpus}"), "train", index)
        turns = list(text_conversation(WORLD, task, index))
        assert turns[0].instruction == example.story and not any(turn.instruction for turn in turns[1:])
        if turns[0].question == AGAIN_REQUEST:
            assert turns.pop(0).answer == example.story
            again += 1
        asked = {each.question: each.answer for each in example.asked}
        while turns:
            turn = turns.pop(0)
            if turn.question in asked:  # openly: its choice is next
                assert turn.answer == asked[turn.question]
                assert turns[0].question.startswith(f"Question: {turn.question}\n")
                openly += 1
                turn = turns.pop(0)
            answer = asked.pop(turn.question.removeprefix("Question: ").split("\n")[0])
            assert turn.answer is not None
            letter, named = re.fullmatch(r"Best option:\((\w)\) (.+)", turn.answer).groups()  # type: ignore[union-attr]
            assert dict(OPTION.findall(turn.question))[letter] == named == answer
            choices += 1
        assert len(example.asked) - len(asked) <= QUESTIONS
    assert 0.3 * choices < openly < 0.7 * choices
    assert 0 < again < 40


def test_letters_are_looked_up_and_chosen() -> None:
    found = {len(OPTION.findall(letters_conversation(WORLD, task, 0)[0].question)) for task in TELLING}
    assert found <= {2, 3, 4}
    for task in TELLING:
        for index in range(20):
            first, second, *chosen = letters_conversation(WORLD, task, index)
            letter_of = {text: letter for letter, text in OPTION.findall(first.question)}
            for turn in (first, second):
                named = re.search(r"Letters of (.*)\?$", turn.question)
                assert named is not None and turn.answer is not None
                words = named[1].split(", ")
                assert len(words) == LOOKUPS
                assert turn.answer == ", ".join(f"{word} {letter_of[word]}" for word in words)
            assert len(chosen) == CHOICES
            for turn in chosen:
                (answer,) = re.findall(r"^It is: (.+)\.\nOnly give", turn.question)
                assert turn.answer == f"Best option:({letter_of[answer]}) {answer}"


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
    assert seen_in_words(example.scene).count(",") == 3


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
    stories = [text_conversation(WORLD, TELLING[0], index)[0].instruction for index in range(30)]
    assert len(np.unique(np.array(stories, dtype=str))) > 25
