"""Tests of chance against figures computed by hand or known from tables."""

import math

import pytest

from stllm.evaluation.reports.significance import Paired, chi_square, chi_square_p, paired


def test_pairs_are_counted_item_by_item() -> None:
    assert paired([True, True, False, False], [True, False, True, False]) == Paired(items=4, lost=1, gained=1)
    with pytest.raises(ValueError, match="zip"):
        paired([True], [])


def test_the_exact_p_value() -> None:
    assert Paired(items=20, lost=5, gained=0).p_value == pytest.approx(2 / 32)
    assert Paired(items=20, lost=8, gained=2).p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert Paired(items=20, lost=3, gained=3).p_value == 1.0
    assert Paired(items=20, lost=0, gained=0).p_value == 1.0
    assert 0 < Paired(items=4000, lost=1500, gained=1000).p_value < 1e-20  # larger than any float on the way


def test_difference_and_interval() -> None:
    pair = Paired(items=100, lost=20, gained=5)
    assert pair.difference == -15
    low, high = pair.interval or (0, 0)
    spread = 1.959964 * math.sqrt((26 / 102 - (15 / 102) ** 2) / 102)
    assert (low, high) == pytest.approx((100 * (-15 / 102 - spread), 100 * (-15 / 102 + spread)))
    assert Paired(items=1, lost=1, gained=0).interval == pytest.approx((-100.0, 51.01), abs=0.01)
    assert Paired(items=0, lost=0, gained=0).difference is None and Paired(items=0, lost=0, gained=0).interval is None


@pytest.mark.parametrize(
    ("value", "degrees"), [(3.841459, 1), (5.991465, 2), (7.814728, 3), (9.487729, 4), (11.070498, 5)]
)
def test_chi_square_at_its_five_percent_points(value: float, degrees: int) -> None:
    assert chi_square_p(value, degrees) == pytest.approx(0.05, abs=1e-6)


def test_chi_square_of_nothing_is_no_finding() -> None:
    assert chi_square_p(0.0, 3) == 1.0 and chi_square_p(5.0, 0) == 1.0
    assert chi_square([10, 0], [5, 5]) == 10.0
    assert chi_square([], []) == 0.0 and chi_square([3, 1], [4, 0]) == 0.25
