"""The table of a benchmark that a judge decides (VcgBench, VideoQA): answered, failed, and what to do next."""

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from stllm.evaluation.axes import QA, TASKS
from stllm.evaluation.items import Benchmark, Record
from stllm.evaluation.mvbench_report import failures, provenance
from stllm.evaluation.paper_table import JUDGED, OF_BENCHMARK
from stllm.evaluation.tables import table
from stllm.evaluation.tallies import by_task


def judged_report(name: str, benchmark: Benchmark, records: Sequence[Record], content: Mapping[str, Any]) -> str:
    """The Markdown text. name: of the run's files. content: of the results file."""
    counts = content["counts"]
    parts = [
        f"# {name}\n",
        _counts(records),
        "",
        f"Items: {counts['total']} in all, {counts['excluded']} excluded.\n",
    ]
    if benchmark.excluded:
        parts += ["## Excluded\n", table(("part", "why"), list(benchmark.excluded.items()), texts=2)]
    failed = failures(records)
    if failed:
        parts += ["## Failed items\n", failed]
    return "\n".join([*parts, _next_steps(name, benchmark, records), provenance(content)])


def _counts(records: Sequence[Record]) -> str:
    rows: list[tuple[object, ...]] = []
    for task, lines in [*by_task(records).items(), ("all", records)]:
        failed = sum(bool(line.get("error")) for line in lines)
        empty = sum(not line.get("error") and not _said(line) for line in lines)
        rows.append((task or "questions", len(lines), len(lines) - failed, empty, failed))
    return table(("part", "items", "answered", "of them empty", "failed"), rows if len(rows) > 2 else rows[:1])


def _said(line: Record) -> bool:
    """Whether every prediction of a line says something."""
    predictions = line["prediction"]
    return all(str(text).strip() for text in (predictions if isinstance(predictions, list) else [predictions]))


def _next_steps(name: str, benchmark: Benchmark, records: Sequence[Record]) -> str:
    """Commands to type in the folder of the files."""
    tasks = set(by_task(records))
    axes = [axis for axis, task in TASKS.items() if task in tasks] or [QA]
    lines, folder = quote(f"{name}.jsonl"), quote(name + JUDGED)
    commands = [f"stllm judge {axis} --pred-path {lines} --output-dir {folder} --model MODEL" for axis in axes]
    if benchmark.name in ("vcgbench", *OF_BENCHMARK):
        commands.append(f"stllm table {folder}/*.results.json")
    shown = "\n".join(commands)
    return f"## Next, in this folder: a judge scores the predictions\n\n```\n{shown}\n```\n"
