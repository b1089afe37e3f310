"""Markdown tables, aligned so that they are also readable as plain text, and bar charts as PNG files.

matplotlib is imported only when a chart is drawn. No display is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from stllm.common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "–"
COLOURS = ("#1f77b4", "#9ecae1", "#bdbdbd", "#fdae6b", "#756bb1")  # dark and light blue for results, grey for published
GROUP = 0.8  # share of a group's height that its bars fill
ROW, EDGES, WIDTH = 0.42, 1.7, 9.0  # inches: height per group, height of title and axis, width of the figure


def percent(value: float | None) -> str:
    """Format a percentage with one decimal, or "–" for None."""
    return MISSING if value is None else f"{value:.1f}"


def span(interval: Sequence[float] | None) -> str:
    """Format an interval with one decimal, such as "48.2 to 61.0", or "–" for None."""
    return MISSING if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def score(value: float | None) -> str:
    """Format a score from 0 to 5 with two decimals, or "–" for None."""
    return MISSING if value is None else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, texts: int = 1) -> str:
    """Return a Markdown table that ends in a newline. texts: how many columns, from the left, are left-aligned."""
    # a cell must be one line, and a bar in it must be escaped
    lines = [[" ".join(str(entry).split()).replace("|", "\\|") for entry in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if column < texts else ">" for column in range(len(widths))]
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in zip(sides, widths, strict=True)]
    text = ""
    for line in (lines[0], rule, *lines[1:]):
        cells = [f"{entry:{side}{width}}" for entry, side, width in zip(line, sides, widths, strict=True)]
        text += f"| {' | '.join(cells)} |\n"
    return text


@dataclass(frozen=True)
class Bars:
    """Data of a chart with groups of horizontal bars, the first group on top.

    axis: label of the value axis. series: name -> one value per group; None draws no bar. intervals: name -> (low,
    high) per group, drawn as a line; None draws none. notes: group -> text in place of its bars. high: end of the axis.
    """

    title: str
    axis: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    intervals: Mapping[str, Sequence[Sequence[float] | None]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    high: float = 100.0


def bars_figure(bars: Bars) -> "Figure":
    """Return the chart as a matplotlib figure. Every bar is labelled with its value."""
    from matplotlib.figure import Figure

    count = len(bars.series)
    figure = Figure(figsize=(WIDTH, EDGES + max(1, len(bars.groups)) * max(ROW, 0.15 * count)), layout="constrained")
    axes = figure.subplots()
    thickness = GROUP / count
    for number, ((name, values), colour) in enumerate(zip(bars.series.items(), cycle(COLOURS), strict=False)):
        offset = (number - (count - 1) / 2) * thickness
        places = [place + offset for place, value in enumerate(values) if value is not None]
        lengths = [value for value in values if value is not None]
        drawn = axes.barh(places, lengths, height=thickness, color=colour, label=name)
        axes.bar_label(drawn, fmt="%.1f" if bars.high == 100 else "%.2f", padding=2, fontsize=6.5)
        for place, limits in enumerate(bars.intervals.get(name, ())):
            if limits is not None and values[place] is not None:
                below = place + offset + 0.38 * thickness  # not through the bar's label
                axes.plot(limits, [below] * 2, color="black", linewidth=0.8, alpha=0.6)
    axes.set_title(bars.title, loc="left", fontsize=11, pad=26)
    axes.set_xlabel(bars.axis)
    axes.set_xlim(0, 1.09 * bars.high)  # leaves room for the label of the longest bar
    axes.set_yticks(range(len(bars.groups)), labels=bars.groups)
    axes.set_ylim(len(bars.groups) - 0.5, -0.5)
    for group, note in bars.notes.items():
        axes.text(0.005 * bars.high, bars.groups.index(group) - 0.15, note, fontsize=7, style="italic", va="center")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=count, frameon=False, fontsize=8)
    return figure


def draw_bars(path: Path, bars: Bars) -> None:
    """Draw the chart into a PNG file, atomically. Equal data give equal bytes."""
    figure = bars_figure(bars)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
