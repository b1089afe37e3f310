"""Matching by the official and the strict rule; intervals and tests against figures from tables or by hand."""

import json
import math
import random
from itertools import product
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stllm.evaluation.scores import (
    chi_square,
    chi_square_p,
    chosen_option,
    gold_option,
    interval,
    official_match,
    paired,
    share,
    sign_flip_p,
    strict_match,
)

CASES = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())["mvbench_match"]
OPTIONS = ["to the left", "To the right.", "upwards"]
WORDS = st.text(alphabet="abcdefghij ", min_size=3).map(str.strip).filter(lambda text: len(text) > 2)
CANDIDATES = st.lists(WORDS, min_size=2, max_size=6, unique=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["pred"] or "empty")
def test_the_official_rule_has_the_published_verdicts(case) -> None:
    assert official_match(case["pred"], case["gt"]) == case["correct"]


@pytest.mark.parametrize("prediction", ["", "(", "(.", ")", "...", ".)"])
def test_empty_predictions_are_correct_officially_and_wrong_strictly(prediction) -> None:
    assert all(official_match(prediction, gold_option(OPTIONS, option)) for option in OPTIONS)
    assert not any(strict_match(prediction, OPTIONS, option) for option in OPTIONS)


@pytest.mark.parametrize(
    ("prediction", "number"),
    [
        ("(B) To the right.", 1),
        ("(B", 1),
        ("(B)", 1),
        ("(b).", 1),
        ("B", 1),
        ("B. to the right", 1),
        ("b: upwards", 1),
        ("((B) to the right", 1),  # the prompt's bracket, and the model's own
        ("(B to the right", 1),
        ("C upwards.", 2),
        ("(to the left", 0),
        ("TO THE LEFT.", 0),
        (" upwards ", 2),
        ("(upwards", 2),
        ("", None),
        ("(", None),
        ("(D) downwards", None),  # there is no such option
        ("D", None),
        ("(AB) x", None),
        ("A person goes up", None),  # an article
        ("C to the left", None),  # letter and text disagree
        ("the answer is (A)", None),
        ("left", None),
        ("to the left or upwards", None),
        ("I think A", None),
        ("(1)", None),
        ("А", None),  # a Cyrillic letter
    ],
)
def test_the_strict_rule_accepts_a_letter_or_a_whole_text(prediction, number) -> None:
    assert chosen_option(prediction, OPTIONS) == number
    assert [strict_match(prediction, OPTIONS, option) for option in OPTIONS] == [
        place == number for place in range(len(OPTIONS))
    ]


def test_an_option_in_brackets_is_found_by_its_text() -> None:
    assert chosen_option("(none)", ["(none)", "some"]) == 0


def test_either_of_two_equal_options_is_correct() -> None:
    twice = ["left", "right", "left"]
    assert gold_option(twice, "left") == "(C) left"  # the official script takes the last one
    assert strict_match("(A)", twice, "left") and strict_match("(C)", twice, "left")
    assert not strict_match("(B)", twice, "left")


def test_gold_option_raises_if_the_answer_is_not_an_option() -> None:
    with pytest.raises(ValueError, match="max"):
        gold_option(["left", "right"], "up")


@given(candidates=CANDIDATES, data=st.data())
def test_the_gold_option_is_correct_by_both_rules_and_others_are_wrong_strictly(candidates, data) -> None:
    answer, other = data.draw(st.permutations(candidates))[:2]
    gold, wrong = gold_option(candidates, answer), gold_option(candidates, other)
    assert official_match(gold, gold) and strict_match(gold, candidates, answer)
    assert not official_match(wrong, gold) and not strict_match(wrong, candidates, answer)


@given(candidates=CANDIDATES, number=st.integers(0, 25))
def test_a_letter_alone_names_the_option_of_that_place(candidates, number) -> None:
    expected = number if number < len(candidates) else None
    for form in ("({})", "({}", "{}", "{}.", "{})"):
        assert chosen_option(form.format(ascii_uppercase[number]), candidates) == expected


@given(candidates=CANDIDATES, prediction=st.text(max_size=20))
def test_no_prediction_is_strictly_right_for_two_options(candidates, prediction) -> None:
    assert sum(strict_match(prediction, candidates, option) for option in candidates) <= 1


@given(prediction=st.text(max_size=20), gold=st.sampled_from(["(a) x", "(B) y"]))
def test_the_official_rule_ignores_case(prediction, gold) -> None:
    assert official_match(prediction, gold) == official_match(prediction.lower(), gold.upper())


# ---- chance ---------------------------------------------------------------------------------------------------------


def pairs(items: int, lost: int, gained: int) -> dict[str, Any]:
    """Compare two runs: `lost` items are correct only in the first, `gained` only in the second, the rest in none."""
    first = [True] * lost + [False] * (items - lost)
    second = [False] * lost + [True] * gained + [False] * (items - lost - gained)
    return paired(first, second)


def test_pairs_are_counted_item_by_item() -> None:
    found = paired([True, True, False, False], [True, False, True, False])
    assert (found["items"], found["lost"], found["gained"]) == (4, 1, 1)
    with pytest.raises(ValueError, match="zip"):
        paired([True], [])


def test_the_exact_p_value() -> None:
    assert pairs(20, lost=5, gained=0)["p"] == pytest.approx(2 / 32)
    assert pairs(20, lost=8, gained=2)["p"] == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert pairs(20, lost=3, gained=3)["p"] == pairs(20, lost=0, gained=0)["p"] == 1.0
    assert 0 < pairs(4000, lost=1500, gained=1000)["p"] < 1e-20  # larger than any float on the way


def test_the_exact_p_value_by_cluster() -> None:
    """Computed by hand: clusters with +2, +1 and -1 have the sums -4, -2, -2, 0, 0, 2, 2, 4 under all signs."""
    first, second = [False, False, False, True], [True, True, True, False]
    assert paired(first, second)["p"] == pytest.approx(2 * (1 + 4) / 16)  # McNemar's
    assert paired(first, second, ["a", "a", "b", "c"])["p"] == pytest.approx(6 / 8)
    assert paired(first, second, ["a", "a", "b", "b"])["p"] == 1.0  # one cluster changed
    assert paired(first, second, ["a"] * 4)["p"] == 1.0
    assert sign_flip_p([5]) == sign_flip_p([0]) == sign_flip_p([]) == 1


@given(nets=st.lists(st.integers(-4, 4), max_size=8))
def test_the_p_value_by_cluster_equals_an_enumeration(nets: list[int]) -> None:
    sums = [
        abs(sum(sign * net for sign, net in zip(signs, nets, strict=True)))
        for signs in product((1, -1), repeat=len(nets))
    ]
    assert sign_flip_p(nets) == pytest.approx(sum(one >= abs(sum(nets)) for one in sums) / len(sums))


def test_paired_difference_and_interval() -> None:
    found = pairs(100, lost=20, gained=5)
    assert found["difference"] == -15
    spread = 1.959964 * math.sqrt((26 / 102 - (15 / 102) ** 2) / 102)
    assert found["interval"] == pytest.approx((100 * (-15 / 102 - spread), 100 * (-15 / 102 + spread)))
    assert pairs(1, lost=1, gained=0)["interval"] == pytest.approx((-100.0, 51.01), abs=0.01)
    assert pairs(0, lost=0, gained=0)["difference"] is None and pairs(0, lost=0, gained=0)["interval"] is None


@pytest.mark.parametrize(
    ("value", "degrees"), [(3.841459, 1), (5.991465, 2), (7.814728, 3), (9.487729, 4), (11.070498, 5)]
)
def test_chi_square_at_its_five_percent_points(value: float, degrees: int) -> None:
    assert chi_square_p(value, degrees) == pytest.approx(0.05, abs=1e-6)


def test_chi_square_without_data_is_not_significant() -> None:
    assert chi_square_p(0.0, 3) == 1.0 and chi_square_p(5.0, 0) == 1.0
    assert chi_square([10, 0], [5, 5]) == 10.0
    assert chi_square([], []) == 0.0 and chi_square([3, 1], [4, 0]) == 0.25


def test_share_of_nothing_is_none() -> None:
    assert share(0, 0) is None and share(1, 4) == 25


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_wilsons_interval_where_every_item_has_its_own_video() -> None:
    """Figures from tables of Wilson's interval (1927): 49.0 to 94.3 for 8 of 10, and 0 to 27.8 for 0 of 10."""
    videos = [str(number) for number in range(10)]
    assert interval([1.0] * 8 + [0.0] * 2, videos, high=100) == pytest.approx([49.02, 94.33], abs=0.01)
    assert interval([0.0] * 10, videos, high=100) == pytest.approx([0.0, 27.75], abs=0.01)
    assert interval([], [], high=100) is None


def test_the_error_is_clustered_by_video() -> None:
    """Four videos with three questions each: all correct in two, none in one, one of three in the last."""
    right = [1.0] * 6 + [0.0] * 3 + [1.0, 0.0, 0.0]
    videos = [name for name in "abcd" for _ in range(3)]
    mean, sums = 7 / 12, [3 - 3 * 7 / 12] * 2 + [-3 * 7 / 12, 1 - 3 * 7 / 12]
    error = sum(value**2 for value in sums) ** 0.5 / 12
    assert interval(right, videos, high=1) == pytest.approx([mean - 1.959964 * error, 1.0])  # no accuracy is above it
    alone = interval(right, [str(number) for number in range(12)], high=1)
    assert alone is not None and alone[1] - alone[0] < 2 * 1.959964 * error  # as if they were independent


def test_a_standard_error_of_zero_gives_wilsons_interval() -> None:
    """If all videos agree, the interval is Wilson's over the videos, not a single point."""
    videos = [name for name in "abcde" for _ in range(4)]
    assert interval([1.0] * 20, videos, high=100) == pytest.approx([56.55, 100.0], abs=0.01)
    assert interval([1.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b"], high=100) == pytest.approx([9.45, 90.55], abs=0.01)


def test_the_mean_over_tasks_weighs_small_tasks_as_large_ones() -> None:
    """The variance is the sum over tasks of share * (1 - share) / items, divided by the squared number of tasks."""
    values, tasks = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], ["small"] * 2 + ["large"] * 4
    found = interval(values, [str(number) for number in range(6)], strata=tasks, high=1)
    error = (0.25 / 2 + 0.25 / 4) ** 0.5 / 2
    assert found == pytest.approx([0.5 - 1.959964 * error, 0.5 + 1.959964 * error])


def test_coverage_of_clustered_intervals() -> None:
    """95 % intervals contain the true value in about 95 % of draws; intervals that ignore clusters do not."""
    generator = random.Random(0)
    held = {"clustered": 0, "independent": 0}
    for _ in range(400):
        values, videos = [], []
        for video in range(60):
            share = generator.choice((0.2, 0.8))  # questions about a video are alike
            values += [float(generator.random() < share) for _ in range(8)]
            videos += [str(video)] * 8
        for name, clusters in (("clustered", videos), ("independent", [str(place) for place in range(480)])):
            low, high = interval(values, clusters, high=1) or (1, 0)
            held[name] += low <= 0.5 <= high
    assert 0.92 < held["clustered"] / 400 < 0.98 and held["independent"] / 400 < 0.85
