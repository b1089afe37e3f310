"""The option permutations: each item asked once for each rotation of its options.

Every option stands at every letter once, so a model that reads the options chooses the same text each time. A model
that favours a letter chooses letters unevenly, although those of the answers are even.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.evaluation.benchmarks.multiple_choice import chosen_option, share, tally
from stllm.evaluation.reports.charts import Bars
from stllm.evaluation.reports.significance import chi_square, chi_square_p
from stllm.evaluation.reports.tables import percent, table
from stllm.evaluation.results import Outcome, write_probe
from stllm.evaluation.runs import Runs

LEVEL = 0.05
NO_LETTER = "none"  # the prediction names no option

Asked = tuple[Item, Record, int | None]  # an item, its options as they stood; its answered line; the option chosen


def probe_options(runs: Runs, name: str, loaded: Loaded, plain: Outcome | None) -> str | None:
    """Asks under every other rotation of the options (`<name>.rotated<places>.jsonl`) and writes the report.

    A collective call. plain: the outcome of the benchmark itself. Returns the verdict, to be printed; None on all but
    the main process.
    """
    variants, outcomes = [loaded], [plain]
    for places in range(1, num_rotations(loaded)):
        variants.append(rotated(loaded, places))
        outcomes.append(runs.run(variants[-1], f"{name}.rotated{places}", variant=f"rotated{places}"))
    if plain is None:
        return None
    scores = permutation_scores(variants, [outcome.records for outcome in outcomes if outcome is not None])
    path = runs.folder / f"{name}.permute"
    files = write_probe(path, loaded, plain, scores, permutation_report(name, scores), permutation_bars(scores))
    return f"option permutations: {scores['verdict']}\nfiles: {files}"


def rotated(loaded: Loaded, places: int) -> Loaded:
    """The benchmark with options moved up by so many places, 1 or more, the first ones to the end.

    Only items with more options than places: with the benchmark itself, an item is asked once for each of its options,
    and each option stands at each letter once.
    """
    items = [
        replace(item, candidates=(*item.candidates[places:], *item.candidates[:places]))
        for item in loaded.items
        if len(item.candidates) > places
    ]
    return replace(loaded, items=items)


def num_rotations(loaded: Loaded) -> int:
    """Rotations of the item with the most options; 0 without any."""
    return max((len(item.candidates) for item in loaded.items), default=0)


def permutation_scores(variants: Sequence[Loaded], runs: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Accuracy by rotation, consistency over them, letters chosen beside letters of the answers, and the verdict.

    variants: the benchmark, and rotated by 1, 2, ... places; runs: their lines.
    """
    groups: dict[str, list[Asked]] = {}  # answered lines of each item
    for variant, run in zip(variants, runs, strict=True):
        items = {item.id: item for item in variant.items}
        for line in run:
            item = items[line["id"]]
            if not line.get("error") and item.candidates:
                chosen = chosen_option(line["prediction"], item.candidates)
                groups.setdefault(item.id, []).append((item, line, chosen))
    complete = [asked for asked in groups.values() if len(asked) == len(asked[0][0].candidates)]
    right = [[line["correct"]["strict"] for _, line, _ in asked] for asked in complete]
    texts = [{None if chosen is None else item.candidates[chosen] for item, _, chosen in asked} for asked in complete]
    same = sum(len(said) == 1 and None not in said for said in texts)  # naming no option is no choice
    letters = _letters([one for asked in groups.values() for one in asked])
    every = tally(line for run in runs for line in run)
    return {
        "accuracy": {str(places): tally(run).over_answered("strict") for places, run in enumerate(runs)},
        "official": {str(places): tally(run).over_answered("official") for places, run in enumerate(runs)},
        "items": {str(places): len(run) for places, run in enumerate(runs)},
        "mean": every.over_answered("strict"),
        "failed": every.failed,
        "complete": len(complete),
        "right under all": share(sum(map(all, right)), len(complete)),
        "right under any": share(sum(map(any, right)), len(complete)),
        "same text under all": share(same, len(complete)),
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
    )


def _letters(asked: Sequence[Asked]) -> dict[str, Any]:
    """Percent of predictions and of answers at each letter, and how uneven the predictions are.

    even: the shares of a model without a preference, one over the number of options of each line that names one.
    """
    chosen: Counter[str] = Counter()
    gold: Counter[str] = Counter()
    due: Counter[int] = Counter()  # lines that name an option, by their number of options
    for item, _, number in asked:
        chosen[NO_LETTER if number is None else ascii_uppercase[number]] += 1
        gold[ascii_uppercase[item.candidates.index(item.answer)]] += 1
        due[len(item.candidates)] += number is not None
    names = ascii_uppercase[: max(due, default=0)]
    even = [sum(count / size for size, count in due.items() if place < size) for place in range(len(names))]
    named = sum(due.values())
    num_items = len({item.id for item, _, number in asked if number is not None})
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
