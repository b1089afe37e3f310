"""The temporal probe: the same items with frames in order, reversed, shuffled, one alone, or blank.

If a model uses the order of frames, its accuracy falls in the tasks that depend on order when that order is changed.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stllm.evaluation.benchmarks.base import Loaded, Record
from stllm.evaluation.benchmarks.multiple_choice import by_task, share, tally
from stllm.evaluation.probes.turned_round import TURNED, turned_report, turned_round, turned_scores, turned_sentence
from stllm.evaluation.reports.charts import Bars
from stllm.evaluation.reports.significance import paired
from stllm.evaluation.reports.tables import MISSING, percent, table
from stllm.evaluation.results import Outcome, write_probe
from stllm.evaluation.runs import Runs
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


def probe_views(runs: Runs, name: str, loaded: Loaded, plain: Outcome | None) -> str | None:
    """Asks under every other view (`<name>.<view>.jsonl`) and writes the report. A collective call.

    plain: the outcome of the benchmark itself. Returns the verdict, to be printed; None on all but the main process.
    """
    outcomes = {FORWARD: plain}
    for view in VIEWS[1:]:
        outcomes[view] = runs.run(viewed(loaded, view), f"{name}.{view}", variant=view)
    turned = turned_round(loaded, ORDER_TASKS)
    back = runs.run(turned, f"{name}.{TURNED}", variant=TURNED) if turned.items else None
    if plain is None:
        return None
    by_view = {view: outcome.records for view, outcome in outcomes.items() if outcome is not None}
    scores = probe_scores(by_view, () if back is None else back.records)
    path = runs.folder / f"{name}.probe"
    files = write_probe(path, loaded, plain, scores, probe_report(name, scores), probe_bars(scores))
    return f"temporal probe: {scores['verdict']}\nfiles: {files}"


def viewed(loaded: Loaded, view: str) -> Loaded:
    """The benchmark with every clip under that view (media/views.py). Raises UserError for an unknown one."""
    return replace(
        loaded,
        items=[
            item if item.media is None else replace(item, media=replace(item.media, view=view)) for item in loaded.items
        ],
    )


def probe_scores(runs: Mapping[str, Sequence[Record]], turned: Sequence[Record] = ()) -> dict[str, Any]:
    """Strict accuracy by group of tasks and view, the comparison of each view with the forward one, and the verdict.

    runs: lines by view. turned: lines of clips reversed and turned round, see turned_round.py. `chance`: percent right
    by guessing. Comparisons are over the items answered in every view.
    """
    tasks = list(by_task(runs[FORWARD]))
    groups = {ALL: tasks}
    groups[ORDERED] = [task for task in tasks if task in ORDER_TASKS]
    groups[OTHER] = [task for task in tasks if task not in ORDER_TASKS]
    groups |= {task: [task] for task in tasks}
    lines = {view: {line["id"]: line for line in runs[view] if not line.get("error")} for view in VIEWS}
    shared = sorted(set.intersection(*(set(answered) for answered in lines.values())))

    def comparison(view: str, names: Sequence[str]) -> dict[str, Any]:
        ids = [id_ for id_ in shared if lines[FORWARD][id_]["task"] in names]
        before, after = [lines[FORWARD][id_] for id_ in ids], [lines[view][id_] for id_ in ids]
        pair = paired(*([bool(line["correct"]["strict"]) for line in way] for way in (before, after)))
        changed = sum(first["prediction"] != second["prediction"] for first, second in zip(before, after, strict=True))
        return {
            "items": pair.items,
            "lost": pair.lost,
            "gained": pair.gained,
            "difference": pair.difference,
            "interval": pair.interval,
            "p": pair.p_value,
            "answers changed": share(changed, pair.items),
        }

    def accuracy(view: str, names: Sequence[str]) -> float | None:
        return tally(line for line in runs[view] if line["task"] in names).over_answered("strict")

    def chance(names: Sequence[str]) -> float | None:
        options = [line["candidates"] for line in runs[FORWARD] if line["task"] in names and line.get("candidates")]
        return statistics.mean(100 / len(texts) for texts in options) if options else None

    compared = {name: {view: comparison(view, names) for view in VIEWS[1:]} for name, names in groups.items()}
    round_ = {"turned round": turned_scores(runs, turned)} if turned else {}
    where = ORDERED if groups[ORDERED] else ALL
    return {
        "chance": {name: chance(names) for name, names in groups.items()},
        "accuracy": {name: {view: accuracy(view, names) for view in VIEWS} for name, names in groups.items()},
        "against forward": compared,
        "failed": {view: tally(runs[view]).failed for view in VIEWS},
        "compared": len(shared),
        "verdict": " ".join([_verdict(where, compared[where]), *map(turned_sentence, round_.values())]),
        **round_,
    }


def _verdict(where: str, compared: Mapping[str, Mapping[str, Any]]) -> str:
    """Sentences: does this model use the order of frames, more than one frame, the frames at all?

    compared: each view with the forward one, over the group of tasks that `where` names.
    """
    if not compared[REVERSED]["items"]:
        return "Nothing can be said: no item was answered in every view."

    def falls(view: str, tests: int = 1) -> bool:
        """True if accuracy falls at the level, with `tests` such questions asked at once (Bonferroni)."""
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


def probe_report(name: str, scores: Mapping[str, Any]) -> str:
    """The Markdown text. scores: of `probe_scores`."""
    accuracies = [
        (group, *[percent(figures[view]) for view in VIEWS], percent(scores["chance"][group]))
        for group, figures in scores["accuracy"].items()
    ]
    rows = []
    for group, views in scores["against forward"].items():
        for view, found in views.items():
            if found["items"]:
                low, high = found["interval"]
                figures = (f"{found['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{found['p']:.2g}")
                counts = (found["items"], found["lost"], found["gained"], percent(found["answers changed"]))
                rows.append((group, view, *counts, *figures))
    header = ("tasks", "view", "items", "lost", "gained", "answers changed %", "points", "95% interval", "p")
    parts = [f"# {name}: temporal probe\n", scores["verdict"], ""]
    parts += [table(("strict %", *VIEWS, "chance"), accuracies)]
    parts += ["## Views\n", table(("view", "what is seen"), list(MEANING.items()), texts=2)]
    parts += [turned_report(scores["turned round"])] if "turned round" in scores else []
    parts += [
        "## Against the forward view\n",
        f"Over the {scores['compared']} items answered in every view. Points of strict accuracy with a 95% interval "
        "(Agresti and Min); p: exact McNemar test, two-sided, of each line by itself; lost and gained: items right in "
        "one of the two views alone.\n",
        table(header, rows, texts=2) if rows else f"{MISSING}\n",
    ]
    return "\n".join(parts)


def probe_bars(scores: Mapping[str, Any]) -> Bars:
    """The chart: groups of tasks by view."""
    groups = (ALL, ORDERED, OTHER)
    return Bars(
        title="Temporal probe: what is left of the accuracy",
        axis="strict accuracy, % of the items answered",
        groups=groups,
        series={view: [scores["accuracy"][group][view] for group in groups] for view in VIEWS},
    )
