"""Compares results with the last committed ones. All functions except `committed` are pure."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measurements import Measurement

ROOT = Path(__file__).parents[1]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A ratio in one row of a table, as committed (`then`) and as measured now."""

    row: str
    column: str
    then: float
    now: float
    better: bool | None  # None: less than 5 % apart, as two runs on one machine can be

    @property
    def ratio(self) -> float:
        """The value now divided by the committed value."""
        return self.now / self.then


def label(row: Mapping[str, Any], measurement: Measurement) -> str:
    """Return the name of a row in tables and charts."""
    words = (_word(column, row[column]) for column in measurement.labels)
    return ", ".join(words)


def _word(column: str, value: object) -> str:
    return f"{column} {value}" if column and _is_number(value) else str(value)


def changes(now: Result, then: Result, measurement: Measurement) -> list[Change]:
    """Compare the ratios that both results have. Returns none if sizes or baseline differ, see `comparable`."""
    if not comparable(now, then):
        return []
    before = {label(row, measurement): row for row in then["rows"]}
    found = []
    for row in now["rows"]:
        name = label(row, measurement)
        for column in measurement.ratios:
            values = row.get(column), before.get(name, {}).get(column)
            if all(_is_number(value) for value in values) and values != (1, 1):  # not the baseline
                found.append(_change(name, column, *values, more=column in measurement.more))
    return found


def comparable(now: Result, then: Result) -> bool:
    """Check whether two results are of the same model and data sizes, with ratios to the same baseline."""
    return all(json.dumps(now[key]) == json.dumps(then[key]) for key in ("sizes", "baseline"))


def _change(row: str, column: str, now: float, then: float, *, more: bool) -> Change:
    better = None if abs(now / then - 1) < 0.05 else (now > then) == more
    return Change(row=row, column=column, then=then, now=now, better=better)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def committed(path: Path) -> Result | None:
    """Return the last committed version of a result, or None if there is none (also outside a git checkout)."""
    if shutil.which("git") is None:
        return None
    shown = subprocess.run(
        ["git", "show", f"HEAD:{path.relative_to(ROOT).as_posix()}"], cwd=ROOT, capture_output=True, text=True
    )
    return json.loads(shown.stdout) if shown.returncode == 0 else None
