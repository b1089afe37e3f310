"""`--probe` and `--permute`: a benchmark of multiple choice asked in other ways, too, and what that shows.

Each way has lines of its own and is gone on with like the benchmark itself, whose own lines serve as the forward view
and as the options in their first order. Writes `<name>.probe.*` and `<name>.permute.*`: figures (json), tables (md), a
chart (png).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stllm.common.files import write_text
from stllm.evaluation.charts import Bars, draw_bars
from stllm.evaluation.items import Benchmark
from stllm.evaluation.permutation_probe import permutation_bars, permutation_report, permutation_scores
from stllm.evaluation.results import versions, write_json
from stllm.evaluation.runs import Outcome, Runs
from stllm.evaluation.temporal_probe import ORDER_TASKS, probe_bars, probe_report, probe_scores
from stllm.evaluation.turned_round import TURNED, turned_round
from stllm.evaluation.variants import num_rotations, rotated, viewed
from stllm.media.views import FORWARD, VIEWS

Probe = Callable[[Runs, str, Benchmark, Outcome | None], str | None]


def probe_views(runs: Runs, name: str, benchmark: Benchmark, plain: Outcome | None) -> str | None:
    """Asks under every other view (`<name>.<view>.jsonl`) and writes the report. A collective call.

    plain: what the benchmark itself came to. Returns the verdict, to be printed; None on all but the main process.
    """
    outcomes = {FORWARD: plain}
    for view in VIEWS[1:]:
        outcomes[view] = runs.run(viewed(benchmark, view), f"{name}.{view}", variant=view)
    turned = turned_round(benchmark, ORDER_TASKS)
    back = runs.run(turned, f"{name}.{TURNED}", variant=TURNED) if turned.items else None
    if plain is None:
        return None
    by_view = {view: outcome.records for view, outcome in outcomes.items() if outcome is not None}
    scores = probe_scores(by_view, () if back is None else back.records)
    path = runs.folder / f"{name}.probe"
    _write(path, benchmark, plain, scores, probe_report(name, scores), probe_bars(scores))
    return f"temporal probe: {scores['verdict']}\nfiles: {path}.{{json,md,png}}"


def probe_options(runs: Runs, name: str, benchmark: Benchmark, plain: Outcome | None) -> str | None:
    """Asks under every other rotation of the options (`<name>.rotated<places>.jsonl`); else as `probe_views`."""
    variants: list[Benchmark] = [benchmark]
    outcomes = [plain]
    for places in range(1, num_rotations(benchmark)):
        variants.append(rotated(benchmark, places))
        outcomes.append(runs.run(variants[-1], f"{name}.rotated{places}", variant=f"rotated{places}"))
    if plain is None:
        return None
    scores = permutation_scores(variants, [outcome.records for outcome in outcomes if outcome is not None])
    path = runs.folder / f"{name}.permute"
    _write(path, benchmark, plain, scores, permutation_report(name, scores), permutation_bars(scores))
    return f"option permutations: {scores['verdict']}\nfiles: {path}.{{json,md,png}}"


def _write(
    path: Path, benchmark: Benchmark, plain: Outcome, scores: Mapping[str, Any], report: str, bars: Bars
) -> None:
    """Each file whole or not at all. path: without an ending."""
    about = {"settings": dict(plain.settings), "digests": dict(plain.digests), "versions": versions()}
    write_json(path.with_name(f"{path.name}.json"), {"benchmark": benchmark.name, **scores, **about})
    write_text(path.with_name(f"{path.name}.md"), report)
    draw_bars(path.with_name(f"{path.name}.png"), bars)
