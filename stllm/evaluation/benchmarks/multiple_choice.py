"""Multiple choice: is a prediction right, and how many are, by task and by rule.

Two rules: MVBench's own matching ("official"), and a strict one that an empty answer cannot pass. Source of the
official rule: the benchmark's script (arXiv 2311.17005); cases in tests/golden/sampling.json.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

Record = dict[str, Any]  # a line of `<name>.jsonl`

RULES = ("strict", "official")
# A letter that stands for an option: in a bracket, before a mark, or all there is.
_LETTER = re.compile(r"\(*\s*([A-Za-z])\s*(?:[).:]|$)")
_LETTER_AND_TEXT = re.compile(r"\(*\s*([A-Za-z])\s+(.*)", re.DOTALL)


def official_match(prediction: str, gold: str) -> bool:
    """The official rule: the first words, in lower case; the prediction's without dots lies in the gold's, or the
    gold's in the prediction's. gold: as `gold_option` gives it. An empty prediction lies in every gold."""
    said, right = (text.lower().split(" ")[0] for text in (prediction, gold))
    return said.replace(".", "") in right or right in said


def strict_match(prediction: str, candidates: Sequence[str], answer: str) -> bool:
    """True if the option that the prediction names, by its letter or its whole text, is the answer."""
    number = chosen_option(prediction, candidates)
    return number is not None and candidates[number] == answer


def chosen_option(prediction: str, candidates: Sequence[str]) -> int | None:
    """The number of the option that a prediction names, None when it names none.

    An option is named by a letter at the beginning ("(B) ...", "B. ...", "b", or "B" followed by that option's text),
    or by its text and nothing else. Case, outer spaces and a full stop at the end make no difference.
    """
    if letter := _LETTER.match(prediction.strip()):
        return _number(letter[1], candidates)
    texts = [_plain(candidate) for candidate in candidates]
    if both := _LETTER_AND_TEXT.match(prediction.strip()):
        number = _number(both[1], candidates)
        if number is not None and _plain(both[2]) == texts[number]:
            return number
    for said in (_plain(prediction), _plain(prediction.strip().removeprefix("("))):  # the prompt ends in a bracket
        if said in texts:
            return texts.index(said)
    return None


def gold_option(candidates: Sequence[str], answer: str) -> str:
    """The answer as the official files have it: "(B) to the left". Raises ValueError when it is no candidate."""
    # The official script takes the last one where an option stands there twice.
    number = max(number for number, candidate in enumerate(candidates) if candidate == answer)
    return f"({ascii_uppercase[number]}) {answer}"


def _number(letter: str, candidates: Sequence[str]) -> int | None:
    number = ascii_uppercase.index(letter.upper())
    return number if number < len(candidates) else None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


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
    """Counts these lines."""
    lines = list(records)
    answered = [line for line in lines if not line.get("error")]
    right = {rule: sum(bool(line["correct"][rule]) for line in answered) for rule in RULES}
    return Tally(answered=len(answered), failed=len(lines) - len(answered), right=right)


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
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
    answered = [line for line in records if not line.get("error")]
    differing = [line["id"] for line in answered if line["correct"]["official"] != line["correct"]["strict"]]
    return {**scores, "differing": differing}
