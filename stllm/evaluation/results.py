"""The results of a benchmark's run: the official script's files, `<name>.results.json`, a table and a chart.

All are computed from the lines alone, so a run that was continued writes the same as an uninterrupted one.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stllm import __version__
from stllm.common.files import write_text
from stllm.evaluation.benchmarks.base import Loaded, Record
from stllm.evaluation.reports.charts import Bars, draw_bars
from stllm.evaluation.reports.run_report import run_bars, run_report

# What computes, and what reads media: distributions and their modules.
PACKAGES = {name: name for name in ("torch", "transformers", "numpy", "av", "decord")} | {"pillow": "PIL"}


@dataclass(frozen=True)
class Outcome:
    """The lines of a finished run and what made them.

    records: one line an item of the benchmark, failed ones among them, in any order. settings: of the run. digests: of
    config, prompts and checkpoint. seconds: spent on the items, by all runs and processes.
    """

    records: Sequence[Record]
    settings: Mapping[str, Any]
    digests: Mapping[str, str]
    seconds: float


def write(folder: Path, name: str, loaded: Loaded, outcome: Outcome) -> dict[str, Any]:
    """Writes all files of a run, each whole or not at all, and returns the content of the results file.

    A benchmark that a judge scores has no scores yet and no chart.
    """
    by_id = {line["id"]: line for line in outcome.records}
    sizes = (len(by_id), len(outcome.records), len(loaded.items))
    assert len(set(sizes)) == 1, sizes
    lines = [by_id[item.id] for item in loaded.items]
    for part, official in loaded.benchmark.official(loaded.items, lines).items():
        text = json.dumps(official, ensure_ascii=False, indent=1, allow_nan=False)
        write_text(folder / (f"{name}.{part}.json" if part else f"{name}.json"), text + "\n")
    content = {
        "benchmark": loaded.name,
        "scores": loaded.benchmark.summary(lines),
        "counts": counts(loaded, lines),
        **({"notes": list(loaded.notes)} if loaded.notes else {}),
        "settings": dict(outcome.settings),
        "digests": dict(outcome.digests),
        "versions": versions(),
        "seconds": round(outcome.seconds, 3),
    }
    write_json(folder / f"{name}.results.json", content)
    write_text(folder / f"{name}.md", run_report(name, loaded, lines, content))
    if not loaded.benchmark.judged:
        draw_bars(folder / f"{name}.png", run_bars(loaded, lines))
    return content


def write_probe(path: Path, loaded: Loaded, plain: Outcome, scores: Mapping[str, Any], report: str, bars: Bars) -> str:
    """Writes a probe's figures, tables and chart, each whole or not at all; returns the files in words.

    path: without an ending. plain: the outcome of the benchmark itself.
    """
    about = {"settings": dict(plain.settings), "digests": dict(plain.digests), "versions": versions()}
    write_json(path.with_name(f"{path.name}.json"), {"benchmark": loaded.name, **scores, **about})
    write_text(path.with_name(f"{path.name}.md"), report)
    draw_bars(path.with_name(f"{path.name}.png"), bars)
    return f"{path}.{{json,md,png}}"


def counts(loaded: Loaded, records: Sequence[Record]) -> dict[str, int]:
    """Items in all; of them answered, failed (their media could not be read), and excluded with their whole task.

    Where the context rule cut prompts, also the items whose prompts were `cut`, and the visual and text tokens cut.
    """
    failed = sum(bool(line.get("error")) for line in records)
    cuts = [line["cut_tokens"] for line in records if any(line.get("cut_tokens", {}).values())]
    found = {
        "cut": len(cuts),
        "cut_visual_tokens": sum(cut["visual"] for cut in cuts),
        "cut_text_tokens": sum(cut["text"] for cut in cuts),
    }
    return {
        "total": len(loaded.items) + loaded.num_excluded,
        "answered": len(records) - failed,
        "failed": failed,
        "excluded": loaded.num_excluded,
        **(found if cuts else {}),
    }


def versions() -> dict[str, str]:
    """Versions of what computed the predictions, without packages that are not installed (such as decord)."""
    installed = {package: version(package) for package in PACKAGES if find_spec(PACKAGES[package])}
    return {"stllm": __version__, "python": platform.python_version(), **installed}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes it whole or not at all; a NaN, which is no JSON, is an error."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
