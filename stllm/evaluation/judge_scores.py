"""Scores from a ledger: the mean of an axis, plain and truncated as the official script has it, and VcgBench's average.

What could not be judged is in no mean and in every count; the bounds say where the mean would lie with it.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stllm import __version__
from stllm.common.errors import UserError
from stllm.common.files import write_text
from stllm.common.json_text import loads
from stllm.evaluation.judge_axes import HIGHEST, LOWEST, QA, VCGBENCH_AXES
from stllm.evaluation.judge_ledger import Entry, JudgeRun
from stllm.evaluation.judge_parser import Verdict

NOT_ASKED = "not asked yet"
SAME = {"judge": "judge", "prompt_digest": "instructions"}  # what scores must share to be averaged, in words
MAX_NAMED = 5  # failed items in the printed table

Results = dict[str, Any]


def score(run: JudgeRun, entries: Mapping[str, Entry], model: str | None, keys: Iterable[str] | None = None) -> Results:
    """The results file of one axis.

    entries: the ledger's lines by key. model: the exact id of the judge. keys: of all items to be judged; None: those
    in the ledger, the others being counted.
    accuracy is in percent, None in axes other than qa; means are None when nothing was scored.
    """
    verdicts: dict[str, Verdict] = {}
    failed: dict[str, str] = {}
    for key in entries if keys is None else keys:
        outcome = entries[key].outcome() if key in entries else NOT_ASKED
        if isinstance(outcome, Verdict):
            verdicts[key] = outcome
        else:
            failed[key] = outcome
    num_failed = run.num_items - len(verdicts)
    scores = [verdict.score for verdict in verdicts.values()]
    right = [float(verdict.pred == "yes") for verdict in verdicts.values()] if run.axis == QA else []
    num_missing = num_failed + len(run.unanswered)
    return {
        "axis": run.axis,
        "mean": _mean(scores),
        "mean_truncated": _mean([float(int(score)) for score in scores]),
        "accuracy": _percent(_mean(right)),
        "bounds": {
            "mean": _bounds(scores, num_missing, LOWEST, HIGHEST),
            "accuracy": [_percent(bound) for bound in _bounds(right, num_missing, 0, 1)] if run.axis == QA else None,
        },
        "counts": {
            "total": run.num_items + len(run.unanswered),
            "scored": len(scores),
            "failed": num_failed,
            "unanswered": len(run.unanswered),
        },
        "judge": model or run.requested_model,
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


def vcgbench_average(results: Sequence[Results]) -> Results:
    """The mean over VcgBench's five axes. Raises UserError when one is missing or was judged by other means."""
    by_axis = {result["axis"]: result for result in results}
    for axis in VCGBENCH_AXES:
        if axis not in by_axis or by_axis[axis]["mean"] is None:
            raise UserError(f"no average of VcgBench: the axis {axis} has no score yet")
    chosen = [by_axis[axis] for axis in VCGBENCH_AXES]
    for name, words in SAME.items():
        found = {axis: by_axis[axis][name] for axis in VCGBENCH_AXES}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{axis} {value}" for axis, value in found.items())
            raise UserError(f"no average of VcgBench: the axes have another {words} each ({listed})")
    return {
        "benchmark": "vcgbench",
        "mean": _mean([result["mean"] for result in chosen]),
        "mean_truncated": _mean([result["mean_truncated"] for result in chosen]),
        "axes": {result["axis"]: result["mean"] for result in chosen},
        **{name: chosen[0][name] for name in SAME},
    }


def read_results(folder: Path) -> list[Results]:
    """The results of all axes in a folder. Raises UserError for a file that is none of ours."""
    results = []
    for axis in VCGBENCH_AXES:
        path = folder / f"{axis}.results.json"
        if path.is_file():
            try:
                result = loads(path.read_text(encoding="utf-8"))
                results.append({name: result[name] for name in ("axis", "mean", "mean_truncated", *SAME)})
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: not a judge's results: move it away, and judge the axis again") from None
    return results


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def export_items(entries: Iterable[Entry], folder: Path) -> int:
    """Writes the official item files, `<key>_<k>.json` = [reply, texts], of what has a score; returns their number."""
    scored = [(entry, outcome) for entry in entries if isinstance(outcome := entry.outcome(), Verdict)]
    for entry, verdict in scored:
        reply = {"score": verdict.score} if verdict.pred is None else {"pred": verdict.pred, "score": verdict.score}
        name = re.sub(r"[^\w.\-]", "_", entry.name)  # ids may hold slashes
        write_text(folder / f"{name}.json", json.dumps([reply, _official_texts(entry)], ensure_ascii=False))
    return len(scored)


def table(result: Results) -> list[str]:
    """The lines to print."""
    counts, lines = result["counts"], []
    lines.append(
        f"{'axis':<12} {'mean':>6} {'truncated':>9} {'accuracy':>8} {'scored':>6} {'failed':>6} {'unanswered':>10}"
    )
    figures = f"{_shown(result['mean']):>6} {_shown(result['mean_truncated']):>9} {_shown(result['accuracy']):>8}"
    lines.append(
        f"{result['axis']:<12} {figures} {counts['scored']:>6} {counts['failed']:>6} {counts['unanswered']:>10}"
    )
    lines.append(f"judge {result['judge']}, instructions {result['prompt_version']} ({result['prompt_digest']})")
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


def _official_texts(entry: Entry) -> dict[str, str]:
    if isinstance(entry.question, str) and isinstance(entry.prediction, str):
        return {"q": entry.question, "a": entry.answer, "pred": entry.prediction}
    texts = dict(zip(("q1", "q2", "pred1", "pred2"), (*entry.question, *entry.prediction), strict=True))
    return {**texts, "a": entry.answer}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None  # exact, whatever the order


def _bounds(values: Sequence[float], num_missing: int, low: float, high: float) -> list[float]:
    """The mean with all missing values at their lowest, and at their highest."""
    num_all = len(values) + num_missing
    total = math.fsum(values)
    return [(total + num_missing * bound) / num_all for bound in (low, high)]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
