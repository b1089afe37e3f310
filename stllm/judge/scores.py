"""Scores from a ledger: the mean of an axis, plain and truncated as in the official script.

Items that could not be judged are in no mean but in every count. The bounds say where the mean would be with them.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stllm import __version__
from stllm.common.errors import UserError
from stllm.common.files import write_text
from stllm.common.jsonl import loads
from stllm.evaluation.axes import HIGHEST, LOWEST, QA, SAME, VCGBENCH_AXES, vcgbench_average
from stllm.judge.ledger import Entry, JudgeRun, Ledger
from stllm.judge.parser import Verdict

log = logging.getLogger(__name__)

NOT_ASKED = "not asked yet"
MAX_NAMED = 5  # failed items in the printed table

Results = dict[str, Any]


def score(run: JudgeRun, ledger: Ledger, keys: Iterable[str] | None = None) -> Results:
    """Compute the results file of one axis.

    keys: of all items to be judged. If None, the items are those of the ledger, and the others are only counted.
    accuracy is in percent, None on axes other than qa. Means are None when nothing was scored.
    """
    verdicts: list[Verdict] = []
    failed: dict[str, str] = {}
    for key in ledger.entries if keys is None else keys:
        outcome = ledger.entries[key].outcome if key in ledger.entries else NOT_ASKED
        if isinstance(outcome, Verdict):
            verdicts.append(outcome)
        else:
            failed[key] = outcome
    num_failed = run.num_items - len(verdicts)
    scores = [verdict.score for verdict in verdicts]
    right = [float(verdict.pred == "yes") for verdict in verdicts] if run.axis == QA else []
    accuracy = _mean(right)
    num_missing = num_failed + len(run.unanswered)
    return {
        "axis": run.axis,
        "mean": _mean(scores),
        "mean_truncated": _mean([float(int(score)) for score in scores]),
        "accuracy": None if accuracy is None else 100 * accuracy,
        "bounds": {
            "mean": _bounds(scores, num_missing, LOWEST, HIGHEST),
            "accuracy": [100 * bound for bound in _bounds(right, num_missing, 0, 1)] if run.axis == QA else None,
        },
        "counts": {
            "total": run.num_items + len(run.unanswered),
            "scored": len(scores),
            "failed": num_failed,
            "unanswered": len(run.unanswered),
        },
        "judge": ledger.model or run.requested_model,
        "prompt_digest": run.prompt_digest,
        "prompt_version": run.prompt_version,
        "settings": {
            "requested_model": run.requested_model,
            "base_url": run.base_url,
            "temperature": run.temperature,
            "max_tokens": run.max_tokens,
        },
        "failed_items": dict(sorted(failed.items())),
        "unanswered_items": dict(sorted(run.unanswered.items())),
        "versions": {"stllm": __version__},
    }


def write_average(folder: Path) -> str:
    """Write VcgBench's average once the results of all axes are in the folder. Return the line to print.

    Warns when the axes do not belong together. Raises UserError for a file that holds no results.
    """
    paths = [folder / f"{axis}.results.json" for axis in VCGBENCH_AXES]
    if not all(path.is_file() for path in paths):
        return ""
    results = []
    try:
        for path in paths:
            result = loads(path.read_text(encoding="utf-8"))
            results.append({name: result[name] for name in ("axis", "mean", "mean_truncated", *SAME)})
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a judge's results: move it away, and judge the axis again") from None
    target = folder / "vcgbench_average.json"
    try:
        average = vcgbench_average(results)
    except UserError as error:
        target.unlink(missing_ok=True)  # of scores that are no longer there
        log.warning("%s", error)
        return ""
    write_json(target, average)
    return f"VcgBench average {average['mean']:.2f} (truncated {average['mean_truncated']:.2f})\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def export_items(entries: Iterable[Entry], folder: Path) -> int:
    """Write the official item files, `<key>_<k>.json` = [reply, texts], of all scored items. Return their number."""
    scored = [(entry, entry.outcome) for entry in entries if isinstance(entry.outcome, Verdict)]
    for entry, verdict in scored:
        reply = {"score": verdict.score} if verdict.pred is None else {"pred": verdict.pred, "score": verdict.score}
        if isinstance(entry.question, str):
            texts = {"q": entry.question, "a": entry.answer, "pred": entry.prediction}
        else:
            pairs = zip(("q1", "q2", "pred1", "pred2"), (*entry.question, *entry.prediction), strict=False)
            texts = {**dict(pairs), "a": entry.answer}
        name = re.sub(r"[^\w.\-]", "_", entry.name)  # ids may hold slashes
        write_text(folder / f"{name}.json", json.dumps([reply, texts], ensure_ascii=False))
    return len(scored)


def table(result: Results) -> list[str]:
    """The lines to print."""
    counts = result["counts"]
    mean, truncated, accuracy = (
        "-" if value is None else f"{value:.2f}"
        for value in (result["mean"], result["mean_truncated"], result["accuracy"])
    )
    lines = [
        f"{'axis':<12} {'mean':>6} {'truncated':>9} {'accuracy':>8} {'scored':>6} {'failed':>6} {'unanswered':>10}",
        f"{result['axis']:<12} {mean:>6} {truncated:>9} {accuracy:>8} {counts['scored']:>6} {counts['failed']:>6} "
        f"{counts['unanswered']:>10}",
        f"judge {result['judge']}, instructions {result['prompt_version']} ({result['prompt_digest']})",
    ]
    if counts["failed"] or counts["unanswered"]:
        low, high = result["bounds"]["mean"]
        range_ = f"mean {low:.2f} to {high:.2f}"
        if result["bounds"]["accuracy"]:
            low, high = result["bounds"]["accuracy"]
            range_ += f", accuracy {low:.1f} to {high:.1f}"
        lines.append(f"over all {counts['total']} items, whatever the missing ones are worth: {range_}")
    for what in ("failed", "unanswered"):
        named = list(result[f"{what}_items"].items())
        lines += [f"{what}: {key}: {reason}" for key, reason in named[:MAX_NAMED]]
        if len(named) > MAX_NAMED:
            lines.append(f"{what}: {len(named) - MAX_NAMED} more, all listed in the results file")
        if len(named) < counts[what]:
            lines.append(f"{what}: {counts[what] - len(named)} that were never asked; name --pred-path to list them")
    return lines


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None  # exact, whatever the order


def _bounds(values: Sequence[float], num_missing: int, low: float, high: float) -> list[float]:
    """The mean with all missing values at their lowest, and the mean with all of them at their highest."""
    num_all = max(1, len(values) + num_missing)
    return [(math.fsum(values) + num_missing * bound) / num_all for bound in (low, high)]
