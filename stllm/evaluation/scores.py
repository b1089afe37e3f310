"""Scores of multiple choice: is an answer right, how many are, and could a difference be chance.

Answers are matched by two rules: the benchmark's own ("official"; here MVBench's, arXiv 2311.17005, with cases in
tests/golden/sampling.json), and a strict one that an empty answer cannot pass. Statistics: Wilson's interval; errors
clustered by video, since questions about one video are not independent (Miller, arXiv 2411.00640); McNemar's exact
test; the adjusted Wald interval of matched proportions (Agresti and Min, 2005); Pearson's chi-square.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

Record = dict[str, Any]  # a line of `<name>.jsonl`

Interval = list[float]  # low, high

RULES = ("strict", "official")
ITEMS, TASKS = "items", "tasks"  # what an average may be over
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
    """Counts of lines. right: items answered rightly, by rule. Items that failed (unreadable video) are never right.

    parsed: items whose answer the rule could read, by rule; a rule that reads every answer is not among them.
    """

    answered: int
    failed: int
    right: Mapping[str, int]
    parsed: Mapping[str, int]

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
    known = {rule for line in answered for rule in line.get("parsed", ())}
    parsed = {rule: sum(bool(line.get("parsed", {}).get(rule)) for line in answered) for rule in RULES if rule in known}
    return Tally(answered=len(answered), failed=len(lines) - len(answered), right=right, parsed=parsed)


def by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The lines of each task, tasks in the order in which they come."""
    groups: dict[str, list[Record]] = {}
    for line in records:
        groups.setdefault(str(line["task"]), []).append(line)
    return groups


def by_group(records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    """The lines of each group of each kind, kind -> group -> lines, in order of the groups' names."""
    kinds: dict[str, dict[str, list[Record]]] = {}
    for line in records:
        for kind, names in line.get("groups", {}).items():
            for name in names:
                kinds.setdefault(kind, {}).setdefault(name, []).append(line)
    return {kind: dict(sorted(groups.items())) for kind, groups in kinds.items()}


def accuracies(records: Sequence[Record], mean_over: str = ITEMS) -> dict[str, Any]:
    """Percent, by either rule: {"strict": ..., "official": ..., "chance": ..., "differing": ids of `differing`}.

    Of each rule: `average`, `tasks` and `groups` over all items that were asked, failed ones wrong, with 95 % intervals
    (`interval`, `task_intervals`); `average_answered` and `tasks_answered` over those that were answered; `parsed`, the
    percentage of these that the rule could read. None where there is none. `chance`: right by guessing, of the options.
    mean_over: what the average is over: ITEMS, TASKS, or one task's name.
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
    """The mean of the values that are there; None of nothing."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def chance(records: Iterable[Record]) -> float | None:
    """Percent that is right by guessing among the options; None where no line lists any."""
    return mean(100 / len(line["candidates"]) for line in records if line.get("candidates"))


def differing(records: Iterable[Record]) -> list[Record]:
    """The answered lines that one rule counts as right and the other as wrong."""
    answered = (line for line in records if not line.get("error"))
    return [line for line in answered if line["correct"]["official"] != line["correct"]["strict"]]


# ---- chance ---------------------------------------------------------------------------------------------------------


def accuracy_interval(records: Sequence[Record], rule: str, *, of_tasks: bool = False) -> Interval | None:
    """The 95 % interval of an accuracy over all lines, in percent; None of no line. of_tasks: of their mean."""
    right = [float(not line.get("error") and line["correct"][rule]) for line in records]
    tasks = [str(line["task"]) for line in records] if of_tasks else None
    return interval(right, [str(line.get("video") or line["id"]) for line in records], strata=tasks, high=100.0)


def interval(
    values: Sequence[float], clusters: Sequence[str], *, strata: Sequence[str] | None = None, high: float
) -> Interval | None:
    """The 95 % interval of a mean, between 0 and `high`; None of nothing.

    values: from 0 to 1. clusters: of each value, such as its video; values of one cluster may depend on each other.
    strata: of each value, where the mean is that of the strata's means. Right or wrong, all independent and without
    strata: Wilson's interval. Otherwise the mean and 1.96 standard errors, clustered; if every cluster has the same
    mean, the standard error of 0 says nothing, and Wilson's interval over the clusters takes its place.
    """
    if not values:
        return None
    groups: dict[str, list[int]] = {}
    for place, stratum in enumerate(strata or [""] * len(values)):
        groups.setdefault(stratum, []).append(place)
    means = {name: math.fsum(values[place] for place in places) / len(places) for name, places in groups.items()}
    centre = math.fsum(means.values()) / len(means)
    sums: dict[str, float] = dict.fromkeys(clusters, 0.0)  # of what each cluster adds to the mean's error
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
    """Wilson's 95 % interval of a share from 0 to 1, observed among `count` independent draws."""
    middle = (part + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    spread = Z95 / (1 + Z95**2 / count) * math.sqrt(part * (1 - part) / count + Z95**2 / (4 * count**2))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def paired(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str] = (), *, high: float = 100.0
) -> dict[str, Any]:
    """Compare the same items asked in two ways: right or wrong in each, or with scores from 0 to 1.

    `items`: compared; `lost`: better the first way; `gained`: better the second way; `difference`: the second mean less
    the first, and its 95% `interval`, where 1 is `high`, both None of no items; `p`: two-sided, how likely so uneven a
    split of lost and gained is when neither way is better (McNemar's exact test; of scores, the sign test). It takes
    items as independent. clusters: of each item, such as its video. Right or wrong without a cluster of several items,
    or where all clusters agree: the interval of Agresti and Min. Else the mean difference and 1.96 clustered errors.
    """
    changes = [float(after) - float(before) for before, after in zip(first, second, strict=True)]
    items, lost, gained = len(changes), sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    difference = interval = None
    if items:
        mean = math.fsum(changes) / items
        sums: dict[str, float] = {}
        for name, change in zip(clusters or map(str, range(items)), changes, strict=True):
            sums[name] = sums.get(name, 0.0) + (change - mean) / items
        error = math.sqrt(math.fsum(value**2 for value in sums.values()))
        centre, spread = mean, Z95 * error
        if error < 1e-12 or (len(sums) == items and set(changes) <= {-1.0, 0.0, 1.0}):
            centre = (gained - lost) / (items + 2)
            spread = Z95 * math.sqrt((gained + lost + 1) / (items + 2) - centre**2) / math.sqrt(items + 2)
        difference = high * mean
        interval = (high * max(-1.0, centre - spread), high * min(1.0, centre + spread))
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
