"""Temporal probe (`--probe`): the same items with frames in order, reversed, shuffled, only one, or blank.

If a model uses the order of frames, a changed order lowers its accuracy in tasks that depend on order.
In the variant `turned`, clips are also reversed, but items are changed to match; a model that uses the order of frames
still answers correctly. There are two ways to change an item. If the question has "first" or "beginning", it gets
"last" or "end" instead, and the answer stays. Otherwise the correct answer becomes the opposite direction or change
("from A to B" becomes "from B to A"), if that is an option. Items that allow neither are not in this variant.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.evaluation.reports.tables import MISSING, Bars, percent, table
from stllm.evaluation.scores import by_task, paired, share, tally
from stllm.media.views import BLANK, FORWARD, REVERSED, SHUFFLED, SINGLE, VIEWS

TITLE = "temporal probe"
LEVEL = 0.05
ORDER_TASKS = (  # tasks of MVBench and TVBench whose answer may depend on the order of frames; our choice
    *("Action Sequence", "Action Prediction", "Action Antonym", "Object Shuffle", "Moving Direction"),
    *("Action Localization", "Scene Transition", "State Change", "Character Order", "Egocentric Navigation"),
    "Egocentric Sequence",
)
ALL, ORDERED, OTHER = "all tasks", "tasks of order", "other tasks"
TURNED = "turned"  # name of the variant with reversed clips and matching items
EVERY = "all of them"
MEANING = {
    FORWARD: "the frames as they are",
    REVERSED: "the same frames, last first",
    SHUFFLED: "the same frames, in one fixed random order",
    SINGLE: "the middle frame alone, at every place",
    BLANK: "grey frames: what the text alone gives away",
}
_IN_QUESTIONS = (("first", "last"), ("beginning", "end"))
_IN_ANSWERS = (("left", "right"), ("up", "down"), ("upwards", "downwards"), ("upward", "downward"))
_CHANGES = ((re.compile(r"from (.+) to (.+)"), r"from \2 to \1"), (re.compile(r"^(\w+) to (\w+)$"), r"\2 to \1"))


# ---- variants -------------------------------------------------------------------------------------------------------


def variants(loaded: Loaded) -> dict[str, Loaded]:
    """Return one variant per view (order of frames), the unchanged one first, and the variant `turned` if possible."""
    changed = {FORWARD: loaded, **{view: viewed(loaded, view) for view in VIEWS[1:]}}
    turned = [turned_item(item) for item in loaded.items if item.task in ORDER_TASKS and item.media]
    if items := [item for item in turned if item]:
        changed[TURNED] = viewed(replace(loaded, items=items), REVERSED)
    return changed


def viewed(loaded: Loaded, view: str) -> Loaded:
    """Return the benchmark with this view set for every clip (media/views.py). Raises UserError for an unknown view."""
    items = [
        item if item.media is None else replace(item, media=replace(item.media, view=view)) for item in loaded.items
    ]
    return replace(loaded, items=items)


def turned_item(item: Item) -> Item | None:
    """Return the item with a question or answer that fits the reversed clip, or None if no rule applies."""
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
    """Replace each word that is in one of the pairs by the other word of its pair."""
    other = {one: two for pair in pairs for one, two in (pair, pair[::-1])}
    other |= {one.title(): two.title() for one, two in other.items()}
    return re.sub(r"\w+", lambda word: other.get(word[0], word[0]), text)


# ---- scores and report ----------------------------------------------------------------------------------------------


def probe_scores(runs: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Compute strict accuracy per group of tasks and view, compare each view with forward, and add a verdict in words.

    runs: the records of each variant. In the result, `chance` is the percentage correct by guessing. Comparisons use
    the items answered in every view. `turned round` has, per task and overall, `items` and the accuracies in the
    variants forward, reversed and turned, for the items answered in all three.
    """
    tasks = list(by_task(runs[FORWARD]))
    groups = {ALL: tasks}
    groups[ORDERED] = [task for task in tasks if task in ORDER_TASKS]
    groups[OTHER] = [task for task in tasks if task not in ORDER_TASKS]
    groups |= {task: [task] for task in tasks}
    lines = {way: {line["id"]: line for line in run if not line.get("error")} for way, run in runs.items()}
    shared = sorted(set.intersection(*(set(lines[view]) for view in VIEWS)))

    def comparison(view: str, names: Sequence[str]) -> dict[str, Any]:
        ids = [id_ for id_ in shared if lines[FORWARD][id_]["task"] in names]
        before, after = ([lines[way][id_] for id_ in ids] for way in (FORWARD, view))
        changed = sum(one["prediction"] != two["prediction"] for one, two in zip(before, after, strict=True))
        first, second = ([bool(line["correct"]["strict"]) for line in way] for way in (before, after))
        found = paired(first, second, [str(line.get("video") or line["id"]) for line in before])
        return {**found, "answers changed": share(changed, len(ids))}

    def chance(names: Sequence[str]) -> float | None:
        options = [line["candidates"] for line in runs[FORWARD] if line["task"] in names and line.get("candidates")]
        return statistics.mean(100 / len(texts) for texts in options) if options else None

    accuracy = {
        name: {
            view: tally(line for line in runs[view] if line["task"] in names).over_answered("strict") for view in VIEWS
        }
        for name, names in groups.items()
    }
    compared = {name: {view: comparison(view, names) for view in VIEWS[1:]} for name, names in groups.items()}
    where = ORDERED if groups[ORDERED] else ALL
    verdict, turned = _verdict(where, compared[where]), {}
    if runs.get(TURNED):
        ways = (FORWARD, REVERSED, TURNED)
        ids = set.intersection(*(set(lines[way]) for way in ways))
        of_task = by_task(line for line in runs[TURNED] if line["id"] in ids)
        chosen = {EVERY: ids, **{task: {line["id"] for line in found} for task, found in of_task.items()}}
        turned = {
            name: {way: tally(line for line in runs[way] if line["id"] in ids).over_answered("strict") for way in ways}
            for name, ids in chosen.items()
        }
        right = {way: percent(found) for way, found in turned[EVERY].items()}
        verdict += (
            f" Of {len(ids)} items whose clips run backwards, {right[REVERSED]}% are right as asked, and "
            f"{right[TURNED]}% when question or answer is turned round, too; {right[FORWARD]}% forward."
        )
        turned = {name: {"items": len(chosen[name]), **found} for name, found in turned.items()}
    return {
        "chance": {name: chance(names) for name, names in groups.items()},
        "accuracy": accuracy,
        "against forward": compared,
        "failed": {view: tally(runs[view]).failed for view in VIEWS},
        "compared": len(shared),
        "verdict": verdict,
        **({"turned round": turned} if turned else {}),
    }


def _verdict(where: str, compared: Mapping[str, Mapping[str, Any]]) -> str:
    """Return sentences on whether the model uses the order of frames, more than one frame, and frames at all.

    where: the name of a group of tasks. compared: each view's comparison with forward in this group.
    """
    if not compared[REVERSED]["items"]:
        return "Nothing can be said: no item was answered in every view."

    def falls(view: str, tests: int = 1) -> bool:
        """Check whether accuracy is significantly lower than forward. tests: number of tests to correct for."""
        found = compared[view]
        return bool(found["lost"] > found["gained"] and found["p"] * tests < LEVEL)

    def figures(view: str, tests: int = 1) -> str:
        found, of_tests = compared[view], f" for {tests} tests" if tests > 1 else ""
        low, high = found["interval"]
        p_value = min(1.0, found["p"] * tests)
        return f"{found['difference']:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, p = {p_value:.2g}{of_tests}"

    orders = (REVERSED, SHUFFLED)
    if fallen := [view for view in orders if falls(view, tests=2)]:
        order = f"The model uses time: with the frames {' and with them '.join(fallen)}, strict accuracy falls."
    elif not any(compared[view]["answers changed"] for view in orders):
        order = "The model does not use time: it gives the same answers whatever the order of the frames."
    else:
        order = "No sign that the model uses time: taking the order away does not lower strict accuracy significantly."
    found = "; ".join(f"{view}: {figures(view, tests=2)}" for view in orders)
    more = [
        f"It {'does better' if falls(view) else 'does not do significantly better'} than with {than} ({figures(view)})."
        for view, than in ((SINGLE, "one frame"), (BLANK, "no picture at all"))
    ]
    return " ".join([order, f"On {compared[REVERSED]['items']} items of {where}, {found}.", *more])


def report(name: str, scores: Mapping[str, Any]) -> str:
    """Return the report as Markdown. name: the benchmark's title. scores: the result of `probe_scores`."""
    accuracies = [
        (group, *[percent(figures[view]) for view in VIEWS], percent(scores["chance"][group]))
        for group, figures in scores["accuracy"].items()
    ]
    parts = [f"# {name}: temporal probe\n", scores["verdict"], "", table(("strict %", *VIEWS, "chance"), accuracies)]
    parts += ["## Views\n", table(("view", "what is seen"), list(MEANING.items()), texts=2)]
    if turned := scores.get("turned round"):
        ways = (FORWARD, REVERSED, TURNED)
        parts += [
            "## Turned round\n",
            "The clips are reversed and the items are changed to match: the question has last instead of first and "
            "end instead of beginning, or the right answer is the opposite direction or change. A model that uses the "
            "order of frames is wrong on reversed clips with the original items, and right with the changed ones.\n",
            table(
                ("strict %", "items", "forward", "reversed", "reversed, turned round"),
                [(group, found["items"], *[percent(found[way]) for way in ways]) for group, found in turned.items()],
            ),
        ]
    rows: list[tuple[object, ...]] = []
    for group, views in scores["against forward"].items():
        for view, found in views.items():
            if found["items"]:
                low, high = found["interval"]
                counts = (found["items"], found["lost"], found["gained"], percent(found["answers changed"]))
                points = (f"{found['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{found['p']:.2g}")
                rows.append((group, view, *counts, *points))
    header = ("tasks", "view", "items", "lost", "gained", "answers changed %", "points", "95% interval", "p")
    parts += [
        "## Against the forward view\n",
        f"Over the {scores['compared']} items answered in every view. Points of strict accuracy with a 95% interval "
        "(clustered by video where one has several questions, else Agresti and Min); p: exact and two-sided, of each "
        "line by itself, from flipping the direction of all changes of a video (McNemar's test where a video has one "
        "question); lost and gained: items right in one of the two views alone.\n",
        table(header, rows, texts=2) if rows else f"{MISSING}\n",
    ]
    return "\n".join(parts)


def bars(scores: Mapping[str, Any]) -> Bars:
    """Return the chart: strict accuracy of each group of tasks in each view."""
    groups = (ALL, ORDERED, OTHER)
    return Bars(
        title="Temporal probe: what is left of the accuracy",
        axis="strict accuracy, % of the items answered",
        groups=groups,
        series={view: [scores["accuracy"][group][view] for group in groups] for view in VIEWS},
    )
