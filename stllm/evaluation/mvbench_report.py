"""MVBench's table: each task beside the published figure, scored both ways, and all that was left out or differs."""

from collections.abc import Mapping, Sequence
from typing import Any

from stllm.evaluation.charts import Bars
from stllm.evaluation.items import Benchmark, Record
from stllm.evaluation.published import LABEL, METHODS, MVBENCH_TASKS, SOURCE
from stllm.evaluation.tables import MISSING, percent, table
from stllm.evaluation.tallies import RULES, Tally, by_cause, by_task, tally

SHOWN_IDS = 5  # of the items with one cause
MATCHER = (
    "The official rule compares the first word of the prediction with that of the answer and counts it as right when "
    "one is a part of the other, so an empty prediction, or the bracket alone, is right everywhere. The strict rule "
    "wants the letter of the option, or the option's text exactly; anything else is wrong."
)


def mvbench_report(name: str, benchmark: Benchmark, records: Sequence[Record], content: Mapping[str, Any]) -> str:
    """The Markdown text. content: of the results file."""
    return "\n".join(
        [
            f"# {name}\n",
            _averages(benchmark, records),
            "## Tasks\n",
            _tasks(benchmark, records),
            *_left_out(benchmark, records),
            _differing(benchmark, records),
            provenance(content),
        ]
    )


def mvbench_bars(benchmark: Benchmark, records: Sequence[Record]) -> Bars:
    """The chart: the average and each task over all items asked, beside the published figures."""
    tallies = {"Average": tally(records), **{task: tally(lines) for task, lines in by_task(records).items()}}
    groups = ["Average", *_task_names(benchmark, records)]
    published = {"Average": published_average(MVBENCH_TASKS), **MVBENCH_TASKS}
    series: dict[str, list[float | None]] = {
        f"ours, {rule}": [tallies[group].over_all(rule) if group in tallies else None for group in groups]
        for rule in RULES
    }
    series[LABEL] = [published.get(group) for group in groups]
    return Bars(
        title="MVBench: accuracy by task",
        axis="accuracy, % of the items asked",
        groups=groups,
        series=series,
        notes=dict.fromkeys(benchmark.excluded, "excluded"),
        limit=109.0,
    )


def published_average(tasks: Sequence[str] | Mapping[str, float]) -> float | None:
    """The published accuracy over these tasks, each counted alike; None when one has no published figure."""
    if not tasks or any(task not in MVBENCH_TASKS for task in tasks):
        return None
    return sum(MVBENCH_TASKS[task] for task in tasks) / len(tasks)


def provenance(content: Mapping[str, Any]) -> str:
    """Where the figures come from: digests and versions."""
    rows = [*content["digests"].items(), *content["versions"].items()]
    return "## Made by\n\n" + table(("what", "digest or version"), rows, texts=2)


def failures(records: Sequence[Record]) -> str:
    """A table of the causes for which items of each task have no answer; empty when there are none."""
    rows = []
    for task, of_task in by_task(records).items():
        for cause, lines in by_cause(of_task).items():
            ids = ", ".join(str(line["id"]) for line in lines[:SHOWN_IDS])
            rows.append((task or "–", cause, ids + (", ..." if len(lines) > SHOWN_IDS else ""), len(lines)))
    return table(("task", "cause", "items", "failed"), rows, texts=3) if rows else ""


def _averages(benchmark: Benchmark, records: Sequence[Record]) -> str:
    total, asked = tally(records), list(by_task(records))
    rows: list[tuple[str, ...]] = []
    for over, count in (("answered", total.answered), ("all asked, failed ones wrong", total.asked)):
        figures = [total.over_answered(rule) if over == "answered" else total.over_all(rule) for rule in RULES]
        right = [f"{total.right[rule]}/{count}" for rule in RULES]
        rows.append((f"ours, over {over}", percent(figures[0]), right[0], percent(figures[1]), right[1]))
    rows.append((f"{LABEL} ({len(MVBENCH_TASKS)} tasks)", MISSING, "", percent(METHODS["ST-LLM"][0]), ""))
    if set(asked) != set(MVBENCH_TASKS) and (average := published_average(asked)) is not None:
        rows.append((f"{LABEL}, the {len(asked)} tasks asked here", MISSING, "", percent(average), ""))
    header = ("average", "strict %", "right/items", "official %", "right/items")
    excluded = f", {benchmark.num_excluded} excluded with their tasks" if benchmark.num_excluded else ""
    return (
        table(header, rows)
        + f"\nItems: {len(benchmark.items) + benchmark.num_excluded} in all; {total.answered} answered, {total.failed} "
        f"failed{excluded}. Published figures: {SOURCE}, by the official rule, "
        "on MVBench's own clips (about 200 a task).\n"
    )


def _tasks(benchmark: Benchmark, records: Sequence[Record]) -> str:
    lines = by_task(records)
    header = ("task", "items", "failed", "strict", "strict, all", "official", "official, all", LABEL)
    rows = [_task_row(task, lines.get(task)) for task in _task_names(benchmark, records)]
    return table(header, rows) + "\nPercent over answered items, and over all items asked with failed ones wrong.\n"


def _task_row(task: str, lines: Sequence[Record] | None) -> tuple[object, ...]:
    published = percent(MVBENCH_TASKS.get(task))
    if lines is None:
        return (task, "excluded", *[MISSING] * 5, published)
    of_task: Tally = tally(lines)
    figures = [percent(of(rule)) for rule in RULES for of in (of_task.over_answered, of_task.over_all)]
    return (task, of_task.asked, of_task.failed, *figures, published)


def _task_names(benchmark: Benchmark, records: Sequence[Record]) -> list[str]:
    """Tasks asked and excluded, in the order of the benchmark's own table; unknown ones at the end."""
    there = {*by_task(records), *benchmark.excluded}
    return [task for task in MVBENCH_TASKS if task in there] + sorted(there - MVBENCH_TASKS.keys())


def _left_out(benchmark: Benchmark, records: Sequence[Record]) -> list[str]:
    """Notes, excluded tasks by name, and failed items by task and cause."""
    parts = []
    if benchmark.notes:
        parts += ["## Notes\n", "\n".join(f"- {note}" for note in benchmark.notes) + "\n"]
    if benchmark.excluded:
        parts += ["## Excluded tasks\n", table(("task", "why"), list(benchmark.excluded.items()), texts=2)]
    failed = failures(records)
    if failed:
        parts += ["## Failed items\n", failed]
    return parts


def _differing(benchmark: Benchmark, records: Sequence[Record]) -> str:
    """Items that one rule counts as right and the other does not."""
    golds = {item.id: item.answer for item in benchmark.items}
    rows = []
    for line in records:
        if not line.get("error") and line["correct"]["strict"] != line["correct"]["official"]:
            right = "official" if line["correct"]["official"] else "strict"
            said = str(line["prediction"]).strip() or "(empty)"
            rows.append((line["id"], line["task"], said, golds[line["id"]], right))
    found = table(("item", "task", "prediction", "answer", "right by"), rows, texts=5) if rows else "None.\n"
    return f"## Items that the two rules score differently: {len(rows)}\n\n{MATCHER}\n\n{found}"
