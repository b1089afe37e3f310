"""Paired comparison of two runs over the same items (`stllm table --compare`).

The standard error of paired differences is smaller than that of two separate scores, since both runs have the same hard
items (Miller, arXiv 2411.00640). Sources of the statistics: see scores.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stllm.common.config import first_line
from stllm.common.errors import UserError
from stllm.common.files import check_regular, user_path, write_text
from stllm.common.jsonl import read_records
from stllm.common.registry import benchmarks
from stllm.evaluation.axes import HIGHEST
from stllm.evaluation.benchmarks.base import Benchmark
from stllm.evaluation.reports.tables import MISSING, Bars, draw_bars, table
from stllm.evaluation.results import write_json
from stllm.evaluation.scores import ITEMS, RULES, TASKS, Record, by_group, by_task, interval, paired

ALL = "all items"
SHOWN = 20  # gained or lost items that the printed text lists at most
EXPECTED = "a line that `stllm evaluate` (NAME.jsonl) or `stllm judge` (AXIS.ledger.jsonl) wrote: name such a file"


def compare(first: str | Path, second: str | Path, output: str | Path | None = None) -> str:
    """Compare two files of records, and return a report as Markdown.

    first, second: NAME.jsonl of `stllm evaluate`, or ledgers of `stllm judge`. output: path without extension to which
    the comparison is written as .json, .md and .png. Raises UserError for other files, and if the questions differ.
    """
    paths = [user_path(first), user_path(second)]
    benchmark, runs = _benchmark(paths[0]), [_read(path) for path in paths]
    high = max(line.get("high", 100.0) for line in runs[0])  # best value: 100 for percent, 5 for a judge's scores
    names = [path.name.removesuffix(".jsonl") for path in paths]
    if names[0] == names[1]:  # such as mvbench.jsonl in the folders of two checkpoints
        names = [f"{path.parent.name}/{name}" for path, name in zip(paths, names, strict=True)]
    before, after = _same_items(paths, runs)
    places = {line["id"]: place for place, line in enumerate(before)}
    over = ITEMS if benchmark is None else benchmark.mean_over
    chosen = before if over in (ITEMS, TASKS) else by_task(before).get(over, before)
    groups = {ALL: [places[line["id"]] for line in chosen]}
    kinds = {"": by_task(before), **by_group(before)}
    for kind, found in kinds.items():
        for name, lines in found.items():
            if len(lines) < len(before):
                groups[f"{kind}: {name}" if kind else name] = [places[line["id"]] for line in lines]
    results: dict[str, Any] = {"runs": [str(path) for path in paths], "high": high}
    for rule in RULES:
        values = [
            [0.0 if line.get("error") else float(line["correct"][rule]) for line in run] for run in (before, after)
        ]
        results[rule] = {name: _group(members, before, values, high) for name, members in groups.items()}
        for kind, sign in (("gained", 1), ("lost", -1)):
            ids = [before[place]["id"] for place in groups[ALL] if sign * (values[1][place] - values[0][place]) > 0]
            results[rule][ALL][f"{kind}_items"] = ids
    text = report(names, results)
    if output is not None:
        path = user_path(output)
        write_json(path.with_name(f"{path.name}.json"), results)
        write_text(path.with_name(f"{path.name}.md"), text)
        draw_bars(path.with_name(f"{path.name}.png"), bars(names, results))
    return text


def _read(path: Path) -> list[Record]:
    """Read a file of records, and return those that a run's scores are computed from. Raises UserError."""
    check_regular(path, EXPECTED)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file, expected {EXPECTED}")
    lines: dict[str, Record] = {}
    for number, line in read_records(path, f"expected {EXPECTED}"):
        if "run" in line:  # a line with a ledger's settings
            continue
        line = _of_judge(line) if {"key", "axis", "parsed"} <= line.keys() else line
        if not isinstance(line.get("id"), str) or "question" not in line:
            raise UserError(f"{path}, line {number}: found the fields {', '.join(line)}, expected {EXPECTED}")
        lines[line["id"]] = line
    benchmark = _benchmark(path)
    found = list(lines.values()) if benchmark is None else benchmark.scored(list(lines.values()))
    if judged := [line["id"] for line in found if not line.get("error") and "correct" not in line]:
        raise UserError(
            f"{path}: {judged[0]} has no `correct`, as a judge decides about it: compare the judge's ledgers"
        )
    if not found:
        raise UserError(f"{path}: found no line that is scored, expected {EXPECTED}")
    return found


def _of_judge(entry: Record) -> Record:
    """Convert a line of a judge's ledger to a record of an evaluation.

    `correct` is yes or no, or the score divided by 5: exact for the strict rule, truncated for the official one.
    """
    parsed = entry["parsed"] or {}
    line = {name: entry.get(name) for name in ("question", "answer", "video")} | {
        "id": entry["key"],
        "task": entry["axis"],
    }
    if not parsed:
        return {**line, "error": str(entry.get("error") or "not judged")}
    if "pred" in parsed:
        return {**line, "correct": dict.fromkeys(RULES, parsed["pred"] == "yes")}
    values = {"strict": parsed["score"] / HIGHEST, "official": int(parsed["score"]) / HIGHEST}
    return {**line, "correct": values, "high": float(HIGHEST)}


def _benchmark(path: Path) -> Benchmark | None:
    """Return the benchmark named in the run's settings file, or None if there is no such file. path: NAME.jsonl."""
    file = path.with_name(f"{path.name.removesuffix('.jsonl')}.config.yaml")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML ({first_line(error)}): restore it") from None
    name = content.get("benchmark") if isinstance(content, dict) else None
    return benchmarks.get(name) if isinstance(name, str) else None


def _same_items(paths: Sequence[Path], runs: Sequence[list[Record]]) -> tuple[list[Record], list[Record]]:
    """Return the records of both runs in the order of the first. Raises UserError if their items differ.

    The order of an item's options may differ (`--permute`).
    """
    second = {line["id"]: line for line in runs[1]}
    for here, there, mine, other in ((0, 1, runs[0], second), (1, 0, runs[1], {line["id"]: line for line in runs[0]})):
        if gone := [line["id"] for line in mine if line["id"] not in other]:
            raise UserError(
                f"{paths[there]} lacks {len(gone)} of the items of {paths[here]} ({gone[0]}): compare runs of the same "
                "benchmark, with the same --tasks and --limit"
            )
    for line in runs[0]:
        for key in ("task", "video", "question", "answer", "candidates", "clip"):
            values = [
                sorted(found) if key == "candidates" and found else found
                for found in (line.get(key), second[line["id"]].get(key))
            ]
            if values[0] != values[1]:
                raise UserError(
                    f"{paths[1]}: {key} of {line['id']} is {values[1]!r}, and in {paths[0]} it is {values[0]!r}: "
                    "compare runs of the same questions"
                )
    return list(runs[0]), [second[line["id"]] for line in runs[0]]


def _group(
    members: Sequence[int], lines: Sequence[Record], values: Sequence[Sequence[float]], high: float
) -> dict[str, Any]:
    """Compare the runs over some items: the result of `paired`, and the mean of each run with its interval.

    members: indices of the items in `lines` and in both runs' `values`. high: the highest possible score (100 or 5).
    """
    chosen = [[run[place] for place in members] for run in values]
    videos = [str(lines[place].get("video") or lines[place]["id"]) for place in members]
    means = [high * sum(run) / len(run) for run in chosen]
    intervals = [interval(run, videos, high=high) for run in chosen]
    return {**paired(chosen[0], chosen[1], videos, high=high), "accuracies": means, "intervals": intervals}


def report(names: Sequence[str], results: Mapping[str, Any]) -> str:
    """Return the report as Markdown. names: names of the two runs. results: the content of the JSON file."""
    parts = [f"# {names[1]} against {names[0]}\n"]
    digits, unit = (1, " %") if results["high"] == 100 else (2, "")
    for rule in RULES:
        rows: list[tuple[object, ...]] = []
        for group, found in results[rule].items():
            low, high = found["interval"] or (0.0, 0.0)
            means = [f"{mean:.{digits}f}" for mean in found["accuracies"]]
            points = [f"{value:+.{digits}f}" for value in (found["difference"], low, high)]
            changed = (points[0], f"{points[1]} to {points[2]}", f"{found['p']:.2g}", found["gained"], found["lost"])
            rows.append((group, found["items"], *means, *changed))
        runs = (f"{names[0]}{unit}", f"{names[1]}{unit}")
        header = (rule, "items", *runs, "points", "95% interval", "p", "gained", "lost")
        parts += [table(header, rows)]
        for kind in ("gained", "lost"):
            ids = results[rule][ALL][f"{kind}_items"]
            more = f", and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            parts.append(f"{kind}: {', '.join(ids[:SHOWN]) or MISSING}{more}\n")
    parts.append(
        "All items are counted; failed ones are wrong. points: the second run minus the first, with the interval of "
        "the paired difference (clustered by video if one has several questions, else Agresti and Min). p: exact, "
        "two-sided, by video: if the runs were equally good, all changes of a video could as well be in the opposite "
        "direction (with one question a video, McNemar's test; for scores, the sign test). gained: items that the "
        "second run answers better. lost: items that the first run answers better.\n"
    )
    return "\n".join(parts)


def bars(names: Sequence[str], results: Mapping[str, Any]) -> Bars:
    """Return the chart: strict accuracy of both runs per group, with intervals."""
    groups = results[RULES[0]]
    return Bars(
        title=f"{names[1]} against {names[0]}",
        axis="strict accuracy, % of the items asked" if results["high"] == 100 else "score",
        high=results["high"],
        groups=[f"{group}  {found['difference']:+.1f}" for group, found in groups.items()],
        series={name: [found["accuracies"][run] for found in groups.values()] for run, name in enumerate(names)},
        intervals={name: [found["intervals"][run] for found in groups.values()] for run, name in enumerate(names)},
    )
