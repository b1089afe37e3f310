"""The experiment's chart as an SVG: a bar a variant in each task, the spread over seeds, and what guessing gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.charts import GREY, STYLE
from stllm.common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#d8742f", "#3a9d6b", "#a8cdb8", "#7fb2e5", "#9a5fc0")  # one a variant
ROOM = 0.8  # of a task's, taken by its bars


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Writes it, whole or not at all; equal figures give equal bytes."""
    from matplotlib import rc_context

    with rc_context(STYLE), replacing(path) as partial:
        chart(report).savefig(partial, format="svg", transparent=True, metadata={"Date": None})


def chart(report: Mapping[str, Any]) -> "Figure":
    """The figure. report: of `temporal_report.summary`."""
    from matplotlib.figure import Figure

    tasks, variants = report["tasks"], report["variants"]
    figure = Figure(figsize=(9, 1.2 + 0.85 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    thickness = ROOM / len(variants)
    for number, ((name, figures), colour) in enumerate(zip(variants.items(), COLOURS, strict=True)):
        found = [
            (place, figures["accuracy"][task]) for place, task in enumerate(tasks) if figures["accuracy"].get(task)
        ]
        means = [spread["mean"] for _, spread in found]
        reach = [[s["mean"] - s["low"] for _, s in found], [s["high"] - s["mean"] for _, s in found]]
        places = [place - ROOM / 2 + (number + 0.5) * thickness for place, _ in found]
        axes.barh(places, means, height=0.9 * thickness, color=colour, label=name)
        axes.errorbar(means, places, xerr=reach, fmt="none", ecolor=GREY, elinewidth=1, capsize=1.5)
    for place, about in enumerate(tasks.values()):
        axes.plot([about["chance"]] * 2, [place - ROOM / 2, place + ROOM / 2], color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(tasks)), labels=list(tasks))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("strict accuracy, %; lines: lowest and highest of the seeds; dashed: guessing")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(variants), frameon=False, fontsize=8)
    return figure
