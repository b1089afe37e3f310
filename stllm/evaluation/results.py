"""The result files of a run: files for the official scripts, `<name>.results.json`, a report and a chart.

All are computed only from the records, so a resumed run writes the same files as an uninterrupted one. The report has
the scores beside published figures. If a judge must score, it has counts and the judge's commands instead. It always
lists failed items and excluded tasks.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from stllm import __version__
from stllm.common.files import write_text
from stllm.evaluation.axes import QA
from stllm.evaluation.axes import TASKS as TASK_OF_AXIS
from stllm.evaluation.benchmarks.base import Loaded
from stllm.evaluation.published import BY_METHOD, BY_TASK, LABEL, NO_INTERVAL, SOURCES
from stllm.evaluation.reports.paper_table import JUDGED, OF_BENCHMARK
from stllm.evaluation.reports.tables import MISSING, Bars, draw_bars, percent, span, table
from stllm.evaluation.scores import ITEMS, RULES, TASKS, Record, by_task, differing, tally

# package -> its module: packages on which predictions depend, whose versions are recorded
PACKAGES = {name: name for name in ("torch", "transformers", "numpy", "av", "decord", "torchcodec")} | {"pillow": "PIL"}
SHOWN_IDS = 5  # failed items that the report lists per cause
SHOWN_FAILURES = 3  # failures that the command prints


@dataclass(frozen=True)
class Outcome:
    """The records of a finished run, and how they were made.

    records: one per item, including failed ones, in any order. settings: the run's settings. digests: hashes of
    configuration, prompts and checkpoint. seconds: total time spent on items, over all processes and interrupted runs.
    """

    records: Sequence[Record]
    settings: Mapping[str, Any]
    digests: Mapping[str, str]
    seconds: float


# ---- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, loaded: Loaded, outcome: Outcome) -> dict[str, Any]:
    """Write all result files of a run, each atomically, and return the content of the results file.

    A benchmark that a judge must score has no scores and no chart yet.
    """
    by_id = {line["id"]: line for line in outcome.records}
    sizes = (len(by_id), len(outcome.records), len(loaded.items))
    assert len(set(sizes)) == 1, sizes
    lines = [by_id[item.id] for item in loaded.items]
    for part, official in loaded.benchmark.official(loaded.items, lines).items():
        text = json.dumps(official, ensure_ascii=False, indent=1, allow_nan=False)
        write_text(folder / (f"{name}.{part}.json" if part else f"{name}.json"), text + "\n")
    scores = loaded.benchmark.summary(lines)
    content = {
        "benchmark": loaded.name,
        "scores": scores,
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
        draw_bars(folder / f"{name}.png", run_bars(loaded, scores))
    return content


def write_probe(path: Path, loaded: Loaded, outcomes: Mapping[str, Outcome | None], probe: Any) -> str:
    """Write a probe's scores, report and chart, each atomically, and return its verdict for printing.

    path: `<name>.<option>`, to which .json, .md and .png are added. outcomes: the outcome of each variant, the
    unchanged benchmark first. probe: the probe's module (see evaluation/probes).
    """
    found = {variant: outcome for variant, outcome in outcomes.items() if outcome is not None}
    scored = loaded.benchmark.scored
    scores = probe.probe_scores({variant: scored(outcome.records) for variant, outcome in found.items()})
    plain = next(iter(found.values()))
    about = {"settings": dict(plain.settings), "digests": dict(plain.digests), "versions": versions()}
    write_json(path.with_name(f"{path.name}.json"), {"benchmark": loaded.name, **scores, **about})
    write_text(path.with_name(f"{path.name}.md"), probe.report(path.stem, scores))
    draw_bars(path.with_name(f"{path.name}.png"), probe.bars(scores))
    return f"{probe.TITLE}: {scores['verdict']}\nfiles: {path}.{{json,md,png}}"


def write_suite(path: Path, contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Write a table of several benchmarks to `<path>.md` and `<path>.json`, and return it.

    contents: benchmark -> content of its results file.
    """
    rows: list[tuple[object, ...]] = []
    for name, content in contents.items():
        counted, scores, published = content["counts"], content["scores"], BY_TASK.get(content["benchmark"])
        row: tuple[object, ...] = (name, counted["total"], counted["failed"], counted["excluded"])
        for rule in RULES:
            found = scores.get(rule) or {"average": None, "interval": None}
            row += percent(found["average"]), span(found["interval"])
        average = sum(published.values()) / len(published) if published else None
        rows.append((*row, percent(scores["chance"]["average"]) if scores else MISSING, percent(average)))
    of_rules = [column for rule in RULES for column in (f"{rule} %", "95% interval")]
    text = f"# {path.name}\n\n" + table(("benchmark", "items", "failed", "excluded", *of_rules, "chance", LABEL), rows)
    text += f"\nOver all items asked, failed ones wrong. {NO_INTERVAL}\n"
    if judged := [name for name, content in contents.items() if not content["scores"]]:
        text += f"A judge scores {', '.join(judged)}: NAME.md has the commands.\n"
    write_text(path.with_name(f"{path.name}.md"), text)
    write_json(path.with_name(f"{path.name}.json"), {"benchmarks": contents})
    return text


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN, which is not valid JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def counts(loaded: Loaded, records: Sequence[Record]) -> dict[str, int]:
    """Count all items (`total`), answered ones, failed ones (such as unreadable media), and those in excluded tasks.

    If the context rule cut prompts, also count the items with a `cut` prompt, and the visual and text tokens cut.
    """
    failed = sum(bool(line.get("error")) for line in records)
    found = {
        "total": len(loaded.items) + loaded.num_excluded,
        "answered": len(records) - failed,
        "failed": failed,
        "excluded": loaded.num_excluded,
    }
    if cuts := [line["cut_tokens"] for line in records if any(line.get("cut_tokens", {}).values())]:
        found |= {"cut": len(cuts)} | {f"cut_{kind}_tokens": sum(cut[kind] for cut in cuts) for kind in cuts[0]}
    return found


def versions() -> dict[str, str]:
    """Return the versions of stllm, Python and those of PACKAGES that are installed."""
    installed = {package: version(package) for package in PACKAGES if find_spec(PACKAGES[package])}
    return {"stllm": __version__, "python": platform.python_version(), **installed}


# ---- the table and the chart ----------------------------------------------------------------------------------------


def run_report(name: str, loaded: Loaded, records: Sequence[Record], content: Mapping[str, Any]) -> str:
    """Return the report as Markdown. name: name of the run's files. content: content of the results file."""
    judged = loaded.benchmark.judged
    parts = [f"# {name}\n"]
    if judged:
        parts += _open_answers(loaded, records)
    else:
        parts += _accuracies(loaded, loaded.benchmark.scored(records), content["scores"])
    if loaded.notes:
        parts += ["## Notes\n", "\n".join(f"- {note}" for note in loaded.notes) + "\n"]
    if loaded.excluded:
        parts += ["## Excluded tasks\n", table(("task", "why"), list(loaded.excluded.items()), texts=2)]
    failed: list[tuple[object, ...]] = []
    for task, of_task in by_task(line for line in records if line.get("error")).items():
        causes: dict[str, list[str]] = {}
        for line in of_task:  # remove the file's name from the error, so that equal causes are counted together
            text = " ".join(str(line["error"]).split())
            place, colon, reason = text.partition(": ")
            own = str(line.get("video", "")).rsplit("/", 1)[-1].rsplit(".", 1)[0]
            causes.setdefault(reason if colon and own and own in place else text, []).append(str(line["id"]))
        for cause, ids in sorted(causes.items(), key=lambda group: -len(group[1])):
            shown = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
            failed.append((task or MISSING, cause, shown, len(ids)))
    if failed:
        parts += ["## Failed items\n", table(("task", "cause", "items", "failed"), failed, texts=3)]
    if judged:
        tasks, (lines, folder) = by_task(records), (quote(f"{name}.jsonl"), quote(name + JUDGED))
        axes = [axis for axis, task in TASK_OF_AXIS.items() if task in tasks] or [QA]
        commands = [f"stllm judge {axis} --pred-path {lines} --output-dir {folder} --model MODEL" for axis in axes]
        if loaded.name in ("vcgbench", *OF_BENCHMARK):
            commands.append(f"stllm table {folder}/*.results.json")
        parts += ["## Next, in this folder: a judge scores the predictions\n", "```", *commands, "```\n"]
    else:
        golds, apart = {item.id: item.answer for item in loaded.items}, []
        for line in differing(line for line in records if line.get("error") or "correct" in line):
            right = "official" if line["correct"]["official"] else "strict"
            said = str(line["prediction"]).strip() or "(empty)"
            apart.append((line["id"], line["task"], said, golds[line["id"]], right))
        found = table(("item", "task", "prediction", "answer", "right by"), apart, texts=5) if apart else "None.\n"
        parts += [f"## Items that the two rules score differently: {len(apart)}\n"]
        parts += [f"{loaded.benchmark.rules}\n"] if loaded.benchmark.rules else []
        parts.append(found)
    made_by = [*content["digests"].items(), *content["versions"].items()]
    return "\n".join([*parts, "## Made by\n", table(("what", "digest or version"), made_by, texts=2)])


def _open_answers(loaded: Loaded, records: Sequence[Record]) -> list[str]:
    """Return the report's section for a benchmark that a judge scores: numbers of items per task."""
    rows: list[tuple[object, ...]] = []
    for task, lines in [*by_task(records).items(), ("all", records)]:
        answered = [line["prediction"] for line in lines if not line.get("error")]
        texts = [said if isinstance(said, list) else [said] for said in answered]
        empty = sum(not all(str(text).strip() for text in both) for both in texts)
        rows.append((task or "questions", len(lines), len(answered), empty, len(lines) - len(answered)))
    items = f"Items: {len(records) + loaded.num_excluded} in all, {loaded.num_excluded} excluded.\n"
    header = ("part", "items", "answered", "of them empty", "failed")
    return [table(header, rows if len(rows) > 2 else rows[:1]), "", items]


def _accuracies(loaded: Loaded, records: Sequence[Record], scores: Mapping[str, Any]) -> list[str]:
    """Return the report's sections with averages, intervals, accuracies per task and group, and published figures.

    records: those that are scored. scores: the `scores` of the results file.
    """
    name, title, over = loaded.name, loaded.benchmark.title, loaded.benchmark.mean_over
    total, published, asked = tally(records), BY_TASK.get(loaded.name, {}), by_task(records)
    counted = tally(asked.get(over, [])) if over not in (ITEMS, TASKS) else total
    rows: list[tuple[object, ...]] = []
    for words, key, count in (
        ("answered", "average_answered", counted.answered),
        ("all asked, failed ones wrong", "average", counted.asked),
    ):
        row: tuple[object, ...] = (f"ours, over {words}",)
        for rule in RULES:
            shown = span(scores[rule]["interval"]) if key == "average" else ""
            row += percent(scores[rule][key]), shown, f"{counted.right[rule]}/{count}"
        rows.append(row)
    if any(scores[rule]["parsed"] is not None for rule in RULES):
        parsed = [cell for rule in RULES for cell in (percent(scores[rule]["parsed"]), "", "")]
        rows.append(("the rule could read, % of answered", *parsed))
    if (guessed := scores["chance"]["average"]) is not None:
        rows.append(("chance", percent(guessed), "", "", percent(guessed), "", ""))
    if published:
        average = sum(published.values()) / len(published)
        rows.append((f"{LABEL} ({len(published)} tasks)", MISSING, "", "", percent(average), "", ""))
        if asked and asked.keys() < published.keys():
            average = sum(published[task] for task in asked) / len(asked)
            rows.append((f"{LABEL}, the {len(asked)} tasks asked here", MISSING, "", "", percent(average), "", ""))
    of = {ITEMS: "average", TASKS: "mean of the tasks"}.get(over, f"{over} score")
    averages = table((of, "strict %", "95% interval", "right/items", "official %", "95% interval", "right/items"), rows)
    items = "Items: " if over in (ITEMS, TASKS) else "Pairs and groups: "
    items += f"{total.asked + loaded.num_excluded} in all; {total.answered} answered, {total.failed} failed"
    items += f", {loaded.num_excluded} excluded with their tasks." if loaded.num_excluded else "."
    items += " Intervals: over all asked; clustered by video where one has several questions, else Wilson's."
    if published:
        items += f" Published figures: {SOURCES[name]}, by the official rule, on {title}'s own clips. {NO_INTERVAL}"
    parts = [averages, f"{items}\n"]
    if methods := BY_METHOD.get(name):
        columns = list(dict.fromkeys(column for figures in methods.values() for column in figures))
        rows = [(method, *(percent(figures.get(column)) for column in columns)) for method, figures in methods.items()]
        parts += ["## Published figures\n", table(("method", *columns), rows), f"{SOURCES[name]}. {NO_INTERVAL}\n"]

    rows = []
    for task in _task_names(loaded, scores):
        row = (task, "excluded", *[MISSING] * 7)
        if task in asked:
            row = (task, len(asked[task]), tally(asked[task]).failed)
            for rule in RULES:
                row += percent(scores[rule]["tasks_answered"][task]), percent(scores[rule]["tasks"][task])
                row += (span(scores[rule]["task_intervals"][task]),)
        rows.append((*row, percent(published.get(task))) if published else row)
    of_rules = [column for rule in RULES for column in (rule, f"{rule}, all", "95% interval")]
    header = ("task", "items", "failed", *of_rules)
    note = "Percent over answered items, and over all items asked with failed ones wrong.\n"
    parts += ["## Tasks\n", table((*header, LABEL) if published else header, rows), note]
    for kind, groups in scores[RULES[0]].get("groups", {}).items():
        rows = []
        for group, found in groups.items():
            both = [scores[rule]["groups"][kind][group] for rule in RULES]
            figures = [cell for one in both for cell in (percent(one["accuracy"]), span(one["interval"]))]
            rows.append((group, found["items"], *figures))
        of_rules = [column for rule in RULES for column in (f"{rule}, all", "95% interval")]
        parts += [f"## By {kind}\n", table((kind, "items", *of_rules), rows)]
    return parts


def _task_names(loaded: Loaded, scores: Mapping[str, Any]) -> list[str]:
    """List asked and excluded tasks: those with published figures first, in their order, then the others."""
    there, published = [*scores[RULES[0]]["tasks"], *loaded.excluded], BY_TASK.get(loaded.name, {})
    return [task for task in published if task in there] + [task for task in there if task not in published]


def run_bars(loaded: Loaded, scores: Mapping[str, Any]) -> Bars:
    """Return the chart: average and accuracy per task with 95 % intervals, beside the published figures."""
    tasks = _task_names(loaded, scores)
    intervals = {
        f"ours, {rule}": [scores[rule]["interval"], *map(scores[rule]["task_intervals"].get, tasks)] for rule in RULES
    }
    series: dict[str, list[float | None]] = {
        f"ours, {rule}": [scores[rule]["average"], *map(scores[rule]["tasks"].get, tasks)] for rule in RULES
    }
    if published := BY_TASK.get(loaded.name):
        series[LABEL] = [sum(published.values()) / len(published), *map(published.get, tasks)]
    return Bars(
        title=f"{loaded.benchmark.title}: accuracy by task",
        axis="accuracy, % of the items asked",
        groups=["Average", *tasks],
        series=series,
        intervals=intervals,
        notes=dict.fromkeys(loaded.excluded, "excluded"),
    )


# ---- the command line -----------------------------------------------------------------------------------------------


def summary(path: Path, loaded: Loaded, outcome: Outcome, content: Mapping[str, Any], seconds: float) -> str:
    """Return the text to print after a run.

    path: path of the result files without extension. content: content of the results file. seconds: duration of the
    command.
    """
    counted, lines = content["counts"], []
    for rule in RULES if content["scores"] else ():
        scores = content["scores"][rule]
        figures = {"of all items": scores["average"], "of those answered": scores["average_answered"]}
        said = [f"{value:.1f} % {of}" for of, value in figures.items() if value is not None]
        if scores["interval"] is not None:
            said[0] += f" (95 % interval {span(scores['interval'])})"
        lines.append(f"{loaded.name}, {rule}: {', '.join(said)}")
    words = ", ".join(f"{counted[kind]} {kind}" for kind in ("answered", "failed", "excluded"))
    asked, own = outcome.settings["evaluation"]["num_frames"], outcome.settings["model"]["num_frames"]
    frames = "one frame a second of each video" if asked == 0 else f"{asked} frames of each video"
    if own is not None:
        frames += ", the checkpoint's own number" if asked == own else f" (the checkpoint's own number: {own})"
    lines += [f"{words}, of {counted['total']}; {seconds:.0f} s", frames]
    if "cut" in counted:
        lines.append(f"the context rule cut the prompts of {counted['cut']} items, see cut_tokens in {path}.jsonl")
    errors = [record["error"] for record in outcome.records if record.get("error")]
    lines += [f"failed: {error}" for error in errors[:SHOWN_FAILURES]]
    if len(errors) > SHOWN_FAILURES:
        lines.append(f"failed: {len(errors) - SHOWN_FAILURES} more, see {path}.jsonl")
    lines += [f"excluded: {task}: {reason}" for task, reason in loaded.excluded.items()]
    return "\n".join([*lines, f"files: {path}.*"])
