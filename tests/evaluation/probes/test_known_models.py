"""What the probes say of models that are known to use time or not, to read the options or a letter alone."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.evaluation.probes.permutation import (
    num_rotations,
    permutation_bars,
    permutation_report,
    permutation_scores,
    rotated,
)
from stllm.evaluation.probes.temporal import probe_bars, probe_report, probe_scores, viewed
from stllm.evaluation.reports.charts import bars_figure
from stllm.media.views import VIEWS, view_order
from tests.helpers.benchmarks import choice_benchmark, choice_item, letter_of, lines_of

ORDERED, OTHER = "Moving Direction", "Object Existence"
BENCHMARK = choice_benchmark([choice_item(number, task) for task in (ORDERED, OTHER) for number in range(40)])


def runs_of(answer: Callable[[Item], str | None], benchmark: Loaded = BENCHMARK) -> dict[str, list[Record]]:
    return {view: lines_of(viewed(benchmark, view), answer) for view in VIEWS}


def sees_frames_not_order(item: Item) -> str:
    """Right whenever there is a picture, whatever its order."""
    assert item.media
    return letter_of(item, item.answer if item.media.view != "blank" else item.candidates[0])


def sees_order(item: Item) -> str:
    """Follows what moves: in the tasks of order it is right only while the frames are in order."""
    assert item.media
    view = item.media.view
    in_order = view != "blank" and view_order(view, 4) == [0, 1, 2, 3]
    right = in_order or (item.task == OTHER and view != "blank")
    return letter_of(item, item.answer if right else item.candidates[0])


def guesses(item: Item) -> str:
    """Another guess for every view, as good or bad in each."""
    assert item.media
    draw = hashlib.blake2b(f"{item.id} {item.media.view}".encode()).digest()[0]
    return letter_of(item, item.candidates[draw % 4])


def test_a_model_that_ignores_order_is_told_so() -> None:
    scores = probe_scores(runs_of(sees_frames_not_order))
    assert scores["accuracy"]["all tasks"] == dict(zip(VIEWS, (100.0, 100.0, 100.0, 100.0, 25.0), strict=True))
    found = scores["against forward"][ORDERED]["reversed"]
    assert (found["difference"], found["lost"], found["gained"], found["p"]) == (0.0, 0, 0, 1.0)
    assert found["answers changed"] == 0.0
    assert scores["verdict"].startswith("The model does not use time: it gives the same answers whatever the order")
    assert "It does not do significantly better than with one frame" in scores["verdict"]
    assert "It does better than with no picture at all" in scores["verdict"]


def test_a_model_that_depends_on_order_is_told_so() -> None:
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


def test_a_guesser_is_not_said_to_use_time() -> None:
    scores = probe_scores(runs_of(guesses))
    assert scores["verdict"].startswith("No sign that the model uses time")
    assert scores["against forward"]["all tasks"]["reversed"]["answers changed"] > 50


def test_a_few_items_are_no_evidence() -> None:
    few = choice_benchmark([choice_item(number) for number in range(4)])
    assert probe_scores(runs_of(sees_order, few))["verdict"].startswith("No sign that the model uses time")


def test_tasks_of_unknown_kind_are_judged_together() -> None:
    own = choice_benchmark([choice_item(number, "My task") for number in range(8)])
    scores = probe_scores(runs_of(sees_frames_not_order, own))
    assert "On 8 items of all tasks" in scores["verdict"] and scores["accuracy"]["tasks of order"]["forward"] is None


def test_only_items_answered_in_every_view_are_compared() -> None:
    runs = runs_of(sees_order)
    runs["reversed"] = lines_of(viewed(BENCHMARK, "reversed"), lambda item: None if item.id.endswith("/1") else "A")
    scores = probe_scores(runs)
    assert scores["compared"] == 78 and scores["failed"]["reversed"] == 2 and scores["failed"]["forward"] == 0
    assert scores["against forward"]["all tasks"]["shuffled"]["items"] == 78


def test_nothing_answered_says_nothing() -> None:
    scores = probe_scores(runs_of(lambda item: None))
    assert scores["verdict"] == "Nothing can be said: no item was answered in every view."
    assert "nan" not in (json.dumps(scores, allow_nan=False) + probe_report("toy", scores)).lower()


def test_the_report_and_the_chart_show_the_accuracies() -> None:
    scores = probe_scores(runs_of(sees_order))
    report = probe_report("toy", scores)
    assert (
        "| strict %         | forward | reversed | shuffled | single | blank | chance |\n"
        "| ---------------- | ------: | -------: | -------: | -----: | ----: | -----: |\n"
        "| all tasks        |   100.0 |     62.5 |     62.5 |   62.5 |  25.0 |   25.0 |\n"
        "| tasks of order   |   100.0 |     25.0 |     25.0 |   25.0 |  25.0 |   25.0 |\n"
        "| other tasks      |   100.0 |    100.0 |    100.0 |  100.0 |  25.0 |   25.0 |\n"
        "| Moving Direction |   100.0 |     25.0 |     25.0 |   25.0 |  25.0 |   25.0 |\n"
        "| Object Existence |   100.0 |    100.0 |    100.0 |  100.0 |  25.0 |   25.0 |\n"
    ) in report
    assert scores["verdict"] in report
    axes = bars_figure(probe_bars(scores)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all tasks", "tasks of order", "other tasks"]
    assert [container.get_label() for container in axes.containers] == list(VIEWS)
    assert [bar.get_width() for bar in axes.containers[1]] == [62.5, 25.0, 100.0]


# ---- option permutations --------------------------------------------------------------------------------------------

YES_NO = choice_benchmark(
    [*map(choice_item, range(40)), *(choice_item(number, OTHER, ("yes", "no")) for number in range(20))]
)


def permuted(answer: Callable[[Item], str | None], benchmark: Loaded = YES_NO) -> Mapping[str, Any]:
    variants = [benchmark, *(rotated(benchmark, places) for places in range(1, num_rotations(benchmark)))]
    return permutation_scores(variants, [lines_of(variant, answer) for variant in variants])


def test_always_a_is_seen_to_favour_a() -> None:
    scores = permuted(lambda item: "A")
    assert scores["items"] == {"0": 60, "1": 60, "2": 40, "3": 40}
    assert scores["accuracy"] == {
        "0": pytest.approx(100 * 20 / 60),
        "1": pytest.approx(100 * 20 / 60),
        "2": 25.0,
        "3": 25.0,
    }
    share_of_a = 100 * (40 + 20) / 200  # each answer is A once
    assert scores["mean"] == share_of_a == scores["letters"]["gold"]["A"] == scores["letters"]["even"]["A"]
    assert scores["letters"]["chosen"] == {"A": 100.0, "B": 0.0, "C": 0.0, "D": 0.0, "none": 0.0}
    assert scores["right under all"] == 0.0 and scores["right under any"] == 100.0
    assert scores["same text under all"] == 0.0
    assert scores["letters"]["chi-square"] == pytest.approx(60 * ((1 - 0.3) ** 2 / 0.3 + 0.3 + 2 * 0.2))  # 60 draws
    assert scores["verdict"].startswith(
        "The model favours A: 100.0% of the 200 predictions that name one, 30.0% if even"
    )


def test_a_model_that_reads_the_options_favours_no_letter() -> None:
    scores = permuted(lambda item: letter_of(item, item.answer))
    assert scores["mean"] == scores["right under all"] == scores["same text under all"] == 100.0
    assert scores["letters"]["chi-square"] == 0.0 and scores["letters"]["p"] == 1.0
    assert scores["verdict"].startswith("No sign that the model favours a letter")


def test_consistency_is_of_the_text_right_or_wrong() -> None:
    scores = permuted(lambda item: letter_of(item, "down" if "down" in item.candidates else "no"))
    assert scores["same text under all"] == 100.0
    assert scores["right under all"] == scores["right under any"] == pytest.approx(100 * 20 / 60)


def test_an_empty_answer_names_no_letter() -> None:
    scores = permuted(lambda item: "")
    assert scores["mean"] == 0.0 and scores["official"]["0"] == 100.0  # how far the official rule is inflated
    assert scores["letters"]["chosen"]["none"] == 100.0 and scores["same text under all"] == 0.0
    assert scores["verdict"] == "Nothing can be said about letters: no prediction names an option."


def test_failed_lines_leave_their_item_out_of_what_needs_all_rotations() -> None:
    failing = lambda item: None if item.id.endswith("/1") and item.candidates[0] in ("up", "yes") else "A"  # noqa: E731
    scores = permuted(failing)
    assert scores["failed"] == 2 and scores["complete"] == 58
    assert "nan" not in permutation_report("toy", permuted(lambda item: None)).lower()
    json.dumps(permuted(lambda item: None), allow_nan=False)


def test_no_items_at_all_give_no_nan() -> None:
    empty = choice_benchmark([])
    scores = permutation_scores([empty], [[]])
    assert scores["mean"] is None
    json.dumps(scores, allow_nan=False)
    assert bars_figure(permutation_bars(scores)).axes


def test_the_report_shows_letters() -> None:
    report = permutation_report("toy", permuted(lambda item: "A"))
    assert (
        "| letter | predictions % | answers % | even share % |\n"
        "| ------ | ------------: | --------: | -----------: |\n"
        "| A      |         100.0 |      30.0 |         30.0 |\n"
        "| B      |           0.0 |      30.0 |         30.0 |\n"
        "| C      |           0.0 |      20.0 |         20.0 |\n"
        "| D      |           0.0 |      20.0 |         20.0 |\n"
        "| none   |           0.0 |         – |            – |\n"
    ) in report
    bars = bars_figure(permutation_bars(permuted(lambda item: "A"))).axes[0].containers[0]
    assert [bar.get_width() for bar in bars] == [100.0, 0.0, 0.0, 0.0, 0.0]
