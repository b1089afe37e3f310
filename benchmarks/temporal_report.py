"""The experiment's figures: mean and spread over seeds, by task and variant; what holds of the claims; files of it all.

temporal.json, temporal.md and temporal.svg. Accuracies are strict, in percent of all items that were asked.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.temporal_chart import draw
from benchmarks.temporal_plan import ALL, VARIANTS, Plan, tested
from benchmarks.temporal_runs import ROOT, Result, commit
from stllm.common.device import resolve_device
from stllm.common.files import write_text
from stllm.evaluation.benchmarks.mvbench import TASKS
from stllm.evaluation.reports.tables import MISSING, table
from stllm.evaluation.results import versions, write_json

CONTROL, LONG = "Object Existence", "Unexpected Action"  # needs no time; the rare event in clips of 64 frames
TEMPORAL, EVERY = "temporal tasks", "all tasks"
Spread = Mapping[str, float] | None  # mean, low, high over seeds; None where there is nothing


def summary(plan: Plan, results: Sequence[Result], *, jobs: int) -> dict[str, Any]:
    """All that the files say. results: of the runs so far, failed ones (`error`) among them."""
    done = [result for result in results if "error" not in result]
    asked = tested(plan)
    known = [task.name for task in TASKS if task.name in asked]
    variants = {
        variant.name: _figures([result for result in done if result["variant"] == variant.name], done, known)
        | {"tokens": {"usual": plan.tokens(variant, plan.short_frames), "long": plan.tokens(variant, plan.long_frames)}}
        for variant in VARIANTS
    }
    return {
        "variants": variants,
        "tasks": {task: asked[task] for task in known},
        "claims": claims(variants, LONG in known),
        "failed": [result for result in results if "error" in result],
        "runs": {"done": len(done), "seeds": sorted({result["seed"] for result in done}), "jobs": jobs},
        "setting": {
            "recipe": _shown(plan.base),
            "steps": plan.steps,
            "steps before masking": plan.switch,
            "batch": plan.settings.run.per_device_train_batch_size,
            "learning rate": plan.settings.run.learning_rate,
            "frames": plan.short_frames,
            "frames of long clips": plan.long_frames if plan.has_long else None,
            "residual_size": plan.residual_size,
        },
        "worlds": {name: _about(folder) for name, folder in (("train", plan.world), ("test", plan.test_world))},
        "commits": sorted({result["commit"] for result in done}),
        "reported at": commit(),
        "versions": versions(),
        "machine": machine(resolve_device(plan.device)),
    }


def _shown(recipe: Path) -> str:
    """The repository's own by its place there, another by its name alone."""
    whole = recipe.resolve()
    return whole.relative_to(ROOT).as_posix() if whole.is_relative_to(ROOT) else recipe.name


def _about(world: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((world / "toy_world.json").read_text(encoding="utf-8"))
    return about


def _figures(own: Sequence[Result], done: Sequence[Result], tasks: Sequence[str]) -> dict[str, Any]:
    """Of one variant. done: all results: seconds stand against those of `all` with the same seed."""
    accuracy = {task: _spread([run["tasks"].get(task) for run in own]) for task in tasks}
    temporal = [task for task in tasks if task != CONTROL]
    base = {run["seed"]: run["seconds_per_step"] for run in done if run["variant"] == ALL.name}
    ratios = [
        run["seconds_per_step"] / base[run["seed"]]
        for run in own
        if run["seconds_per_step"] is not None and base.get(run["seed"])
    ]
    return {
        "runs": len(own),
        "accuracy": accuracy,
        TEMPORAL: _spread([_mean(run, temporal) for run in own]),
        EVERY: _spread([_mean(run, tasks) for run in own]),
        "training tokens": _spread([run["training_tokens"] for run in own]),
        "seconds a step": _spread([run["seconds_per_step"] for run in own]),
        "relative": _spread(ratios),
        "by seed": {str(run["seed"]): run["tasks"] for run in own},
    }


def _mean(run: Result, tasks: Sequence[str]) -> float | None:
    return statistics.mean(run["tasks"][task] for task in tasks) if tasks else None


def _spread(values: Sequence[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    return {"mean": statistics.mean(known), "low": min(known), "high": max(known)} if known else None


# ---- claims ---------------------------------------------------------------------------------------------------------


def claims(variants: Mapping[str, Any], has_long: bool) -> list[dict[str, Any]]:
    """What was hoped for, the figures it is judged by, and whether it holds of the means; None: not measured."""

    def mean(name: str, key: str) -> float | None:
        found = variants[name]["accuracy"].get(key) if key == LONG else variants[name][key]
        return None if found is None else float(found["mean"])

    def claim(text: str, holds: Callable[..., bool], said: str, *values: float | None) -> dict[str, Any]:
        if None in values:
            return {"claim": text, "holds": None, "figures": MISSING}
        return {"claim": text, "holds": holds(*values), "figures": said.format(*values)}

    both, mask, points = "all+mask+mvm", mean("all+mask+mvm", "relative"), "{:.1f} and {:.1f} %"
    found = [
        claim("`mean`: at most 60 % on temporal tasks", lambda a: a <= 60, "{:.1f} %", mean("mean", TEMPORAL)),
        claim(
            "`all` knows more of time than `mean`",
            lambda a, b: a > b,
            points,
            *(mean(name, TEMPORAL) for name in ("all", "mean")),
        ),
        claim(
            "`all+mask+mvm`: at most 2 points below `all`, all tasks",
            lambda a, b: a >= b - 2,
            points,
            *(mean(name, EVERY) for name in (both, "all")),
        ),
        claim("`all+mask+mvm`: at most 0.7 × the seconds a step", lambda a: a <= 0.7, "{:.2f} ×", mask),
    ]
    if has_long:
        pairs = [(mean("residual", LONG), mean(name, LONG)) for name in ("all", "local frames only")]
        said = "`residual`: at most 3 points below `all` on clips of 64 frames"
        found.append(claim(said, lambda a, b: a >= b - 3, points, *pairs[0]))
        found.append(claim("`residual`: above local frames only on rare events", lambda a, b: a > b, points, *pairs[1]))
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Each file whole or not at all. report: of `summary`."""
    write_json(folder / "temporal.json", report)
    write_text(folder / "temporal.md", markdown(report))
    draw(folder / "temporal.svg", report)


def markdown(report: Mapping[str, Any]) -> str:
    """The page: tables, claims, what was done, what failed."""
    runs = report["runs"]
    seeds = ", ".join(map(str, runs["seeds"])) or MISSING
    total = len(VARIANTS) * len(runs["seeds"]) if runs["seeds"] else len(VARIANTS)
    return "\n".join(
        [
            "# Does the model learn time? The variants on the toy world\n",
            f"{runs['done']} runs, {len(report['failed'])} failed; seeds {seeds}. Strict accuracy, percent of the "
            "items asked: the mean over seeds (lowest–highest). Averages are means over tasks; temporal tasks are all "
            f"but {CONTROL}.\n",
            *([f"Runs are missing: {runs['done']} of {total} are there.\n"] if runs["done"] < total else []),
            _overview(report),
            "## Task by task\n",
            _by_task(report),
            "![accuracy by task and variant](temporal.svg)\n",
            "## What holds\n",
            table(
                ("claim", "holds", "figures"),
                [(c["claim"], _WORDS[c["holds"]], c["figures"]) for c in report["claims"]],
                texts=3,
            ),
            "Judged by the means over seeds; differences within the spread say little.\n",
            _done(report),
            *_failed(report["failed"]),
            _origin(report),
        ]
    )


_WORDS = {True: "yes", False: "no", None: "not measured"}


def _overview(report: Mapping[str, Any]) -> str:
    frames, long = report["setting"]["frames"], report["setting"]["frames of long clips"]
    header = ["variant", "runs", TEMPORAL, EVERY, f"tokens, {frames} frames"]
    header += [f"tokens, {long} frames"] if long else []
    rows = []
    for name, figures in report["variants"].items():
        tokens = [figures["tokens"]["usual"], *([figures["tokens"]["long"]] if long else [])]
        row = [name, figures["runs"], _cell(figures[TEMPORAL]), _cell(figures[EVERY]), *tokens]
        row += [_cell(figures["training tokens"]), _cell(figures["seconds a step"], 3), _cell(figures["relative"], 2)]
        rows.append(row)
    chance = report["tasks"]
    averages = [
        f"{statistics.mean(values):.1f}"
        for values in ([c["chance"] for n, c in chance.items() if n != CONTROL], [c["chance"] for c in chance.values()])
    ]
    rows.append(["chance", "", *averages, *[""] * (len(header) - 1)])
    return table([*header, "tokens in training", "s a step", "× `all`"], rows)


def _by_task(report: Mapping[str, Any]) -> str:
    rows = [
        [task, about["items"], f"{about['chance']:.1f}"]
        + [_cell(figures["accuracy"].get(task)) for figures in report["variants"].values()]
        for task, about in report["tasks"].items()
    ]
    return table(["task", "items", "chance", *report["variants"]], rows)


def _cell(spread: Spread, digits: int = 1) -> str:
    if spread is None:
        return MISSING
    mean, low, high = (f"{spread[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low}–{high})"


def _done(report: Mapping[str, Any]) -> str:
    setting, long = report["setting"], report["setting"]["frames of long clips"]
    switch = setting["steps before masking"]
    masked = (
        f"The masked variants share the first {switch} steps with `all` of their seed: they go on from its checkpoint, "
        f"optimizer, schedule and order of clips included, with masking from step {switch + 1} on, so that steps and "
        "learning rates are the same for all."
        if switch
        else "The masked variants are masked from their first step on."
    )
    rare = (
        f"Of clips of 64 frames {long} are looked at, in training and in the task {LONG} (which color flashes up?)."
        if long
        else "The world has no clips of 64 frames, so nothing is said about these."
    )
    return (
        "## What was done\n\n"
        f"Each run: {setting['steps']} steps of {setting['batch']} clips (learning rate {setting['learning rate']}), "
        f"from the same checkpoint of stage 1, by `{setting['recipe']}` but for the keys of the variant; "
        f"runs of a seed see the same clips in the same order, {setting['frames']} frames of each. {rare} `residual` "
        f"has {setting['residual_size']} local frames and the mean of all; local frames only is `all` given "
        f"{setting['residual_size']} frames of each clip. `all+mask` drops tokens and has the language "
        f"loss alone (`use_mvm: False`). {masked}\n\n"
        "Tokens: that enter the language model when it answers; in training: kept of a clip, the mean over clips of "
        "both lengths and, where masked, over the masked steps. Seconds a step: the median of the log's lines of the "
        f"same steps of every run (those after masking begins), decoding included; {report['runs']['jobs']} runs at "
        "once, of one thread each. × `all`: against the run of `all` with the same seed.\n"
    )


def _failed(failed: Sequence[Result]) -> list[str]:
    lines = [f"- {run['variant']}, seed {run['seed']}: {run['error']}" for run in failed]
    return ["## Failed\n", *lines, ""] if lines else []


def _origin(report: Mapping[str, Any]) -> str:
    about = report["machine"]
    worlds = "; ".join(f"{name}: {_pairs(world)}" for name, world in report["worlds"].items())
    return (
        "## Where it comes from\n\n"
        f"Toy worlds: {worlds}. Trained at commit {', '.join(report['commits']) or MISSING}, reported at "
        f"{report['reported at']}. Machine: {about['accelerator'] or about['processor']}, {about['cores']} cores; "
        f"{_pairs(report['versions'])}.\n"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
