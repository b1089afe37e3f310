"""The temporal probe: its items, and its verdicts on models that are known to use the order of frames or not."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.evaluation.probes.temporal import bars, probe_scores, report, turned_item, variants, viewed
from stllm.evaluation.reports.tables import bars_figure
from stllm.media.views import VIEWS, view_order
from tests.helpers.benchmarks import choice_benchmark, choice_item, letter_of, lines_of

ORDERED, OTHER = "Moving Direction", "Object Existence"
BENCHMARK = choice_benchmark([choice_item(number, task) for task in (ORDERED, OTHER) for number in range(40)])


def runs_of(answer: Callable[[Item], str | None], benchmark: Loaded = BENCHMARK) -> dict[str, list[Record]]:
    return {view: lines_of(viewed(benchmark, view), answer) for view in VIEWS}


def sees_frames_not_order(item: Item) -> str:
    """Answer correctly whenever frames are visible, in any order."""
    assert item.media
    return letter_of(item, item.answer if item.media.view != "blank" else item.candidates[0])


def sees_order(item: Item) -> str:
    """Answer correctly in the tasks of order only if the frames are in order."""
    assert item.media
    view = item.media.view
    in_order = view != "blank" and view_order(view, 4) == [0, 1, 2, 3]
    right = in_order or (item.task == OTHER and view != "blank")
    return letter_of(item, item.answer if right else item.candidates[0])


def guesses(item: Item) -> str:
    """Guess differently in every view, with the same accuracy."""
    assert item.media
    draw = hashlib.blake2b(f"{item.id} {item.media.view}".encode()).digest()[0]
    return letter_of(item, item.candidates[draw % 4])


def test_the_verdict_on_a_model_that_ignores_order() -> None:
    scores = probe_scores(runs_of(sees_frames_not_order))
    assert scores["accuracy"]["all tasks"] == dict(zip(VIEWS, (100.0, 100.0, 100.0, 100.0, 25.0), strict=True))
    found = scores["against forward"][ORDERED]["reversed"]
    assert (found["difference"], found["lost"], found["gained"], found["p"]) == (0.0, 0, 0, 1.0)
    assert found["answers changed"] == 0.0
    assert scores["verdict"].startswith("The model does not use time: it gives the same answers whatever the order")
    assert "It does not do significantly better than with one frame" in scores["verdict"]
    assert "It does better than with no picture at all" in scores["verdict"]


def test_the_verdict_on_a_model_that_uses_order() -> None:
    scores = probe_scores(runs_of(sees_order))
    assert scores["accuracy"]["tasks of order"] == dict(zip(VIEWS, (100.0, 25.0, 25.0, 25.0, 25.0), strict=True))
    assert scores["accuracy"]["other tasks"] == dict(zip(VIEWS, (100.0, 100.0, 100.0, 100.0, 25.0), strict=True))
    found = scores["against forward"]["tasks of order"]["shuffled"]
    assert (found["items"], found["lost"], found["gained"], found["difference"]) == (40, 30, 0, -75.0)
    assert found["p"] == pytest.approx(2 / 2**30) and found["answers changed"] == 75.0
    low, high = found["interval"]
    assert low < -75 < high < -55
    assert scores["verdict"].startswith(
        "The model uses time: with the frames reversed and with them shuffled, strict accuracy falls. "
        "On 40 items of tasks of order, reversed: -75.0 points, 95% interval -85.9 to -57.0, p = 3.7e-09 for 2 tests; "
    )


def test_the_verdict_on_a_model_that_guesses() -> None:
    scores = probe_scores(runs_of(guesses))
    assert scores["verdict"].startswith("No sign that the model uses time")
    assert scores["against forward"]["all tasks"]["reversed"]["answers changed"] > 50


def test_few_items_give_no_significant_verdict() -> None:
    few = choice_benchmark([choice_item(number) for number in range(4)])
    assert probe_scores(runs_of(sees_order, few))["verdict"].startswith("No sign that the model uses time")


def test_a_verdict_without_known_tasks_uses_all_items() -> None:
    own = choice_benchmark([choice_item(number, "My task") for number in range(8)])
    scores = probe_scores(runs_of(sees_frames_not_order, own))
    assert "On 8 items of all tasks" in scores["verdict"] and scores["accuracy"]["tasks of order"]["forward"] is None


def test_only_items_answered_in_every_view_are_compared() -> None:
    runs = runs_of(sees_order)
    runs["reversed"] = lines_of(viewed(BENCHMARK, "reversed"), lambda item: None if item.id.endswith("/1") else "A")
    scores = probe_scores(runs)
    assert scores["compared"] == 78 and scores["failed"]["reversed"] == 2 and scores["failed"]["forward"] == 0
    assert scores["against forward"]["all tasks"]["shuffled"]["items"] == 78


def test_no_verdict_without_answers() -> None:
    scores = probe_scores(runs_of(lambda item: None))
    assert scores["verdict"] == "Nothing can be said: no item was answered in every view."
    assert "nan" not in (json.dumps(scores, allow_nan=False) + report("toy", scores)).lower()


def test_the_report_and_the_chart_show_the_accuracies() -> None:
    scores = probe_scores(runs_of(sees_order))
    text = report("toy", scores)
    assert (
        "| strict %         | forward | reversed | shuffled | single | blank | chance |\n"
        "| ---------------- | ------: | -------: | -------: | -----: | ----: | -----: |\n"
        "| all tasks        |   100.0 |     62.5 |     62.5 |   62.5 |  25.0 |   25.0 |\n"
        "| tasks of order   |   100.0 |     25.0 |     25.0 |   25.0 |  25.0 |   25.0 |\n"
        "| other tasks      |   100.0 |    100.0 |    100.0 |  100.0 |  25.0 |   25.0 |\n"
        "| Moving Direction |   100.0 |     25.0 |     25.0 |   25.0 |  25.0 |   25.0 |\n"
        "| Object Existence |   100.0 |    100.0 |    100.0 |  100.0 |  25.0 |   25.0 |\n"
    ) in text
    assert scores["verdict"] in text
    axes = bars_figure(bars(scores)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all tasks", "tasks of order", "other tasks"]
    assert [container.get_label() for container in axes.containers] == list(VIEWS)
    assert [bar.get_width() for bar in axes.containers[1]] == [62.5, 25.0, 100.0]


# ---- variants --------------------------------------------------------------------------------------------------------


def test_views_change_only_the_media() -> None:
    assert variants(BENCHMARK)["forward"] is BENCHMARK
    for view in VIEWS[1:]:
        variant = variants(BENCHMARK)[view]
        for item, original in zip(variant.items, BENCHMARK.items, strict=True):
            assert item.media and item.media.view == view
            assert original.media and item == replace(original, media=replace(original.media, view=view))


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
def test_turned_items_by_their_wording(
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


def test_only_tasks_of_order_are_turned() -> None:
    benchmark = choice_benchmark(
        [choice_item(0), choice_item(1, "Object Existence"), replace(choice_item(2), media=None)]
    )
    (item,) = variants(benchmark)["turned"].items
    assert item.id == "moving_direction/0" and item.media is not None and item.media.view == "reversed"
    assert item.answer == "down"


MOVES = choice_benchmark([choice_item(number) for number in range(40)])  # up, down, left, right
OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}


def probed(answer: Callable[[Item], str]) -> dict[str, dict[str, float]]:
    scores = probe_scores({name: lines_of(variant, answer) for name, variant in variants(MOVES).items()})
    assert "## Turned round" in report("toy", scores)
    assert scores["turned round"]["Moving Direction"] == scores["turned round"]["all of them"]
    assert "40 items whose clips run backwards" in scores["verdict"]
    found: dict[str, dict[str, float]] = scores["turned round"]
    return found


def moves(item: Item) -> str:
    """Return what the item's clip shows when played forward."""
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


def test_scores_contain_chance() -> None:
    two = choice_benchmark([choice_item(0), choice_item(0, "Object Existence", ("yes", "no"))])
    scores = probe_scores(runs_of(lambda item: "A", two))
    assert scores["chance"] == {
        "all tasks": 37.5,
        "tasks of order": 25.0,
        "other tasks": 50.0,
        "Moving Direction": 25.0,
        "Object Existence": 50.0,
    }
    assert "turned round" not in scores
