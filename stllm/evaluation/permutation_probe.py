"""The option permutations: each item asked once for each rotation of its options.

Every option stands at every letter once, so a model that reads the options chooses the same text each time, and one
that favours a letter shows it: its letters are uneven while those of the answers are even.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from stllm.evaluation.charts import Bars
from stllm.evaluation.items import Benchmark, Item, Record
from stllm.evaluation.matching import chosen_option
from stllm.evaluation.significance import chi_square, chi_square_p
from stllm.evaluation.tables import percent, share, table
from stllm.evaluation.tallies import tally

LEVEL = 0.05
NO_LETTER = "none"  # the prediction names no option

Asked = tuple[Item, Record]  # an item, its options as they stood, and its answered line


def permutation_scores(variants: Sequence[Benchmark], runs: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Accuracy by rotation, consistency over them, letters chosen beside letters of the answers, and the verdict.

    variants: the benchmark, and rotated by 1, 2, ... places; runs: their lines.
    """
    groups = _by_item(variants, runs)
    complete = [asked for asked in groups.values() if asked and len(asked) == len(asked[0][0].candidates)]
    letters = _letters([one for asked in groups.values() for one in asked])
    every = tally(line for run in runs for line in run)
    return {
        "accuracy": {str(places): tally(run).over_answered("strict") for places, run in enumerate(runs)},
        "official": {str(places): tally(run).over_answered("official") for places, run in enumerate(runs)},
        "items": {str(places): len(run) for places, run in enumerate(runs)},
        "mean": every.over_answered("strict"),
        "failed": every.failed,
        "complete": len(complete),
        "right under all": share(sum(_all_right(asked) for asked in complete), len(complete)),
        "right under any": share(sum(_any_right(asked) for asked in complete), len(complete)),
        "same text under all": share(sum(_same_text(asked) for asked in complete), len(complete)),
        "letters": letters,
        "verdict": _verdict(letters),
    }


def permutation_report(name: str, scores: Mapping[str, Any]) -> str:
    """The Markdown text. scores: of `permutation_scores`."""
    rows: list[tuple[object, ...]] = [
        (f"options moved by {places}", scores["items"][places], percent(value), percent(scores["official"][places]))
        for places, value in scores["accuracy"].items()
    ]
    letters = scores["letters"]
    shares = [
        (letter, percent(chosen), percent(letters["gold"].get(letter)), percent(letters["even"].get(letter)))
        for letter, chosen in letters["chosen"].items()
    ]
    over = [
        ("right under all rotations", percent(scores["right under all"])),
        ("right under at least one", percent(scores["right under any"])),
        ("the same option's text under all", percent(scores["same text under all"])),
    ]
    return "\n".join(
        [
            f"# {name}: option permutations\n",
            scores["verdict"],
            "",
            table(
                ("asked", "items", "strict %", "official %"), [*rows, ("mean of all", "", percent(scores["mean"]), "")]
            ),
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


def permutation_bars(scores: Mapping[str, Any]) -> Bars:
    """The chart: letters chosen beside those of the answers."""
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
        notes={},
        limit=109.0,
    )


def _by_item(variants: Sequence[Benchmark], runs: Sequence[Sequence[Record]]) -> dict[str, list[Asked]]:
    """What was answered of each item, under its rotations."""
    groups: dict[str, list[Asked]] = {}
    for variant, run in zip(variants, runs, strict=True):
        items = {item.id: item for item in variant.items}
        for line in run:
            if not line.get("error"):
                groups.setdefault(line["id"], []).append((items[line["id"]], line))
    return groups


def _all_right(asked: Sequence[Asked]) -> bool:
    return all(line["correct"]["strict"] for _, line in asked)


def _any_right(asked: Sequence[Asked]) -> bool:
    return any(line["correct"]["strict"] for _, line in asked)


def _same_text(asked: Sequence[Asked]) -> bool:
    """Whether one option's text is chosen each time; naming none is no choice."""
    texts = {item.candidates[number] if (number := _chosen(item, line)) is not None else None for item, line in asked}
    return len(texts) == 1 and None not in texts


def _chosen(item: Item, line: Record) -> int | None:
    return chosen_option(line["prediction"], item.candidates)


def _letters(asked: Sequence[Asked]) -> dict[str, Any]:
    """Percent of predictions and of answers at each letter, and how uneven the predictions are.

    even: what a model without a preference comes to, one over the number of options of each line that names one.
    """
    chosen: Counter[str] = Counter()
    gold: Counter[str] = Counter()
    due: Counter[int] = Counter()  # lines that name an option, by their number of options
    for item, line in asked:
        number = _chosen(item, line)
        chosen[NO_LETTER if number is None else ascii_uppercase[number]] += 1
        gold[ascii_uppercase[item.candidates.index(item.answer)]] += 1
        due[len(item.candidates)] += number is not None
    names = ascii_uppercase[: max(due, default=0)]
    even = [sum(count / size for size, count in due.items() if place < size) for place in range(len(names))]
    named = sum(due.values())
    num_items = len({item.id for item, line in asked if _chosen(item, line) is not None})
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
    even, part = letters["even"], 100 - letters["chosen"][NO_LETTER]  # percent of the predictions that name an option
    of_named = {letter: 100 * letters["chosen"][letter] / part for letter in even}
    favoured = max(even, key=lambda letter: of_named[letter] - even[letter])
    shares = f"{of_named[favoured]:.1f}% of the {named} predictions that name one, {even[favoured]:.1f}% if even"
    if letters["p"] < LEVEL:
        return f"The model favours {favoured}: {shares} (p = {letters['p']:.2g})."
    return f"No sign that the model favours a letter; the most frequent beyond its share is {favoured}: {shares}."
