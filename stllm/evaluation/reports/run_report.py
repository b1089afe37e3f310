"""The table `<name>.md` of a run and its bars: scores beside the published figures, or counts and the next commands for
a judge; and in both cases all that was left out.
"""

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from stllm.evaluation.axes import QA, TASKS
from stllm.evaluation.benchmarks.base import Loaded, Record
from stllm.evaluation.benchmarks.multiple_choice import RULES, by_task, tally
from stllm.evaluation.published import BY_TASK, LABEL, SOURCE, cell
from stllm.evaluation.reports.charts import Bars
from stllm.evaluation.reports.paper_table import JUDGED, OF_BENCHMARK
from stllm.evaluation.reports.tables import MISSING, percent, table

SHOWN_IDS = 5  # of the items with one cause
MATCHER = (
    "The official rule compares the first word of the prediction with that of the answer and counts it as right when "
    "one is a part of the other, so an empty prediction, or the bracket alone, is right everywhere. The strict rule "
    "wants the letter of the option, or the option's text exactly; anything else is wrong."
)


def run_report(name: str, loaded: Loaded, records: Sequence[Record], content: Mapping[str, Any]) -> str:
    """The Markdown text. name: of the run's files. content: of the results file."""
    judged = loaded.benchmark.judged
    parts = [f"# {name}\n"]
    if judged:
        counts = content["counts"]
        parts += [_counts(records), "", f"Items: {counts['total']} in all, {counts['excluded']} excluded.\n"]
    else:
        parts += [_averages(loaded, records), "## Tasks\n", _tasks(loaded, records)]
    if loaded.notes:
        parts += ["## Notes\n", "\n".join(f"- {note}" for note in loaded.notes) + "\n"]
    if loaded.excluded:
        parts += ["## Excluded tasks\n", table(("task", "why"), list(loaded.excluded.items()), texts=2)]
    if failed := _failures(records):
        parts += ["## Failed items\n", table(("task", "cause", "items", "failed"), failed, texts=3)]
    parts.append(_next_steps(name, loaded, records) if judged else _differing(loaded, records))
    made_by = [*content["digests"].items(), *content["versions"].items()]
    return "\n".join([*parts, "## Made by\n\n" + table(("what", "digest or version"), made_by, texts=2)])


def run_bars(loaded: Loaded, records: Sequence[Record]) -> Bars:
    """The chart of a multiple choice: the average and each task over all items asked, beside the published figures."""
    published = BY_TASK.get(loaded.name, {})
    tallies = {"Average": tally(records), **{task: tally(lines) for task, lines in by_task(records).items()}}
    groups = ["Average", *_task_names(loaded, records)]
    series: dict[str, list[float | None]] = {
        f"ours, {rule}": [tallies[group].over_all(rule) if group in tallies else None for group in groups]
        for rule in RULES
    }
    if published:
        figures = {"Average": _mean(published, list(published)), **published}
        series[LABEL] = [figures.get(group) for group in groups]
    return Bars(
        title=f"{loaded.benchmark.title}: accuracy by task",
        axis="accuracy, % of the items asked",
        groups=groups,
        series=series,
        notes=dict.fromkeys(loaded.excluded, "excluded"),
    )


def _mean(published: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """The published accuracy over these tasks, each counted alike; None when one has no published figure."""
    if not tasks or any(task not in published for task in tasks):
        return None
    return sum(published[task] for task in tasks) / len(tasks)


def _averages(loaded: Loaded, records: Sequence[Record]) -> str:
    total, asked = tally(records), list(by_task(records))
    rows: list[tuple[str, ...]] = []
    for over, count in (("answered", total.answered), ("all asked, failed ones wrong", total.asked)):
        figures = [total.over_answered(rule) if over == "answered" else total.over_all(rule) for rule in RULES]
        right = [f"{total.right[rule]}/{count}" for rule in RULES]
        rows.append((f"ours, over {over}", percent(figures[0]), right[0], percent(figures[1]), right[1]))
    excluded = f", {loaded.num_excluded} excluded with their tasks" if loaded.num_excluded else ""
    items = (
        f"\nItems: {len(loaded.items) + loaded.num_excluded} in all; {total.answered} answered, {total.failed} "
        f"failed{excluded}."
    )
    if published := BY_TASK.get(loaded.name):
        title = loaded.benchmark.title
        rows.append((f"{LABEL} ({len(published)} tasks)", MISSING, "", percent(cell("ST-LLM", title)), ""))
        if set(asked) != set(published) and (average := _mean(published, asked)) is not None:
            rows.append((f"{LABEL}, the {len(asked)} tasks asked here", MISSING, "", percent(average), ""))
        items += f" Published figures: {SOURCE}, by the official rule, on {title}'s own clips (about 200 a task)."
    return table(("average", "strict %", "right/items", "official %", "right/items"), rows) + items + "\n"


def _tasks(loaded: Loaded, records: Sequence[Record]) -> str:
    published, lines = BY_TASK.get(loaded.name), by_task(records)
    rows: list[tuple[object, ...]] = []
    for task in _task_names(loaded, records):
        if task in lines:
            found = tally(lines[task])
            figures = [percent(of(rule)) for rule in RULES for of in (found.over_answered, found.over_all)]
            rows.append((task, found.asked, found.failed, *figures))
        else:
            rows.append((task, "excluded", *[MISSING] * 5))
    header: tuple[str, ...] = ("task", "items", "failed", "strict", "strict, all", "official", "official, all")
    if published:
        header = (*header, LABEL)
        rows = [(*row, percent(published.get(str(row[0])))) for row in rows]
    return table(header, rows) + "\nPercent over answered items, and over all items asked with failed ones wrong.\n"


def _task_names(loaded: Loaded, records: Sequence[Record]) -> list[str]:
    """Tasks asked and excluded, in the order of the published table; unknown ones at the end."""
    there, published = {*by_task(records), *loaded.excluded}, BY_TASK.get(loaded.name, {})
    return [task for task in published if task in there] + sorted(there - published.keys())


def _failures(records: Sequence[Record]) -> list[tuple[object, ...]]:
    """(task, cause, ids, count), each task's most frequent cause first."""
    rows: list[tuple[object, ...]] = []
    for task, of_task in by_task(records).items():
        causes: dict[str, list[str]] = {}
        for line in of_task:
            if line.get("error"):
                causes.setdefault(_cause(line), []).append(str(line["id"]))
        for cause, ids in sorted(causes.items(), key=lambda group: -len(group[1])):
            shown = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
            rows.append((task or MISSING, cause, shown, len(ids)))
    return rows


def _cause(record: Record) -> str:
    """The error of a line without the file's own name, so that equal causes are counted together."""
    text = " ".join(str(record["error"]).split())
    place, colon, reason = text.partition(": ")
    own = str(record.get("video", "")).rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return reason if colon and own and own in place else text


def _differing(loaded: Loaded, records: Sequence[Record]) -> str:
    """Items that one rule counts as right and the other does not."""
    golds = {item.id: item.answer for item in loaded.items}
    rows = []
    for line in records:
        if not line.get("error") and line["correct"]["strict"] != line["correct"]["official"]:
            right = "official" if line["correct"]["official"] else "strict"
            said = str(line["prediction"]).strip() or "(empty)"
            rows.append((line["id"], line["task"], said, golds[line["id"]], right))
    found = table(("item", "task", "prediction", "answer", "right by"), rows, texts=5) if rows else "None.\n"
    return f"## Items that the two rules score differently: {len(rows)}\n\n{MATCHER}\n\n{found}"


def _counts(records: Sequence[Record]) -> str:
    """Items of each part that a judge is to score."""
    rows: list[tuple[object, ...]] = []
    for task, lines in [*by_task(records).items(), ("all", records)]:
        answered = [line["prediction"] for line in lines if not line.get("error")]
        texts = [said if isinstance(said, list) else [said] for said in answered]
        empty = sum(not all(str(text).strip() for text in both) for both in texts)
        rows.append((task or "questions", len(lines), len(answered), empty, len(lines) - len(answered)))
    return table(("part", "items", "answered", "of them empty", "failed"), rows if len(rows) > 2 else rows[:1])


def _next_steps(name: str, loaded: Loaded, records: Sequence[Record]) -> str:
    """Commands to type in the folder of the files."""
    tasks = set(by_task(records))
    axes = [axis for axis, task in TASKS.items() if task in tasks] or [QA]
    lines, folder = quote(f"{name}.jsonl"), quote(name + JUDGED)
    commands = [f"stllm judge {axis} --pred-path {lines} --output-dir {folder} --model MODEL" for axis in axes]
    if loaded.name in ("vcgbench", *OF_BENCHMARK):
        commands.append(f"stllm table {folder}/*.results.json")
    shown = "\n".join(commands)
    return f"## Next, in this folder: a judge scores the predictions\n\n```\n{shown}\n```\n"
