"""Clips played backwards with the matching question: a model that uses frame order still answers correctly.

Where the words of an item allow it: a question about what is first or at the beginning becomes one about what is last
or at the end, and the answer stays; else the answer becomes its opposite, if that is an option: the other direction, or
the change the other way. Other items are not asked.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.evaluation.benchmarks.multiple_choice import by_task, tally
from stllm.evaluation.reports.tables import percent, table
from stllm.media.views import FORWARD, REVERSED

TURNED = "turned"  # the variant's name
EVERY = "all of them"
_IN_QUESTIONS = (("first", "last"), ("beginning", "end"))
_IN_ANSWERS = (("left", "right"), ("up", "down"), ("upwards", "downwards"), ("upward", "downward"))
_CHANGES = ((re.compile(r"from (.+) to (.+)"), r"from \2 to \1"), (re.compile(r"^(\w+) to (\w+)$"), r"\2 to \1"))


def turned_round(loaded: Loaded, tasks: Sequence[str]) -> Loaded:
    """The items of those tasks that can be turned round, their clips reversed. Ids are the original's."""
    turned = [turned_item(item) for item in loaded.items if item.task in tasks]
    return replace(
        loaded,
        items=[replace(item, media=replace(item.media, view=REVERSED)) for item in turned if item and item.media],
    )


def turned_item(item: Item) -> Item | None:
    """The item with the question or answer that fits the reversed clip; None where its words do not allow it."""
    question = _exchanged(item.questions[0], _IN_QUESTIONS)
    if question != item.questions[0]:
        return replace(item, questions=(question,))
    answer = item.answer
    for change, backwards in _CHANGES:
        answer = change.sub(backwards, item.answer) if change.search(item.answer) else answer
    if answer == item.answer:
        answer = _exchanged(answer, _IN_ANSWERS)
    return replace(item, answer=answer) if answer != item.answer and answer in item.candidates else None


def _exchanged(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The text with each of these words replaced by the other of its pair."""
    other = {
        a: b for pair in pairs for one, two in (pair, pair[::-1]) for a, b in ((one, two), (one.title(), two.title()))
    }
    return re.sub(r"\w+", lambda word: other.get(word[0], word[0]), text)


def turned_scores(runs: Mapping[str, Sequence[Record]], turned: Sequence[Record]) -> dict[str, Any]:
    """By task, and of all: `items`, and strict accuracy of the clips forward, reversed, and reversed and turned round.

    runs: lines by view. turned: the lines of `turned_round`. Over the items answered in all three ways.
    """
    ways = {FORWARD: runs[FORWARD], REVERSED: runs[REVERSED], TURNED: turned}
    shared = set.intersection(*({line["id"] for line in lines if not line.get("error")} for lines in ways.values()))
    kept = {way: [line for line in lines if line["id"] in shared] for way, lines in ways.items()}
    groups = {EVERY: shared, **{task: {line["id"] for line in lines} for task, lines in by_task(kept[TURNED]).items()}}
    return {
        name: {"items": len(ids)}
        | {
            way: tally(line for line in lines if line["id"] in ids).over_answered("strict")
            for way, lines in kept.items()
        }
        for name, ids in groups.items()
    }


def turned_sentence(scores: Mapping[str, Any]) -> str:
    """For the verdict."""
    found = scores[EVERY]
    return (
        f"Of {found['items']} items whose clips run backwards, {percent(found[REVERSED])}% are right as asked, and "
        f"{percent(found[TURNED])}% when question or answer is turned round, too; {percent(found[FORWARD])}% forward."
    )


def turned_report(scores: Mapping[str, Any]) -> str:
    """The section of the probe's report."""
    rows = [
        (name, found["items"], *[percent(found[way]) for way in (FORWARD, REVERSED, TURNED)])
        for name, found in scores.items()
    ]
    return "\n".join(
        [
            "## Turned round\n",
            "The reversed clips once more, asked about what is last where the question was about what is first (and "
            "the end, where it was the beginning), or with the opposite direction or change as the right answer. A "
            "model that follows time is wrong on reversed clips as asked, and right when they are turned round.\n",
            table(("strict %", "items", "forward", "reversed", "reversed, turned round"), rows),
        ]
    )
