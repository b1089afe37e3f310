"""The temporal probe: the same items with frames in order, reversed, shuffled, one alone, or blank.

Whether a model uses time shows in the tasks that depend on order: there, accuracy falls when the order is taken away.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stllm.evaluation.charts import Bars
from stllm.evaluation.items import Record
from stllm.evaluation.significance import Paired, paired
from stllm.evaluation.tables import MISSING, percent, share, table
from stllm.evaluation.tallies import by_task, tally
from stllm.evaluation.turned_round import turned_report, turned_scores, turned_sentence
from stllm.media.views import BLANK, FORWARD, REVERSED, SHUFFLED, SINGLE, VIEWS

LEVEL = 0.05
ORDER_TASKS = (  # of MVBench, those whose answer may change with the order of frames; a choice of ours
    "Action Sequence",
    "Action Prediction",
    "Action Antonym",
    "Object Shuffle",
    "Moving Direction",
    "Action Localization",
    "Scene Transition",
    "State Change",
    "Character Order",
    "Egocentric Navigation",
)
ALL, ORDERED, OTHER = "all tasks", "tasks of order", "other tasks"
MEANING = {
    FORWARD: "the frames as they are",
    REVERSED: "the same frames, last first",
    SHUFFLED: "the same frames, in one fixed random order",
    SINGLE: "the middle frame alone, at every place",
    BLANK: "grey frames: what the text alone gives away",
}

Runs = Mapping[str, Sequence[Record]]  # lines by view


def probe_scores(runs: Runs, turned: Sequence[Record] = ()) -> dict[str, Any]:
    """Strict accuracy by group of tasks and view, the comparison of each view with the forward one, and the verdict.

    Comparisons are over the items answered in every view. turned: lines of clips reversed and turned round, see
    turned_round.py. `chance`: percent right by guessing.
    """
    groups = _groups(runs)
    shared = _answered_everywhere(runs)
    round_ = {"turned round": turned_scores(runs, turned)} if turned else {}
    return {
        "chance": {name: _chance(runs[FORWARD], tasks) for name, tasks in groups.items()},
        "accuracy": {name: {view: _accuracy(runs[view], tasks) for view in VIEWS} for name, tasks in groups.items()},
        "against forward": {
            name: {view: _comparison(runs, view, tasks, shared) for view in VIEWS[1:]} for name, tasks in groups.items()
        },
        "failed": {view: tally(runs[view]).failed for view in VIEWS},
        "compared": len(shared),
        "verdict": " ".join([verdict(runs), *(turned_sentence(found) for found in round_.values())]),
        **round_,
    }


def verdict(runs: Runs) -> str:
    """In a sentence or two: does this model use the order of frames, more than one frame, the frames at all?"""
    groups, shared = _groups(runs), _answered_everywhere(runs)
    where = ORDERED if groups[ORDERED] else ALL
    found = {view: _pair(runs, view, groups[where], shared) for view in VIEWS[1:]}
    if not found[REVERSED].items:
        return "Nothing can be said: no item was answered in every view."
    kept = {view: _said_the_same(runs, view, groups[where], shared) for view in (REVERSED, SHUFFLED)}
    falls = [view for view in (REVERSED, SHUFFLED) if _falls(found[view], tests=2)]
    figures = "; ".join(f"{view}: {_figures(found[view], tests=2)}" for view in (REVERSED, SHUFFLED))
    if falls:
        order = f"The model uses time: with the frames {' and with them '.join(falls)}, strict accuracy falls."
    elif all(kept.values()):
        order = "The model does not use time: it gives the same answers whatever the order of the frames."
    else:
        order = "No sign that the model uses time: taking the order away does not lower strict accuracy significantly."
    more = [
        f"It {'does better' if _falls(found[view]) else 'does not do significantly better'} than with {than} "
        f"({_figures(found[view])})."
        for view, than in ((SINGLE, "one frame"), (BLANK, "no picture at all"))
    ]
    return " ".join([order, f"On {found[REVERSED].items} items of {where}, {figures}.", *more])


def probe_report(name: str, scores: Mapping[str, Any]) -> str:
    """The Markdown text. scores: of `probe_scores`."""
    header = ("strict %", *VIEWS, "chance")
    rows = [
        (group, *[percent(figures[view]) for view in VIEWS], percent(scores["chance"][group]))
        for group, figures in scores["accuracy"].items()
    ]
    parts = [f"# {name}: temporal probe\n", scores["verdict"], "", table(header, rows)]
    parts += ["## Views\n", table(("view", "what is seen"), list(MEANING.items()), texts=2)]
    parts += [turned_report(scores["turned round"])] if "turned round" in scores else []
    parts += [
        "## Against the forward view\n",
        f"Over the {scores['compared']} items answered in every view. Points of strict accuracy with a 95% interval "
        "(Agresti and Min); p: exact McNemar test, two-sided, of each line by itself; lost and gained: items right in "
        "one of the two views alone.\n",
        _comparisons(scores),
    ]
    return "\n".join(parts)


def probe_bars(scores: Mapping[str, Any]) -> Bars:
    """The chart: groups of tasks by view."""
    groups = [name for name in (ALL, ORDERED, OTHER) if name in scores["accuracy"]]
    return Bars(
        title="Temporal probe: what is left of the accuracy",
        axis="strict accuracy, % of the items answered",
        groups=groups,
        series={view: [scores["accuracy"][group][view] for group in groups] for view in VIEWS},
        notes={},
        limit=109.0,
    )


def _groups(runs: Runs) -> dict[str, list[str]]:
    """Tasks under the names of the groups, and each task by itself; empty groups of order are kept."""
    tasks = list(by_task(runs[FORWARD]))
    ordered = [task for task in tasks if task in ORDER_TASKS]
    groups = {ALL: tasks, ORDERED: ordered, OTHER: [task for task in tasks if task not in ORDER_TASKS]}
    return {**groups, **{task: [task] for task in tasks}}


def _answered_everywhere(runs: Runs) -> list[str]:
    ids = [{line["id"] for line in runs[view] if not line.get("error")} for view in VIEWS]
    return sorted(set.intersection(*ids))


def _accuracy(records: Sequence[Record], tasks: Sequence[str]) -> float | None:
    return tally(line for line in records if line["task"] in tasks).over_answered("strict")


def _chance(records: Sequence[Record], tasks: Sequence[str]) -> float | None:
    sizes = [len(line["candidates"]) for line in records if line["task"] in tasks and line.get("candidates")]
    return statistics.mean(100 / size for size in sizes) if sizes else None


def _lines(runs: Runs, view: str, tasks: Sequence[str], shared: Sequence[str]) -> list[Record]:
    """The lines of the shared items of these tasks, in the same order in every view."""
    lines = {line["id"]: line for line in runs[view]}
    return [lines[id_] for id_ in shared if lines[id_]["task"] in tasks]


def _pair(runs: Runs, view: str, tasks: Sequence[str], shared: Sequence[str]) -> Paired:
    first, second = (
        [bool(line["correct"]["strict"]) for line in _lines(runs, v, tasks, shared)] for v in (FORWARD, view)
    )
    return paired(first, second)


def _said_the_same(runs: Runs, view: str, tasks: Sequence[str], shared: Sequence[str]) -> bool:
    first, second = ([line["prediction"] for line in _lines(runs, v, tasks, shared)] for v in (FORWARD, view))
    return first == second


def _comparison(runs: Runs, view: str, tasks: Sequence[str], shared: Sequence[str]) -> dict[str, Any]:
    pair = _pair(runs, view, tasks, shared)
    said = zip(*(_lines(runs, v, tasks, shared) for v in (FORWARD, view)), strict=True)
    changed = sum(first["prediction"] != second["prediction"] for first, second in said)
    return {
        "items": pair.items,
        "lost": pair.lost,
        "gained": pair.gained,
        "difference": pair.difference,
        "interval": pair.interval,
        "p": pair.p_value,
        "answers changed": share(changed, pair.items),
    }


def _comparisons(scores: Mapping[str, Any]) -> str:
    rows = []
    for group, views in scores["against forward"].items():
        for view, found in views.items():
            if found["items"]:
                low, high = found["interval"]
                figures = (f"{found['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{found['p']:.2g}")
                counts = (found["items"], found["lost"], found["gained"], percent(found["answers changed"]))
                rows.append((group, view, *counts, *figures))
    header = ("tasks", "view", "items", "lost", "gained", "answers changed %", "points", "95% interval", "p")
    return table(header, rows, texts=2) if rows else f"{MISSING}\n"


def _falls(pair: Paired, tests: int = 1) -> bool:
    """Whether accuracy falls at the level, `tests` such questions being asked at once (Bonferroni)."""
    return pair.lost > pair.gained and pair.p_value * tests < LEVEL


def _figures(pair: Paired, tests: int = 1) -> str:
    low, high = pair.interval or (0.0, 0.0)
    of_tests = f" for {tests} tests" if tests > 1 else ""
    p_value = min(1.0, pair.p_value * tests)
    return f"{pair.difference:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, p = {p_value:.2g}{of_tests}"
