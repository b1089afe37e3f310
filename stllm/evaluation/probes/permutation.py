"""Option permutations (`--permute`): each item is asked once per rotation of its options.

Each option has each letter once. A model that uses the options' content chooses the same text each time. A model that
favours a letter chooses letters unevenly, although the letters of the correct answers are evenly distributed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from string import ascii_uppercase
from typing import Any

from stllm.evaluation.benchmarks.base import Loaded, Record
from stllm.evaluation.reports.tables import Bars, percent, table
from stllm.evaluation.scores import chi_square, chi_square_p, chosen_option, share, tally

TITLE = "option permutations"
LEVEL = 0.05
NO_LETTER = "none"  # the prediction names no option

Asked = tuple[Record, int | None]  # an answered record, and the index of the chosen option (None: no option)


def variants(loaded: Loaded) -> dict[str, Loaded]:
    """Return the benchmark and its variants: `rotated<n>` has the first n options moved to the end.

    A variant contains only items with more than n options, so an item is asked as many times as it has options.
    """
    found = {"rotated0": loaded}
    for places in range(1, max((len(item.candidates) for item in loaded.items), default=0)):
        items = [
            replace(item, candidates=(*item.candidates[places:], *item.candidates[:places]))
            for item in loaded.items
            if len(item.candidates) > places
        ]
        found[f"rotated{places}"] = replace(loaded, items=items)
    return found


def probe_scores(runs: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Compute accuracy per rotation, consistency over rotations, the distribution of letters, and a verdict in words.

    runs: the records of each variant, the unchanged benchmark first.
    """
    groups: dict[str, list[Asked]] = {}  # answered records of each item
    for line in chain.from_iterable(runs.values()):
        if not line.get("error") and line.get("candidates"):
            chosen = chosen_option(line["prediction"], line["candidates"])
            groups.setdefault(line["id"], []).append((line, chosen))
    complete = [group for group in groups.values() if len(group) == len(group[0][0]["candidates"])]
    right = [[line["correct"]["strict"] for line, _ in group] for group in complete]
    texts = [{None if chosen is None else line["candidates"][chosen] for line, chosen in group} for group in complete]
    same = sum(len(said) == 1 and None not in said for said in texts)  # None: some prediction names no option
    letters = _letters([one for group in groups.values() for one in group])
    tallies = {str(places): tally(run) for places, run in enumerate(runs.values())}
    every = tally(chain.from_iterable(runs.values()))
    return {
        "accuracy": {places: found.over_answered("strict") for places, found in tallies.items()},
        "official": {places: found.over_answered("official") for places, found in tallies.items()},
        "items": {places: found.asked for places, found in tallies.items()},
        "mean": every.over_answered("strict"),
        "failed": every.failed,
        "complete": len(complete),
        "right under all": share(sum(map(all, right)), len(complete)),
        "right under any": share(sum(map(any, right)), len(complete)),
        "same text under all": share(same, len(complete)),
        "letters": letters,
        "verdict": _verdict(letters),
    }


def _letters(asked: Sequence[Asked]) -> dict[str, Any]:
    """Compute the percentage of each letter among predictions and correct answers, and a test for uneven predictions.

    `even` in the result: the expected percentages without a preference, if each of a record's options is equally
    likely. Only predictions that name an option count.
    """
    chosen: Counter[str] = Counter()
    gold: Counter[str] = Counter()
    due: Counter[int] = Counter()  # number of options -> number of predictions that name an option
    for line, number in asked:
        chosen[NO_LETTER if number is None else ascii_uppercase[number]] += 1
        gold[ascii_uppercase[line["candidates"].index(line["answer"])]] += 1
        due[len(line["candidates"])] += number is not None
    names = ascii_uppercase[: max(due, default=0)]
    even = [sum(count / size for size, count in due.items() if place < size) for place in range(len(names))]
    named = sum(due.values())
    num_items = len({line["id"] for line, number in asked if number is not None})
    value = chi_square([chosen[letter] for letter in names], even) * (num_items / named if named else 0.0)
    degrees = max(0, sum(count > 0 for count in even) - 1)
    return {
        "chosen": {letter: share(chosen[letter], len(asked)) for letter in (*names, NO_LETTER)},
        "gold": {letter: share(gold[letter], len(asked)) for letter in names},
        "even": {letter: 100 * count / named if named else None for letter, count in zip(names, even, strict=True)},
        "named": named,
        "chi-square": value,
        "degrees": degrees,
        "p": chi_square_p(value, degrees),
    }


def _verdict(letters: Mapping[str, Any]) -> str:
    named = letters["named"]
    if not named:
        return "Nothing can be said about letters: no prediction names an option."
    even, part = letters["even"], 100 - letters["chosen"][NO_LETTER]  # part: percent of predictions that name an option
    of_named = {letter: 100 * letters["chosen"][letter] / part for letter in even}
    favoured = max(even, key=lambda letter: of_named[letter] - even[letter])
    shares = f"{of_named[favoured]:.1f}% of the {named} predictions that name one, {even[favoured]:.1f}% if even"
    if letters["p"] < LEVEL:
        return f"The model favours {favoured}: {shares} (p = {letters['p']:.2g})."
    return f"No sign that the model favours a letter; the most frequent beyond its share is {favoured}: {shares}."


def report(name: str, scores: Mapping[str, Any]) -> str:
    """Return the report as Markdown. name: the benchmark's title. scores: the result of `probe_scores`."""
    rows: list[tuple[object, ...]] = [
        (f"options moved by {places}", scores["items"][places], percent(value), percent(scores["official"][places]))
        for places, value in scores["accuracy"].items()
    ]
    rows.append(("mean of all", "", percent(scores["mean"]), ""))
    over = [
        ("right under all rotations", percent(scores["right under all"])),
        ("right under at least one", percent(scores["right under any"])),
        ("the same option's text under all", percent(scores["same text under all"])),
    ]
    letters = scores["letters"]
    shares = [
        (letter, percent(chosen), percent(letters["gold"].get(letter)), percent(letters["even"].get(letter)))
        for letter, chosen in letters["chosen"].items()
    ]
    return "\n".join(
        [
            f"# {name}: option permutations\n",
            scores["verdict"],
            "",
            table(("asked", "items", "strict %", "official %"), rows),
            "Percent of the items answered; an item is asked once for each of its options. "
            f"{scores['failed']} lines failed.\n",
            f"## Over the {scores['complete']} items answered under all their rotations\n",
            table(("items", "%"), over),
            "## Letters\n",
            table(("letter", "predictions %", "answers %", "even share %"), shares),
            f"Chi-square of the letters against even shares: {letters['chi-square']:.1f} with {letters['degrees']} "
            f"degrees of freedom, p = {letters['p']:.2g}. Rotations of one item are no independent draws, so each of "
            "the items counts as one draw, whose letter is spread over its lines.\n",
        ]
    )


def bars(scores: Mapping[str, Any]) -> Bars:
    """Return the chart: percentage of each letter among predictions and among correct answers."""
    letters = scores["letters"]
    groups = list(letters["chosen"])
    return Bars(
        title="Option permutations: does the model favour a letter?",
        axis="share, %",
        groups=groups,
        series={
            "predictions": [letters["chosen"][letter] for letter in groups],
            "answers": [letters["gold"].get(letter) for letter in groups],
        },
    )
