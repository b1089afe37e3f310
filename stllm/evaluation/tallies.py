"""Counts of a multiple-choice benchmark: how many items were answered, failed and right, by task and by rule."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stllm.evaluation.items import Record
from stllm.evaluation.tables import share

RULES = ("strict", "official")  # strict: the option's letter, or its text exactly; official: the published matcher


@dataclass(frozen=True)
class Tally:
    """right: items answered rightly, by rule. An item that failed (its video could not be read) is never right."""

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


def cause(record: Record) -> str:
    """Why a line failed, without the file's own name, so that equal causes are counted together."""
    text = " ".join(str(record["error"]).split())
    place, colon, reason = text.partition(": ")
    own = str(record.get("video", "")).rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return reason if colon and own and own in place else text


def by_cause(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The failed lines of each cause, the most frequent first."""
    groups: dict[str, list[Record]] = {}
    for line in records:
        if line.get("error"):
            groups.setdefault(cause(line), []).append(line)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))
