"""What the toy world asks: answers that hold in the scene, that one frame does not tell, and no turn another's."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from stllm.toy.questions import ACTIONS, PLACES, Example, place_of
from stllm.toy.scenes import Thing, follow
from stllm.toy.tasks import PICTURES, RARE, TASKS, ToyTask, World

COUNT = 300
BY_NAME = {task.make.__name__: task for task in (*TASKS, RARE, PICTURES)}


@cache
def drawn(name: str, count: int = COUNT) -> list[Example]:
    return [World(1, 16).draw(BY_NAME[name], "test", index)[0] for index in range(count)]


def best_guess(answers: list[str], seen: list[object]) -> float:
    """The accuracy of the best guess from what is seen."""
    groups: dict[object, Counter[str]] = {}
    for answer, sight in zip(answers, seen, strict=True):
        groups.setdefault(sight, Counter())[answer] += 1
    return sum(max(group.values()) for group in groups.values()) / len(answers)


# ---- one frame, or the frames without an order, do not tell --------------------------------------------------------


def opacities(thing: Thing, num_frames: int = 16) -> np.ndarray:
    return follow(thing, (np.arange(num_frames) + 0.5) / num_frames).opacity


@pytest.mark.parametrize("seen", ["the middle frame", "the mean of all"])
def test_blinks_cannot_be_counted_without_time(seen: str) -> None:
    examples = drawn("action_count")
    shown = [opacities(example.scene.things[0]) for example in examples]
    sights = [float(each[8]) if seen == "the middle frame" else round(float(each.mean()), 3) for each in shown]
    assert best_guess([example.asked[0].answer for example in examples], list(sights)) < 0.42  # of three
    for example, each in zip(examples, shown, strict=True):
        assert sum(before > after for before, after in pairwise(each)) == int(example.asked[0].answer)
        assert each[0] == each[-1] == 1


@pytest.mark.parametrize("num_frames", [8, 12, 16, 32, 64])
def test_no_blink_is_missed_whatever_the_number_of_frames(num_frames: int) -> None:
    for example in drawn("action_count", 60):
        shown = opacities(example.scene.things[0], num_frames)
        assert sum(before > after for before, after in pairwise(np.r_[1, shown])) == int(example.asked[0].answer)


def test_the_middle_frame_is_as_often_before_a_change_as_after_it() -> None:
    changes = {
        "state_change": lambda example: example.scene.things[0].events[0].start + 1.5 / 32,
        "scene_transition": lambda example: example.scene.cut.time,
    }
    for name, moment in changes.items():
        moments = np.array([moment(example) for example in drawn(name)])
        assert 0.42 < (moments <= 8 / 16).mean() < 0.58 and not (moments == 8 / 16).any()
        assert abs(moments.mean() - 8 / 16) < 0.02  # so that the share of frames tells nothing either


def test_movers_stand_in_the_middle_frame_where_others_stand() -> None:
    for name in ("moving_direction", "object_existence"):
        for example in drawn(name, 60):
            for thing in example.scene.things:
                track = follow(thing, np.array([0.0, 0.5, 1.0]))
                assert np.hypot(track.x[1] - thing.x, track.y[1] - thing.y) < 3
                moved = np.hypot(track.x[2] - track.x[0], track.y[2] - track.y[0])
                assert moved == pytest.approx(0) or moved > 14


@pytest.mark.parametrize(
    ("name", "reverse"), [("moving_direction", {"left": "right", "up": "down"}), ("scene_transition", None)]
)
def test_the_answer_backwards_is_an_option(name: str, reverse: dict[str, str] | None) -> None:
    for example in drawn(name, 60):
        answer, options = example.asked[0].answer, example.asked[0].options
        if reverse is None:
            before, _, after = answer.split()
            assert f"{after} to {before}" in options
        else:
            assert {**reverse, **{after: before for before, after in reverse.items()}}[answer] in options


def test_colors_before_and_after_are_options_of_both_questions() -> None:
    for example in drawn("state_change", 60):
        first, second = example.asked
        assert {first.answer, second.answer} <= set(first.options) & set(second.options)
        assert first.answer != second.answer and ("beginning" in first.question) != ("beginning" in second.question)


def test_what_comes_after_is_not_the_only_other_action_seen() -> None:
    asked_after = 0
    for example in drawn("action_sequence"):
        assert example.bounds is not None
        start, end = example.bounds
        within = [event for event in example.scene.things[0].events if start <= event.start and event.end <= end]
        for asked in example.asked:
            texts = [ACTIONS[event.kind] for event in within]
            match = re.search(r"do (first|last|after it (.*))\?", asked.question)
            assert match is not None
            if match[2]:
                assert len(within) == 3 and asked.answer == texts[texts.index(match[2]) + 1]
                asked_after += 1
            else:
                assert asked.answer == texts[{"first": 0, "last": -1}[match[1]]]
            assert set(asked.options) == set(ACTIONS.values())
    assert asked_after > COUNT / 4


def test_a_rare_event_shows_in_two_or_three_frames_of_64() -> None:
    counts = Counter(int(opacities(example.scene.things[-1], 64).sum()) for example in drawn("rare_event"))
    assert set(counts) == {2, 3} and min(counts.values()) > 0.4 * COUNT
    for example in drawn("rare_event", 60):
        assert [asked.answer for asked in example.asked] == [
            example.scene.things[-1].color,
            f"a {example.scene.things[-1].shape}",
        ]


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, task in BY_NAME.items() if drawn(name, 1)[0].asked])
def test_no_letter_is_preferred_in_any_question(name: str) -> None:
    asked = [question for example in drawn(name, 200) for question in example.asked]
    places = np.array([(each.options.index(each.answer) + 0.5) / len(each.options) for each in asked])
    assert abs(places.mean() - 0.5) < 4 * 0.29 / len(asked) ** 0.5  # four standard errors
    assert all(len(set(each.options)) == len(each.options) and each.answer in each.options for each in asked)


def test_pictures_say_where_things_are() -> None:
    assert {place_of(Thing("red", "circle", x, y, 5)) for x, y in PLACES.values()} == set(PLACES)
    for example in drawn("picture", 100):
        for thing in example.scene.things:
            assert f"{thing.name} {place_of(thing)}" in example.story
        answers = {asked.question: asked.answer for asked in example.asked}
        assert answers["How many things are there?"] == str(len(example.scene.things))
        for question, answer in answers.items():
            if match := re.match(r"Is the (.*) (left of|above) or (.*) the (.*)\?", question):
                first, second = (
                    next(thing for thing in example.scene.things if thing.name == match[n]) for n in (1, 4)
                )
                side: Callable[[Thing], int] = (lambda thing: thing.x) if match[2] == "left of" else (lambda t: t.y)
                assert (answer == match[2]) == (side(first) < side(second))


def test_every_task_has_a_place_of_its_own() -> None:
    names = [task.corpus for task in (*TASKS, RARE, PICTURES)]
    assert len(set(names)) == len(names)
    tested: list[ToyTask] = [task for task in (*TASKS, RARE) if task.benchmark]
    assert len({task.benchmark for task in tested}) == len(tested) == 7
