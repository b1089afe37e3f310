"""Draws the ratios of a measurement as an SVG, for light and dark pages. Equal data give equal bytes."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import Result, label
from benchmarks.measurements import Measurement
from stllm.common.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "#7d858e"  # text and lines: a contrast of at least 3.8:1 on white and on black
COLOURS = ("#2f7ed8", "#d8742f", "#3a9d6b", "#9a5fc0")
LONG = 20  # with larger values the axis is logarithmic, because bars of about 1 would be too short
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stllm",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(path: Path, result: Result, measurement: Measurement) -> None:
    """Draw lines if the row labels are numbers, otherwise bars, with a dashed line at 1, the baseline."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = result["rows"]
    columns = [name for name in measurement.ratios if any(isinstance(row[name], int | float) for row in rows)]
    places = [row[measurement.labels[0]] for row in rows] if len(measurement.labels) == 1 else []
    with rc_context(STYLE), replacing(path) as partial:
        curve = bool(places) and all(isinstance(place, int) for place in places)
        height = 3.2 if curve else 0.9 + 0.22 * len(rows) * max(len(columns), 1.5)
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.subplots()
        if curve:
            _curves(axes, rows, columns, places, measurement.labels[0])
        else:
            _bars(axes, rows, columns, [label(row, measurement) for row in rows])
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        figure.savefig(partial, format="svg", transparent=True, metadata={"Date": None})


def _curves(axes: "Axes", rows: Sequence[Mapping[str, Any]], columns: Sequence[str], places: Any, axis: str) -> None:
    for name, colour in zip(columns, cycle(COLOURS), strict=False):
        axes.plot(places, [row[name] for row in rows], marker="o", color=colour, label=name)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(places)
    axes.set_xlabel(axis)
    axes.set_ylim(bottom=0)


def _bars(axes: "Axes", rows: Sequence[Mapping[str, Any]], columns: Sequence[str], names: Sequence[str]) -> None:
    thickness = 0.8 / len(columns)
    for number, (name, colour) in enumerate(zip(columns, cycle(COLOURS), strict=False)):
        measured = [(place, row[name]) for place, row in enumerate(rows) if isinstance(row[name], int | float)]
        offset = (number - (len(columns) - 1) / 2) * thickness
        drawn = axes.barh(
            [place + offset for place, _ in measured],
            [value for _, value in measured],
            height=thickness,
            color=colour,
            label=name,
        )
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8, color=GREY)
    if max(value for row in rows for value in map(row.get, columns) if isinstance(value, int | float)) > LONG:
        axes.set_xscale("log")
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), labels=names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
