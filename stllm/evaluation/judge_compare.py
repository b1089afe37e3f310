"""Two judges of the same predictions, compared: agreement, Cohen's kappa, and the drift of the mean.

kappa: agreement beyond what the two would reach by chance with the same shares (Cohen 1960); of scores with quadratic
weights (Cohen 1968), so that 4 for 5 weighs less than 0 for 5.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stllm.common.errors import UserError
from stllm.evaluation.judge_axes import HIGHEST, LOWEST, QA
from stllm.evaluation.judge_ledger import JudgeRun, Ledger
from stllm.evaluation.judge_parser import Verdict

NEAR = 1  # points; "within one" is what two people usually agree to
DECISIONS = ("no", "yes")


def compare(ours: tuple[JudgeRun, Ledger], theirs: tuple[JudgeRun, Ledger]) -> dict[str, Any]:
    """How the verdicts of two ledgers agree, over the items that both have scored.

    kappa is None where chance alone would agree fully (one and the same score throughout). drift: the mean of `ours`
    less that of `theirs`. Raises UserError for ledgers of different axes or predictions, or without a common item.
    """
    (run, ledger), (other_run, other) = ours, theirs
    if run.axis != other_run.axis:
        raise UserError(
            f"{other.path} is of the axis {other_run.axis}, {ledger.path} of {run.axis}: name one of the same"
        )
    pairs = _pairs(ledger, other)
    scores = np.array([[one.score, two.score] for one, two in pairs])  # (N, 2)
    low, high = np.rint(scores).astype(int).T
    size = HIGHEST - LOWEST + 1
    steps = np.arange(size)
    result: dict[str, Any] = {
        "axis": run.axis,
        "judges": [_judge(run, ledger), _judge(other_run, other)],
        "same_instructions": run.prompt_digest == other_run.prompt_digest,
        "counts": {
            "common": len(pairs),
            "only_first": _num_scored(ledger) - len(pairs),
            "only_second": _num_scored(other) - len(pairs),
        },
        "means": scores.mean(axis=0).tolist(),
        "drift": float((scores[:, 0] - scores[:, 1]).mean()),
        "equal": float((low == high).mean()),
        "within_one": float((np.abs(scores[:, 0] - scores[:, 1]) <= NEAR).mean()),
        "kappa_scores": kappa(low - LOWEST, high - LOWEST, (steps[:, None] - steps) ** 2),
    }
    if run.axis == QA:
        first, second = (np.array([DECISIONS.index(pair[side].pred or "") for pair in pairs]) for side in (0, 1))
        result["accuracies"] = [100 * float(side.mean()) for side in (first, second)]
        result["same_decision"] = float((first == second).mean())
        result["kappa_decisions"] = kappa(first, second, 1 - np.eye(len(DECISIONS)))
    return result


def kappa(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float | None:
    """Cohen's kappa of two raters' categories, (N,) each, 0 to K-1. weights: (K, K), what a disagreement costs.

    1 is full agreement, 0 is chance; None where the raters' shares leave no room for disagreement.
    """
    table = np.zeros(weights.shape)
    np.add.at(table, (first, second), 1 / len(first))
    chance = np.outer(table.sum(axis=1), table.sum(axis=0))
    expected = float((weights * chance).sum())
    return 1 - float((weights * table).sum()) / expected if expected > 0 else None


def comparison_lines(result: Mapping[str, Any]) -> list[str]:
    """The lines to print."""
    counts, (first, second) = result["counts"], result["judges"]
    lines = [
        f"{result['axis']}: {counts['common']} items scored by both ({counts['only_first']} by the first alone, "
        f"{counts['only_second']} by the second alone)",
        f"first   {first['judge']}, instructions {first['prompt_digest']}: mean {result['means'][0]:.2f}",
        f"second  {second['judge']}, instructions {second['prompt_digest']}: mean {result['means'][1]:.2f}",
        f"drift {result['drift']:+.2f} (first less second); equal scores {result['equal']:.1%}, within one "
        f"{result['within_one']:.1%}, quadratic kappa {_shown(result['kappa_scores'])}",
    ]
    if "same_decision" in result:
        accuracies = " and ".join(f"{value:.1f}" for value in result["accuracies"])
        lines.append(
            f"accuracy {accuracies}; same yes or no {result['same_decision']:.1%}, kappa "
            f"{_shown(result['kappa_decisions'])}"
        )
    return lines


def _pairs(ledger: Ledger, other: Ledger) -> list[tuple[Verdict, Verdict]]:
    pairs = []
    for key, entry in ledger.entries.items():
        twin = other.entries.get(key)
        first, second = entry.outcome(), twin.outcome() if twin else None
        if twin is None or not isinstance(first, Verdict) or not isinstance(second, Verdict):
            continue
        if (entry.question, entry.answer, entry.prediction) != (twin.question, twin.answer, twin.prediction):
            raise UserError(
                f"{other.path}: item {key} has other texts than in {ledger.path}: compare judges of one and the same "
                "--pred-path"
            )
        pairs.append((first, second))
    if not pairs:
        raise UserError(f"{other.path} and {ledger.path} have no scored item in common: nothing can be compared")
    return pairs


def _judge(run: JudgeRun, ledger: Ledger) -> dict[str, str]:
    return {"judge": ledger.model or run.requested_model, "prompt_digest": run.prompt_digest}


def _num_scored(ledger: Ledger) -> int:
    return sum(entry.is_scored() for entry in ledger.entries.values())


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value if abs(value) >= 0.005 else 0.0:.2f}"  # never -0.00
