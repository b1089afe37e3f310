"""The paper's table with a row for the user's results of several benchmarks (`stllm table`).

Source of the layout: ST-LLM (arXiv 2404.00308), its comparison of MVBench, VcgBench and zero-shot VideoQA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError, unknown_name
from stllm.common.files import check_regular, user_path
from stllm.common.jsonl import loads
from stllm.evaluation.axes import QA, VCGBENCH_AXES, vcgbench_average
from stllm.evaluation.published import BY_OTHERS, COLUMNS, METHODS, NO_INTERVAL, SOURCE, VCGBENCH_COLUMNS
from stllm.evaluation.reports.tables import percent, score, table

MVBENCH, AVERAGE = COLUMNS[:2]
VCGBENCH = "VcgBench"  # name in notes about any of its columns
OF_AXIS = dict(zip(VCGBENCH_AXES, VCGBENCH_COLUMNS, strict=True))  # axis -> column
OF_BENCHMARK = {"msvd": "MSVD", "msrvtt": "MSRVTT", "activitynet": "ANet"}  # VideoQA benchmark -> column
SCORES = {AVERAGE, *VCGBENCH_COLUMNS}  # columns with scores from 0 to 5; the others are percent
JUDGED = ".judged"  # `NAME.judged` is the folder for a judge's results about the predictions `NAME.jsonl`
EXPECTED = "a results file of `stllm evaluate` or `stllm judge` (NAME.results.json)"


@dataclass(frozen=True)
class Figure:
    """A result for one column of the table.

    official: the score as the benchmark's script computes it. own: the score by the strict rule, or for a judge's
    scores their mean without truncation. note: its source. part: description of the part of the benchmark that was
    asked, such as "first 5 a task"; "" for all of it.
    """

    official: float | None
    own: float | None
    note: str
    part: str = ""


NO_FIGURE = Figure(None, None, "")


def paper_table(results: Sequence[str]) -> str:
    """Return the table as Markdown. Raises UserError.

    results: paths of results files; BENCH=PATH for a judge's results of VideoQA.
    """
    figures: dict[str, Figure] = {}
    judged: list[dict[str, Any]] = []
    for entry in results:
        name, equals, file = entry.partition("=")
        if not equals or user_path(entry).exists():  # an existing path may contain "="
            name, file = "", entry
        elif name not in OF_BENCHMARK:
            raise UserError(unknown_name("benchmark", name, OF_BENCHMARK))
        path = user_path(file)
        content = _read(path)
        run = _run_of(content, path)
        column = _column(content, run, name, path)
        if column in figures:
            raise UserError(f"{path}: a second result for the column {column}: a table shows one run, name one of them")
        figures[column] = _figure(content, run, path)
        if content.get("axis") in OF_AXIS:
            judged.append(content)
    notes = [f"{column}: {figures[column].note}" for column in COLUMNS if column in figures]
    # if only parts of benchmarks were asked, the label of the row says so: " (MVBench: first 5 a task)"
    named = [(VCGBENCH if column in SCORES else column, figure.part) for column, figure in figures.items()]
    asked = dict.fromkeys(f"{title}: {part}" for title, part in named if part)
    parts = f" ({'; '.join(asked)})" if asked else ""
    if judged:
        notes.insert(0, "Scores depend on the judge and its instructions: compare those of one judge only.")
        try:
            average = vcgbench_average(judged)
            figures[AVERAGE] = Figure(average["mean_truncated"], average["mean"], "")
        except UserError as error:  # an axis is missing, or has another judge: a note explains the empty cell
            notes.append(str(error))
    rows: list[tuple[str, ...]] = [(method, *map(_cell, COLUMNS, values)) for method, values in METHODS.items()]
    ours = [figures.get(column, NO_FIGURE) for column in COLUMNS]
    rows.append((f"ours, official rules{parts}", *map(_cell, COLUMNS, (figure.official for figure in ours))))
    rows.append((f"ours, strict rules{parts}", *map(_cell, COLUMNS, (figure.own for figure in ours))))
    rules = (
        f"Rows above ours: published ({SOURCE}). Official rules: MVBench's matcher, a judge's scores truncated; strict "
        "rules: the option's letter or text, scores as they are. MVBench and VideoQA in percent, VcgBench from 0 to 5."
    )
    found = "; ".join(f"{title} {value:g} ({whose})" for title, value, whose in BY_OTHERS)
    others = f"ST-LLM as others measured it, neither by its authors nor by us: {found}. {NO_INTERVAL}"
    return table(("", *COLUMNS), rows) + "\n" + "".join(f"- {line}\n" for line in (rules, *notes, others))


def _read(path: Path) -> dict[str, Any]:
    check_regular(path, EXPECTED)
    try:
        content = loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {EXPECTED}") from None
    except ValueError:
        raise UserError(f"{path}: no JSON; expected {EXPECTED}") from None
    is_results = isinstance(content, dict) and isinstance(content.get("counts"), dict)
    if is_results:  # check the parts that are used below
        settings = content.get("settings") or {}
        asked = isinstance(settings, dict) and (settings.get("evaluation") or {})
        is_results = isinstance(asked, dict) and isinstance(asked.get("tasks") or [], list)
        is_results = is_results and isinstance(content.get("axis", ""), str)
    if not is_results:
        raise UserError(f"{path}: another kind of file; expected {EXPECTED}")
    return content


def _column(content: Mapping[str, Any], run: Mapping[str, Any], name: str, path: Path) -> str:
    """Return the column for a results file. run: see `_run_of`. name: the VideoQA benchmark if the user gave it."""
    axis = content.get("axis")
    if axis in OF_AXIS:
        return OF_AXIS[axis]
    if axis == QA:
        name = name or str(run.get("benchmark", ""))
        if name not in OF_BENCHMARK:
            found = f"found {name}" if name else "the file does not say"
            raise UserError(
                f"{path}: of which benchmark is it? {found}, the table has columns for {', '.join(OF_BENCHMARK)}: "
                "write one of them and = before the path"
            )
        return OF_BENCHMARK[name]
    if content.get("benchmark") == "mvbench":
        return MVBENCH
    if content.get("scores"):
        raise UserError(
            f"{path}: the paper's table has no column for {content.get('benchmark')}: `stllm evaluate suite` prints a "
            "table of several benchmarks, `stllm table --compare` compares two runs of one"
        )
    raise UserError(
        f"{path}: of {content.get('benchmark')} it has counts and no scores: run `stllm judge`, and name its results"
    )


def _run_of(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the results of `stllm evaluate` that belong to a results file, or {} if they are not found.

    For a judge's results in `NAME.judged`, this is NAME.results.json beside that folder. Otherwise it is the file
    itself.
    """
    folder = path.resolve().parent
    beside = folder.with_name(f"{folder.name.removesuffix(JUDGED)}.results.json")
    if "axis" not in content:
        return content
    return _read(beside) if folder.name.endswith(JUDGED) and beside.is_file() else {}


def _figure(content: Mapping[str, Any], run: Mapping[str, Any], path: Path) -> Figure:
    asked = (run.get("settings") or {}).get("evaluation") or {}
    tasks, limit, counts = asked.get("tasks"), asked.get("limit"), content["counts"]
    # only for MVBench: a column of VcgBench belongs to one task
    words = [f"{len(tasks)} of its tasks"] if tasks and run.get("benchmark") == "mvbench" else []
    part = ", ".join([*words, f"first {limit} a task"] if limit else words)
    try:
        if "axis" not in content:
            note = f"{path}, {counts['answered']} answered, {counts['failed']} failed, {counts['excluded']} excluded"
            scores = content["scores"]
            return Figure(scores["official"]["average"], scores["strict"]["average"], note, part)
        missing = counts["failed"] + counts.get("unanswered", 0)
        note = f"{path}, judge {content['judge']}, instructions {content['prompt_digest']}, {missing} not judged"
        if not run:
            note += f", {counts['scored']} judged; whether those are all of the benchmark's the file does not say"
        official, own = ("accuracy", "accuracy") if content["axis"] == QA else ("mean_truncated", "mean")
        return Figure(content[official], content[own], note, part)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: lacks {error}; expected {EXPECTED}") from None


def _cell(column: str, value: float | None) -> str:
    return score(value) if column in SCORES else percent(value)
