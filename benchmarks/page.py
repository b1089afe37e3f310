"""Writes the page of all results: tables, charts, and the changes since the last commit."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.charts import draw
from benchmarks.common import markdown
from benchmarks.comparison import Change, Result, changes, comparable
from benchmarks.measurements import MEASUREMENTS, ON_REQUEST
from stllm.common.files import replacing
from stllm.evaluation.reports.tables import table

INTRODUCTION = """# Speed and memory

`python -m benchmarks{option}` writes this page. Each measurement compares this package ("ours") with a baseline, in the
same run on the same machine. Compare the ratios, such as the speed-up: seconds and bytes depend on the machine. The
dashed line in a chart is the baseline, 1.
"""


def write_page(folder: Path, committed: Mapping[str, Result], *, quick: bool) -> str:
    """Draw the charts and write README.md from the results in the folder. Returns the section about changes.

    committed: measurement -> its last committed result, for the measurements to compare.
    """
    shown = {**MEASUREMENTS, **ON_REQUEST}
    results = {name: _read(folder / f"{name}.json") for name in shown if (folder / f"{name}.json").is_file()}
    sections = []
    for name, result in results.items():
        measurement = shown[name]
        draw(folder / f"{name}.svg", result, measurement)
        chart = f"![{name}: {', '.join(measurement.ratios)}]({name}.svg)"
        sections.append(f"## {name}\n\n{measurement.question}\n\n{markdown(result)}\n{chart}\n")
    absent = [f"`{name}`" for name in MEASUREMENTS if name not in results]
    if absent:
        sections.append(f"Not measured yet: {', '.join(absent)}.\n")
    compared = _comparison(results, committed)
    introduction = INTRODUCTION.format(option=" --quick" if quick else "")
    with replacing(folder / "README.md") as partial:
        partial.write_text("\n".join([introduction, *([compared] if compared else []), *sections]), encoding="utf-8")
    return compared


def _comparison(results: Mapping[str, Result], committed: Mapping[str, Result]) -> str:
    """Return the section about changes, or an empty string if there are no committed results."""
    if not committed:
        return ""
    lines = [
        _line(name, change)
        for name, then in committed.items()
        for change in changes(results[name], then, MEASUREMENTS[name])
    ]
    text = "## Against the last committed results\n\n"
    if lines:
        header = ("measurement", "row", "ratio", "then", "now", "now / then", "")
        text += table(header, lines, texts=3)
    other = [name for name, then in committed.items() if not comparable(results[name], then)]
    if other:
        text += f"\nCommitted with other sizes or another baseline, and therefore not compared: {', '.join(other)}.\n"
    return text


def _line(name: str, change: Change) -> Sequence[str]:
    verdict = {None: "", True: "better", False: "worse"}[change.better]
    figures = [f"{value:.3g}" for value in (change.then, change.now, change.ratio)]
    return [name, change.row, change.column, *figures, verdict]


def _read(path: Path) -> Result:
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result
