"""Scores of multiple choice: is an answer right, how many are, and could a difference be chance.

Answers are matched by two rules: MVBench's own ("official": the benchmark's script, arXiv 2311.17005; cases in
tests/golden/sampling.json), and a strict one that an empty answer cannot pass. Statistics: McNemar's exact test, the
adjusted Wald interval of matched proportions (Agresti and Min, 2005), Pearson's chi-square.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

Record = dict[str, Any]  # a line of `<name>.jsonl`

RULES = ("strict", "official")
Z95 = 1.959964  # of a two-sided 95% interval
# A letter that stands for an option: in a bracket, before a mark, or all there is.
_LETTER = re.compile(r"\(*\s*([A-Za-z])\s*(?:[).:]|$)")
_LETTER_AND_TEXT = re.compile(r"\(*\s*([A-Za-z])\s+(.*)", re.DOTALL)


# ---- one answer -----------------------------------------------------------------------------------------------------


def official_match(prediction: str, gold: str) -> bool:
    """Compare the first words in lower case: the prediction's, without dots, lies in the gold's, or the reverse.

    gold: as `gold_option` gives it. An empty prediction lies in every gold.
    """
    said, right = (text.lower().split(" ")[0] for text in (prediction, gold))
    return said.replace(".", "") in right or right in said


def strict_match(prediction: str, candidates: Sequence[str], answer: str) -> bool:
    """True if the option that the prediction names, by its letter or its whole text, is the answer."""
    number = chosen_option(prediction, candidates)
    return number is not None and candidates[number] == answer


def chosen_option(prediction: str, candidates: Sequence[str]) -> int | None:
    """Return the number of the option that a prediction names, None when it names none.

    An option is named by a letter at the beginning ("(B) ...", "B. ...", "b", or "B" followed by that option's text),
    or by its text and nothing else. Case, outer spaces and a full stop at the end make no difference.
    """
    said = prediction.strip()
    if letter := _LETTER.match(said):
        number = ascii_uppercase.index(letter[1].upper())
        return number if number < len(candidates) else None
    texts = [_plain(candidate) for candidate in candidates]
    if both := _LETTER_AND_TEXT.match(said):
        number = ascii_uppercase.index(both[1].upper())
        if number < len(texts) and _plain(both[2]) == texts[number]:
            return number
    for text in (_plain(said), _plain(said.removeprefix("("))):  # the prompt ends in a bracket
        if text in texts:
            return texts.index(text)
    return None


def gold_option(candidates: Sequence[str], answer: str) -> str:
    """The answer as the official files have it: "(B) to the left". Raises ValueError when it is no candidate."""
    # The official script takes the last one of options with equal texts.
    number = max(number for number, candidate in enumerate(candidates) if candidate == answer)
    return f"({ascii_uppercase[number]}) {answer}"


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


# ---- many answers ---------------------------------------------------------------------------------------------------


def share(part: int, whole: int) -> float | None:
    """Percent; None of nothing, so that no table has a NaN."""
    return 100 * part / whole if whole else None


@dataclass(frozen=True)
class Tally:
    """Counts of lines. right: items answered rightly, by rule. Items that failed (unreadable video) are never right."""

    answered: int
    failed: int
    right: Mapping[str, int]

    @property
    def asked(self) -> int:
        """Answered and failed ones."""
        return self.answered + self.failed

    def over_answered(self, rule: str) -> float | None:
        """Percent of the items that were answered; None when there is none."""
        return share(self.right[rule], self.answered)

    def over_all(self, rule: str) -> float | None:
        """Percent of all items asked, failed ones wrong; None when there is none."""
        return share(self.right[rule], self.asked)


def tally(records: Iterable[Record]) -> Tally:
    """Count these lines."""
    lines = list(records)
    answered = [line for line in lines if not line.get("error")]
    right = {rule: sum(bool(line["correct"][rule]) for line in answered) for rule in RULES}
    return Tally(answered=len(answered), failed=len(lines) - len(answered), right=right)


def by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The lines of each task, tasks in the order in which they come."""
    groups: dict[str, list[Record]] = {}
    for line in records:
        groups.setdefault(str(line["task"]), []).append(line)
    return groups


def accuracies(records: Sequence[Record]) -> dict[str, Any]:
    """Percent, by either rule: {"strict": ..., "official": ..., "differing": ids on which the rules differ}.

    Of each rule: `average` and `tasks` over all items that were asked, failed ones wrong; `average_answered` and
    `tasks_answered` over those that were answered, None where there is none. Averages are over items, not tasks.
    """
    tasks = {name: tally(lines) for name, lines in by_task(records).items()}
    total = tally(records)
    scores: dict[str, Any] = {
        rule: {
            "average": total.over_all(rule),
            "average_answered": total.over_answered(rule),
            "tasks": {name: task.over_all(rule) for name, task in tasks.items()},
            "tasks_answered": {name: task.over_answered(rule) for name, task in tasks.items()},
        }
        for rule in RULES
    }
    return {**scores, "differing": [line["id"] for line in differing(records)]}


def differing(records: Iterable[Record]) -> list[Record]:
    """The answered lines that one rule counts as right and the other as wrong."""
    answered = (line for line in records if not line.get("error"))
    return [line for line in answered if line["correct"]["official"] != line["correct"]["strict"]]


# ---- chance ---------------------------------------------------------------------------------------------------------


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Compare the same items asked in two ways, right or wrong in each.

    `items`: compared; `lost`: right the first way only; `gained`: right the second way only; `difference`: the second
    accuracy less the first, in percentage points, and its 95% `interval`, both None of no items; `p`: two-sided, how
    likely so uneven a split of lost and gained is when neither way is better.
    """
    both = list(zip(first, second, strict=True))
    items, lost, gained = len(both), both.count((True, False)), both.count((False, True))
    difference = interval = None
    if items:
        difference = 100 * (gained - lost) / items
        centre = (gained - lost) / (items + 2)
        spread = Z95 * math.sqrt((gained + lost + 1) / (items + 2) - centre**2) / math.sqrt(items + 2)
        interval = (100 * max(-1.0, centre - spread), 100 * min(1.0, centre + spread))
    changed = lost + gained
    p = min(1.0, 2 * sum(math.comb(changed, k) for k in range(min(lost, gained) + 1)) / 2**changed)
    return {"items": items, "lost": lost, "gained": gained, "difference": difference, "interval": interval, "p": p}


def chi_square(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's sum over the cells; those of which nothing is expected are left out."""
    return sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True) if due)


def chi_square_p(value: float, degrees: int) -> float:
    """The probability that a chi-square of so many degrees of freedom is that large or larger."""
    import torch

    halves = torch.tensor([degrees / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves)) if degrees > 0 else 1.0
