"""`--probe` and `--permute`: a benchmark asked several times, each time with lines of its own, and what that shows.

Writes `<name>.probe.*` and `<name>.permute.*`: figures (json), tables (md) and a chart (png), each whole or not at all.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import write_text
from stllm.datasets.views import VIEWS
from stllm.evaluation.charts import Bars, draw_bars
from stllm.evaluation.items import Benchmark, Record
from stllm.evaluation.permutation_probe import permutation_bars, permutation_report, permutation_scores
from stllm.evaluation.results import in_order, versions, write_json
from stllm.evaluation.temporal_probe import probe_bars, probe_report, probe_scores
from stllm.evaluation.variants import num_rotations, rotated, viewed

Ask = Callable[[Benchmark, str], Sequence[Record]]  # a benchmark and the name of its lines; gone on with by that name


def probe_views(folder: Path, name: str, benchmark: Benchmark, ask: Ask, about: Mapping[str, Any]) -> dict[str, Any]:
    """Asks under every view (`<name>.<view>.jsonl`), writes the report, and returns the figures.

    about: settings and digests, for the figures' file. Raises UserError for a benchmark without options.
    """
    _check_options(benchmark, "--probe")
    runs = {}
    for view in VIEWS:
        variant = viewed(benchmark, view)
        runs[view] = in_order(variant, ask(variant, f"{name}.{view}"))
    scores = probe_scores(runs)
    _write(folder / f"{name}.probe", benchmark, scores, about, probe_report(name, scores), probe_bars(scores))
    return scores


def probe_options(folder: Path, name: str, benchmark: Benchmark, ask: Ask, about: Mapping[str, Any]) -> dict[str, Any]:
    """Asks under every rotation of the options (`<name>.rotated<places>.jsonl`), else as `probe_views`."""
    _check_options(benchmark, "--permute")
    variants = [rotated(benchmark, places) for places in range(num_rotations(benchmark))]
    runs = [in_order(variant, ask(variant, f"{name}.rotated{places}")) for places, variant in enumerate(variants)]
    scores = permutation_scores(variants, runs)
    report = permutation_report(name, scores)
    _write(folder / f"{name}.permute", benchmark, scores, about, report, permutation_bars(scores))
    return scores


def _check_options(benchmark: Benchmark, option: str) -> None:
    if not num_rotations(benchmark):
        raise UserError(
            f"{option} compares answers that need no judge, but no item of {benchmark.name} has options: use it with a "
            "benchmark of multiple choice, such as mvbench"
        )


def _write(
    path: Path, benchmark: Benchmark, scores: Mapping[str, Any], about: Mapping[str, Any], report: str, bars: Bars
) -> None:
    """path: without an ending."""
    content = {"benchmark": benchmark.name, **scores, **about, "versions": versions()}
    write_json(path.with_name(f"{path.name}.json"), content)
    write_text(path.with_name(f"{path.name}.md"), report)
    draw_bars(path.with_name(f"{path.name}.png"), bars)
