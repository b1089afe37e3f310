"""Scores of multiple-choice answers: matching, accuracies, confidence intervals and tests.

Answers are matched by two rules. "official" is the benchmark's own; the one in this file is MVBench's (arXiv
2311.17005, cases in tests/golden/sampling.json). "strict" counts an empty answer as wrong. Statistics: Wilson's
interval; errors clustered by video, since questions about one video are not independent (Miller, arXiv 2411.00640);
McNemar's exact test, and its form for clusters, a randomization test; the adjusted Wald interval of matched proportions
(Agresti and Min, 2005); Pearson's chi-square.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

Record = dict[str, Any]  # an item's answer and scores; one line of `<name>.jsonl`

Interval = list[float]  # low, high

RULES = ("strict", "official")
ITEMS, TASKS = "items", "tasks"  # values of `mean_over`
Z95 = 1.959964  # standard errors on each side of a 95 % interval
# a letter that names an option: in a bracket, before a punctuation mark, or alone
_LETTER = re.compile(r"\(*\s*([A-Za-z])\s*(?:[).:]|$)")
_LETTER_AND_TEXT = re.compile(r"\(*\s*([A-Za-z])\s+(.*)", re.DOTALL)


# ---- one answer -----------------------------------------------------------------------------------------------------


def official_match(prediction: str, gold: str) -> bool:
    """Check by MVBench's official rule: the first word of one text is part of that of the other, ignoring case and ".".

    prediction: the text. gold: the result of `gold_option`. An empty prediction is always correct by this rule.
    """
    said, right = (text.lower().split(" ")[0] for text in (prediction, gold))
    return said.replace(".", "") in right or right in said


def strict_match(prediction: str, candidates: Sequence[str], answer: str) -> bool:
    """Check whether the prediction names the correct option, by its letter or its whole text."""
    number = chosen_option(prediction, candidates)
    return number is not None and candidates[number] == answer


def chosen_option(prediction: str, candidates: Sequence[str]) -> int | None:
    """Return the index of the option that a prediction names, or None if it names none.

    An option is named by a letter at the beginning ("(B) ...", "B. ...", "b", or "B" followed by the option's text),
    or by its exact text. Case, outer spaces and a final full stop are ignored.
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
    for text in (_plain(said), _plain(said.removeprefix("("))):  # MVBench adds a bracket to each prediction
        if text in texts:
            return texts.index(text)
    return None


def gold_option(candidates: Sequence[str], answer: str) -> str:
    """Return the answer in the official format, such as "(B) to the left". Raises ValueError if it is no candidate."""
    # The official script takes the last one of options with equal texts.
    number = max(number for number, candidate in enumerate(candidates) if candidate == answer)
    return f"({ascii_uppercase[number]}) {answer}"


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


# ---- many answers ---------------------------------------------------------------------------------------------------


def share(part: int, whole: int) -> float | None:
    """Return 100 * part / whole, or None if whole is 0."""
    return 100 * part / whole if whole else None


@dataclass(frozen=True)
class Tally:
    """Numbers of records. right: rule -> correct answers; failed items (unreadable video) are not correct.

    parsed: rule -> answers that the rule could interpret. A rule that interprets every answer has no entry.
    """

    answered: int
    failed: int
    right: Mapping[str, int]
    parsed: Mapping[str, int]

    @property
    def asked(self) -> int:
        """Return the number of answered and failed items."""
        return self.answered + self.failed

    def over_answered(self, rule: str) -> float | None:
        """Return the percentage correct of the answered items; None if there are none."""
        return share(self.right[rule], self.answered)

    def over_all(self, rule: str) -> float | None:
        """Return the percentage correct of all items, where failed ones count as wrong; None if there are none."""
        return share(self.right[rule], self.asked)


def tally(records: Iterable[Record]) -> Tally:
    """Count records: answered, failed, correct, and interpretable."""
    lines = list(records)
    answered = [line for line in lines if not line.get("error")]
    right = {rule: sum(bool(line["correct"][rule]) for line in answered) for rule in RULES}
    known = {rule for line in answered for rule in line.get("parsed", ())}
    parsed = {rule: sum(bool(line.get("parsed", {}).get(rule)) for line in answered) for rule in RULES if rule in known}
    return Tally(answered=len(answered), failed=len(lines) - len(answered), right=right, parsed=parsed)


def by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records by task, in the order of each task's first record."""
    groups: dict[str, list[Record]] = {}
    for line in records:
        groups.setdefault(str(line["task"]), []).append(line)
    return groups


def by_group(records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    """Group records by further categories: kind (such as "dimension") -> category -> records."""
    kinds: dict[str, dict[str, list[Record]]] = {}
    for line in records:
        for kind, names in line.get("groups", {}).items():
            for name in names:
                kinds.setdefault(kind, {}).setdefault(name, []).append(line)
    return {kind: dict(sorted(groups.items())) for kind, groups in kinds.items()}


def accuracies(records: Sequence[Record], mean_over: str = ITEMS) -> dict[str, Any]:
    """Compute the scores of a run in percent. The result has four keys: "strict", "official", "chance", "differing".

    strict, official: the scores by these rules. `average`, `tasks` and `groups` cover all items, and failed items count
        as wrong; `interval` and `task_intervals` are their 95 % intervals. `average_answered` and `tasks_answered`
        cover the answered items only. `parsed` is the percentage of answers that the rule could interpret. A score over
        no items is None.
    chance: the expected percentage correct by guessing. differing: ids of the items that are correct by one rule only.
    mean_over: see `Benchmark`.
    """
    tasks, groups, total = by_task(records), by_group(records), tally(records)
    of_task = {name: tally(lines) for name, lines in tasks.items()}
    scores: dict[str, Any] = {}
    for rule in RULES:
        shares = {name: found.over_all(rule) for name, found in of_task.items()}
        answered = {name: found.over_answered(rule) for name, found in of_task.items()}
        intervals = {name: accuracy_interval(lines, rule) for name, lines in tasks.items()}
        average = total.over_all(rule), total.over_answered(rule), accuracy_interval(records, rule)
        if mean_over == TASKS:
            average = mean(shares.values()), mean(answered.values()), accuracy_interval(records, rule, of_tasks=True)
        elif mean_over != ITEMS:
            average = shares.get(mean_over), answered.get(mean_over), intervals.get(mean_over)
        scores[rule] = {
            "average": average[0],
            "average_answered": average[1],
            "interval": average[2],
            "parsed": share(total.parsed[rule], total.answered) if rule in total.parsed else None,
            "tasks": shares,
            "tasks_answered": answered,
            "task_intervals": intervals,
        }
        if groups:
            scores[rule]["groups"] = {
                kind: {
                    name: {
                        "items": len(lines),
                        "accuracy": tally(lines).over_all(rule),
                        "interval": accuracy_interval(lines, rule),
                    }
                    for name, lines in found.items()
                }
                for kind, found in groups.items()
            }
    chances = {name: chance(lines) for name, lines in tasks.items()}
    overall = chance(records) if mean_over == ITEMS else mean(chances.values()) if mean_over == TASKS else None
    scores["chance"] = {"average": overall, "tasks": chances}
    return {**scores, "differing": [line["id"] for line in differing(records)]}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def chance(records: Iterable[Record]) -> float | None:
    """Return the expected percentage correct by guessing among the options; None if no record has options."""
    return mean(100 / len(line["candidates"]) for line in records if line.get("candidates"))


def differing(records: Iterable[Record]) -> list[Record]:
    """Return the answered records that are correct by one rule and wrong by the other."""
    answered = (line for line in records if not line.get("error"))
    return [line for line in answered if line["correct"]["official"] != line["correct"]["strict"]]


# ---- intervals and tests --------------------------------------------------------------------------------------------


def accuracy_interval(records: Sequence[Record], rule: str, *, of_tasks: bool = False) -> Interval | None:
    """Return the 95 % interval of the accuracy over all records, in percent; None without records.

    of_tasks: True for the interval of the mean over tasks.
    """
    right = [float(not line.get("error") and line["correct"][rule]) for line in records]
    tasks = [str(line["task"]) for line in records] if of_tasks else None
    return interval(right, [str(line.get("video") or line["id"]) for line in records], strata=tasks, high=100.0)


def interval(
    values: Sequence[float], clusters: Sequence[str], *, strata: Sequence[str] | None = None, high: float
) -> Interval | None:
    """Return the 95 % interval of a mean, scaled from 0..1 to 0..high; None without values.

    values: scores from 0 to 1. clusters: each value's cluster, such as its video; values of a cluster may be dependent.
    strata: each value's stratum, such as its task; the mean is then the mean of the strata's means.
    If all values are 0 or 1, all clusters have one value and there is one stratum, the result is Wilson's interval.
    Otherwise it is the mean plus or minus 1.96 clustered standard errors. If that error is 0, because all clusters
    agree, it is Wilson's interval over the clusters.
    """
    if not values:
        return None
    groups: dict[str, list[int]] = {}
    for place, stratum in enumerate(strata or [""] * len(values)):
        groups.setdefault(stratum, []).append(place)
    means = {name: math.fsum(values[place] for place in places) / len(places) for name, places in groups.items()}
    centre = math.fsum(means.values()) / len(means)
    sums: dict[str, float] = dict.fromkeys(clusters, 0.0)  # each cluster's contribution to the error of the mean
    for name, places in groups.items():
        for place in places:
            sums[clusters[place]] += (values[place] - means[name]) / (len(places) * len(groups))
    error = math.sqrt(math.fsum(value**2 for value in sums.values()))
    independent = len(sums) == len(values) and len(groups) == 1 and set(values) <= {0.0, 1.0}
    if independent or error < 1e-12:
        low, top = wilson(centre, len(sums))
    else:
        low, top = max(0.0, centre - Z95 * error), min(1.0, centre + Z95 * error)
    return [high * low, high * top]


def wilson(part: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval for a share from 0 to 1 that was observed in `count` independent draws."""
    middle = (part + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    spread = Z95 / (1 + Z95**2 / count) * math.sqrt(part * (1 - part) / count + Z95**2 / (4 * count**2))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def paired(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str] = (), *, high: float = 100.0
) -> dict[str, Any]:
    """Compare two runs over the same items. first, second: each run's values, 0 or 1, or scores from 0 to 1.

    Returns `items`: their number. `lost`, `gained`: numbers of items with a lower or higher value in the second run.
    `difference`: the second mean minus the first, and its 95 % `interval`, both scaled from 1 to `high`; None without
    items. `p`: two-sided p-value of `sign_flip_p` for the clusters' gained minus lost items; if no cluster has several
    items, this is McNemar's exact test (of scores, the sign test).
    clusters: each item's cluster, such as its video. The interval is that of Agresti and Min if all values are 0 or 1
    and no cluster has several items, or if all clusters agree. Otherwise it is the mean difference plus or minus 1.96
    clustered standard errors.
    """
    changes = [float(after) - float(before) for before, after in zip(first, second, strict=True)]
    items, lost, gained = len(changes), sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    names, difference, interval = clusters or [str(number) for number in range(items)], None, None
    if items:
        mean = math.fsum(changes) / items
        sums: dict[str, float] = {}
        for name, change in zip(names, changes, strict=True):
            sums[name] = sums.get(name, 0.0) + (change - mean) / items
        error = math.sqrt(math.fsum(value**2 for value in sums.values()))
        centre, spread = mean, Z95 * error
        if error < 1e-12 or (len(sums) == items and set(changes) <= {-1.0, 0.0, 1.0}):
            centre = (gained - lost) / (items + 2)
            spread = Z95 * math.sqrt((gained + lost + 1) / (items + 2) - centre**2) / math.sqrt(items + 2)
        difference = high * mean
        interval = (high * max(-1.0, centre - spread), high * min(1.0, centre + spread))
    nets: dict[str, int] = {}  # each cluster's gained minus lost items
    for name, change in zip(names, changes, strict=True):
        nets[name] = nets.get(name, 0) + (change > 0) - (change < 0)
    found = {"items": items, "lost": lost, "gained": gained, "difference": difference, "interval": interval}
    return {**found, "p": sign_flip_p(list(nets.values()))}


def sign_flip_p(values: Sequence[int]) -> float:
    """Return the exact probability that the sum of the values is at least as far from 0 if each sign is random.

    This is the two-sided p-value of a randomization test that exchanges the two runs for whole clusters. Values of -1
    and 1 give McNemar's exact test. values: of each cluster, such as its number of gained minus lost items.
    """
    import numpy as np

    total = sum(map(abs, values))
    chances = np.zeros(2 * total + 1)  # of the sums from -total to total
    chances[total] = 1.0
    for value in filter(None, values):
        chances = (np.roll(chances, value) + np.roll(chances, -value)) / 2
    far = np.abs(np.arange(-total, total + 1)) >= abs(sum(values))
    return min(1.0, float(chances[far].sum()))


def chi_square(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Return Pearson's chi-square statistic. Cells with an expected count of 0 are left out."""
    return sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True) if due)


def chi_square_p(value: float, degrees: int) -> float:
    """Return the probability of a chi-square of at least `value` with `degrees` degrees of freedom."""
    import torch

    halves = torch.tensor([degrees / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves)) if degrees > 0 else 1.0
