"""Clips that run backwards with what is asked turned round: which items, and what it shows of known models."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from stllm.evaluation.benchmarks.base import Item
from stllm.evaluation.probes.temporal import ORDER_TASKS, probe_report, probe_scores, viewed
from stllm.evaluation.probes.turned_round import turned_item, turned_round
from stllm.media.views import VIEWS
from tests.helpers.benchmarks import choice_benchmark, choice_item, letter_of, lines_of


@pytest.mark.parametrize(
    ("question", "answer", "options", "turned"),
    [
        ("Which way?", "to the left", ("to the left", "to the right"), ("Which way?", "to the right")),
        (
            "Which way?",
            "Up and to the left.",
            ("Down and to the right.", "Up and to the left."),
            ("", "Down and to the"),
        ),
        ("Which way?", "downwards", ("upwards", "downwards"), ("Which way?", "upwards")),
        ("How?", "from wavy to plain", ("from plain to wavy", "from wavy to plain"), ("How?", "from plain to wavy")),
        ("How?", "wavy to plain", ("plain to wavy", "wavy to plain"), ("How?", "plain to wavy")),
        ("What does it do first?", "it jumps", ("it jumps", "it grows"), ("What does it do last?", "it jumps")),
        ("What color at the end?", "red", ("red", "blue"), ("What color at the beginning?", "red")),
        ("Which way?", "to the left", ("to the left", "upwards"), None),  # the opposite is no option
        ("What does it do after it jumps?", "it grows", ("it jumps", "it grows"), None),
    ],
)
def test_words_say_how_an_item_is_turned_round(
    question: str, answer: str, options: tuple[str, ...], turned: tuple[str, str] | None
) -> None:
    item = replace(choice_item(0), questions=(question,), answer=answer, candidates=options)
    found = turned_item(item)
    if turned is None:
        assert found is None
        return
    assert found is not None and found.candidates == options and found.id == item.id
    assert found.questions[0].startswith(turned[0]) and found.answer.startswith(turned[1])
    assert turned_item(found) == item  # twice is not at all


def test_only_tasks_of_order_are_asked_of_reversed_clips() -> None:
    benchmark = choice_benchmark(
        [choice_item(0), choice_item(1, "Object Existence"), replace(choice_item(2), media=None)]
    )
    (item,) = turned_round(benchmark, ORDER_TASKS).items
    assert item.id == "moving_direction/0" and item.media is not None and item.media.view == "reversed"
    assert item.answer == "down"


BENCHMARK = choice_benchmark([choice_item(number) for number in range(40)])  # up, down, left, right
OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}


def probed(answer: Callable[[Item], str]) -> dict[str, dict[str, float]]:
    runs = {view: lines_of(viewed(BENCHMARK, view), answer) for view in VIEWS}
    scores = probe_scores(runs, lines_of(turned_round(BENCHMARK, ORDER_TASKS), answer))
    assert "## Turned round" in probe_report("toy", scores)
    assert scores["turned round"]["Moving Direction"] == scores["turned round"]["all of them"]
    assert "40 items whose clips run backwards" in scores["verdict"]
    found: dict[str, dict[str, float]] = scores["turned round"]
    return found


def moves(item: Item) -> str:
    """What the clip of that number shows, forward."""
    return item.candidates[int(item.id.split("/")[1]) % 4]


def follows(item: Item) -> str:
    assert item.media is not None
    return letter_of(item, OPPOSITE[moves(item)] if item.media.view == "reversed" else moves(item))


def test_a_model_that_follows_time_is_right_when_turned_round() -> None:
    expected = {"items": 40, "forward": 100.0, "reversed": 0.0, "turned": 100.0}
    assert probed(follows)["all of them"] == expected


def test_a_model_that_ignores_order_is_wrong_when_turned_round() -> None:
    expected = {"items": 40, "forward": 100.0, "reversed": 100.0, "turned": 0.0}
    assert probed(lambda item: letter_of(item, moves(item)))["all of them"] == expected


def test_chance_stands_beside_the_views() -> None:
    two = choice_benchmark([choice_item(0), choice_item(0, "Object Existence", ("yes", "no"))])
    scores = probe_scores({view: lines_of(viewed(two, view), lambda item: "A") for view in VIEWS})
    assert scores["chance"] == {
        "all tasks": 37.5,
        "tasks of order": 25.0,
        "other tasks": 50.0,
        "Moving Direction": 25.0,
        "Object Existence": 50.0,
    }
    assert "turned round" not in scores
