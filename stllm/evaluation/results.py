"""What a benchmark's run comes to: `<name>.results.json`, the table `<name>.md` and the chart `<name>.png`.

All are computed from the lines alone, so a run that was gone on with writes what an uninterrupted one does.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stllm import __version__
from stllm.common.files import write_text
from stllm.evaluation.charts import draw_bars
from stllm.evaluation.items import Benchmark, Record
from stllm.evaluation.judged_report import judged_report
from stllm.evaluation.mvbench_report import mvbench_bars, mvbench_report

# What computes, and what reads media: distributions and their modules.
PACKAGES = {name: name for name in ("torch", "transformers", "numpy", "av", "decord")} | {"pillow": "PIL"}


def write(
    folder: Path,
    name: str,
    benchmark: Benchmark,
    records: Sequence[Record],
    *,
    settings: Mapping[str, Any],
    digests: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Writes the three files, each whole or not at all, and returns what the results file holds.

    records: one line an item of the benchmark, failed ones among them; an item's place among them does not matter.
    settings: of the run. digests: of config, prompts and checkpoint. seconds: that the run took.
    A benchmark that a judge decides has no scores yet and no chart: `stllm judge` gives them.
    """
    lines = in_order(benchmark, records)
    content = {
        "benchmark": benchmark.name,
        "scores": benchmark.scores(lines),
        "counts": counts(benchmark, lines),
        **({"notes": list(benchmark.notes)} if benchmark.notes else {}),
        "settings": dict(settings),
        "digests": dict(digests),
        "versions": versions(),
        "seconds": round(seconds, 3),
    }
    write_json(folder / f"{name}.results.json", content)
    if not content["scores"]:
        write_text(folder / f"{name}.md", judged_report(name, benchmark, lines, content))
        return content
    write_text(folder / f"{name}.md", mvbench_report(name, benchmark, lines, content))
    draw_bars(folder / f"{name}.png", mvbench_bars(benchmark, lines))
    return content


def counts(benchmark: Benchmark, records: Sequence[Record]) -> dict[str, int]:
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
        "total": len(benchmark.items) + benchmark.num_excluded,
        "answered": len(records) - failed,
        "failed": failed,
        "excluded": benchmark.num_excluded,
        **(found if cuts else {}),
    }


def versions() -> dict[str, str]:
    """Of what computed the predictions. A reader that is not installed (decord, on some machines) is left out."""
    installed = {package: version(package) for package in PACKAGES if find_spec(PACKAGES[package])}
    return {"stllm": __version__, "python": platform.python_version(), **installed}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes it whole or not at all; a NaN, which is no JSON, is an error."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def in_order(benchmark: Benchmark, records: Sequence[Record]) -> list[Record]:
    """The lines in the items' order."""
    lines = {line["id"]: line for line in records}
    assert len(lines) == len(records) == len(benchmark.items), (len(lines), len(records), len(benchmark.items))
    return [lines[item.id] for item in benchmark.items]
