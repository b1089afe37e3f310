"""Comparison with committed results: which ratios are compared, and which are better."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import RESULTS
from benchmarks.comparison import changes, committed, label
from benchmarks.measurements import MEASUREMENTS, Measurement

COMMITTED = [path for path in sorted(RESULTS.glob("**/*.json")) if path.stem in MEASUREMENTS]
MEASUREMENT = Measurement("?", ("name", "workers"), more=("speed-up",), less=("memory ratio",))


def result(*rows: tuple[str, float, Any, float], **changed: Any) -> dict[str, Any]:
    columns = ("name", "workers", "speed-up", "memory ratio")
    found = {"baseline": "b", "sizes": {"size": [2, 3]}, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
    return {**found, **changed}


def test_ratios_are_compared_in_the_direction_that_is_better() -> None:
    then = result(("ours", 1, 2.0, 0.5), ("ours", 2, 4.0, 0.5))
    now = result(("ours", 2, 5.0, 0.6), ("ours", 1, 2.04, 0.4))
    found = {(change.row, change.column): change for change in changes(now, then, MEASUREMENT)}
    assert len(found) == 4
    assert found["ours, workers 2", "speed-up"].ratio == 1.25 and found["ours, workers 2", "speed-up"].better is True
    assert found["ours, workers 2", "memory ratio"].better is False
    assert found["ours, workers 1", "memory ratio"].better is True
    assert found["ours, workers 1", "speed-up"].better is None  # two per cent is no change


def test_values_without_a_committed_number_are_left_out() -> None:
    then = result(("baseline", 0, 1, 1.0), ("ours", 0, "-", 0.5))
    now = result(("baseline", 0, 1.0, 1.0), ("ours", 0, 2.0, 0.5), ("new", 0, 3.0, 0.5))
    assert [(change.row, change.column) for change in changes(now, then, MEASUREMENT)] == [
        ("ours, workers 0", "memory ratio")
    ]


@pytest.mark.parametrize("changed", [{"sizes": {"size": [2, 4]}}, {"baseline": "another"}])
def test_results_of_other_sizes_are_not_compared(changed: dict[str, Any]) -> None:
    row = ("ours", 1, 2.0, 0.5)
    assert changes(result(row), result(row), MEASUREMENT)
    assert changes(result(row), result(row, **changed), MEASUREMENT) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_have_the_columns_that_are_compared(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    measurement = MEASUREMENTS[found["name"]]
    assert path.stem == found["name"] and found["baseline"] and found["sizes"] and found["machine"]["versions"]
    assert all({*measurement.labels, *measurement.ratios} <= set(row) for row in found["rows"])
    assert len({label(row, measurement) for row in found["rows"]}) == len(found["rows"])


def test_a_result_that_was_never_committed_is_not_compared() -> None:
    assert committed(RESULTS / "no_such.json") is None
