"""The report of the experiment: temporal.json, temporal.md and temporal.svg.

It shows the mean and the spread over seeds, by task and variant, and checks the paper's claims. Accuracies are strict
(see the evaluation's tables), in percent of all questions.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.charts import GREY, STYLE
from benchmarks.common import machine
from experiments.temporal.plan import ALL, ROOT, VARIANTS, Plan, tested
from experiments.temporal.runs import Result, commit
from stllm.common.device import resolve_device
from stllm.common.files import replacing, write_text
from stllm.evaluation.benchmarks.mvbench import TASKS
from stllm.evaluation.reports.tables import MISSING, table
from stllm.evaluation.results import versions, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROL, LONG = "Object Existence", "Unexpected Action"  # a task without order; the rare event in 64-frame clips
TEMPORAL, EVERY = "temporal tasks", "all tasks"
COLOURS = ("#1f5fa8", "#d8742f", "#3a9d6b", "#a8cdb8", "#7fb2e5", "#9a5fc0")  # in the order of `VARIANTS`
BARS = 0.8  # share of a task's height that its bars fill
Spread = Mapping[str, float] | None  # mean, low, high over seeds; None without results

POINTS, MVM = "{:.1f} and {:.1f} %", "all+mask+mvm"
Claim = tuple[str, str, tuple[str, ...], Callable[..., bool], str]  # text, figure, variants, condition, its format
CLAIMS: tuple[Claim, ...] = (
    ("`mean`: at most 60 % on temporal tasks", TEMPORAL, ("mean",), lambda a: a <= 60, "{:.1f} %"),
    ("`all`: above `mean` on temporal tasks", TEMPORAL, ("all", "mean"), lambda a, b: a > b, POINTS),
    (f"`{MVM}`: at most 2 points below `all`, all tasks", EVERY, (MVM, "all"), lambda a, b: a >= b - 2, POINTS),
    (f"`{MVM}`: at most 0.7 × the seconds a step", "relative", (MVM,), lambda a: a <= 0.7, "{:.2f} ×"),
    (
        "`residual`: at most 3 points below `all` on clips of 64 frames",
        *(LONG, ("residual", "all"), lambda a, b: a >= b - 3, POINTS),
    ),
    (
        "`residual`: above local frames only on rare events",
        *(LONG, ("residual", "local frames only"), lambda a, b: a > b, POINTS),
    ),
)


def summary(plan: Plan, results: Sequence[Result], *, jobs: int) -> dict[str, Any]:
    """Return the content of temporal.json. results: results of all runs so far; failed runs have the key `error`."""
    done = [result for result in results if "error" not in result]
    asked = tested(plan)
    known = [task.name for task in TASKS if task.name in asked]
    base, worlds = plan.base.resolve(), {"train": plan.world, "test": plan.test_world}
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
            "recipe": base.relative_to(ROOT).as_posix() if base.is_relative_to(ROOT) else base.name,
            "steps": plan.steps,
            "steps before masking": plan.switch,
            "batch": plan.settings.run.per_device_train_batch_size,
            "learning rate": plan.settings.run.learning_rate,
            "frames": plan.short_frames,
            "frames of long clips": plan.long_frames if plan.has_long else None,
            "residual_size": plan.residual_size,
        },
        "worlds": {name: json.loads((folder / "toy_world.json").read_text()) for name, folder in worlds.items()},
        "commits": sorted({result["commit"] for result in done}),
        "reported at": commit(),
        "versions": versions(),
        "machine": machine(resolve_device(plan.device)),
    }


def _figures(own: Sequence[Result], done: Sequence[Result], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one variant. own: its results. done: the results of all variants.

    `relative` compares the seconds of a step with those of `all` with the same seed.
    """
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


def claims(variants: Mapping[str, Any], has_long: bool) -> list[dict[str, Any]]:
    """Check each claim for the means over seeds. Returns dicts of `claim`, `holds` (None: not measured), `figures`."""
    found: list[dict[str, Any]] = []
    for text, key, names, holds, words in CLAIMS:
        if key == LONG and not has_long:
            continue
        spreads = [variants[name]["accuracy"].get(key) if key == LONG else variants[name][key] for name in names]
        if None in spreads:
            found.append({"claim": text, "holds": None, "figures": MISSING})
        else:
            means = [float(spread["mean"]) for spread in spreads]
            found.append({"claim": text, "holds": holds(*means), "figures": words.format(*means)})
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write temporal.json, temporal.md and temporal.svg, each completely or not at all. report: result of `summary`."""
    from matplotlib import rc_context

    write_json(folder / "temporal.json", report)
    write_text(folder / "temporal.md", markdown(report))
    with rc_context(STYLE), replacing(folder / "temporal.svg") as partial:  # equal figures give equal bytes
        chart(report).savefig(partial, format="svg", transparent=True, metadata={"Date": None})


def markdown(report: Mapping[str, Any]) -> str:
    """Return temporal.md: the tables, the claims, the setting and the failures. report: result of `summary`."""
    runs, about = report["runs"], report["machine"]
    seeds = ", ".join(map(str, runs["seeds"])) or MISSING
    total = len(VARIANTS) * max(1, len(runs["seeds"]))
    tasks = [
        [task, asked["items"], f"{asked['chance']:.1f}"]
        + [_cell(figures["accuracy"].get(task)) for figures in report["variants"].values()]
        for task, asked in report["tasks"].items()
    ]
    words = {True: "yes", False: "no", None: "not measured"}
    held = [(claim["claim"], words[claim["holds"]], claim["figures"]) for claim in report["claims"]]
    failed = [f"- {run['variant']}, seed {run['seed']}: {run['error']}" for run in report["failed"]]
    about_of = {
        name: ", ".join(f"{key} {value}" for key, value in values.items())
        for name, values in (*report["worlds"].items(), ("versions", report["versions"]))
    }
    return "\n".join(
        [
            "# Which video inputs learn temporal order? An experiment on the toy world\n",
            f"{runs['done']} runs, {len(failed)} failed; seeds {seeds}. The tables show the strict accuracy in percent "
            "of all questions: the mean over seeds, and the lowest and the highest in brackets. Averages are means "
            f"over tasks. Temporal tasks are all but {CONTROL}.\n",
            *([f"Runs are missing: {runs['done']} of {total} are there.\n"] if runs["done"] < total else []),
            _overview(report),
            "## Task by task\n",
            table(["task", "items", "chance", *report["variants"]], tasks),
            "![accuracy by task and variant](temporal.svg)\n",
            "## Claims\n",
            table(("claim", "holds", "figures"), held, texts=3),
            "A claim holds if the means over seeds fulfil it. Differences within the spread may be chance.\n",
            _done(report),
            *(["## Failed\n", *failed, ""] if failed else []),
            "## Origin\n",
            f"Toy worlds: {'; '.join(f'{name}: {about_of[name]}' for name in report['worlds'])}. Trained at commit "
            f"{', '.join(report['commits']) or MISSING}, reported at {report['reported at']}. Machine: "
            f"{about['accelerator'] or about['processor']}, {about['cores']} cores; {about_of['versions']}.\n",
        ]
    )


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


def _cell(spread: Spread, digits: int = 1) -> str:
    if spread is None:
        return MISSING
    mean, low, high = (f"{spread[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low}–{high})"


def _done(report: Mapping[str, Any]) -> str:
    setting, long = report["setting"], report["setting"]["frames of long clips"]
    switch = setting["steps before masking"]
    masked = (
        f"The masked variants continue `all` of the same seed after {switch} steps: they load its checkpoint, with the "
        f"optimizer, the schedule and the order of clips, and mask from step {switch + 1} on. So all variants have the "
        "same steps and learning rates."
        if switch
        else "The masked variants mask from their first step on."
    )
    rare = (
        f"From clips of 64 frames, {long} frames are sampled, in training and in the task {LONG} (which colour flashes "
        "up?)."
        if long
        else "The world has no clips of 64 frames."
    )
    return (
        "## Setting\n\n"
        f"Each run trains {setting['steps']} steps of {setting['batch']} clips (learning rate "
        f"{setting['learning rate']}), from the same checkpoint, with `{setting['recipe']}` and the "
        "settings of the variant. All runs of a seed train on the same clips in the same order, with "
        f"{setting['frames']} frames of each clip. {rare} `residual` has {setting['residual_size']} local frames and "
        f"the mean of all frames. `local frames only` is `all` with {setting['residual_size']} frames of each clip. "
        f"`all+mask` drops tokens and has only the language loss (`use_mvm: False`). {masked}\n\n"
        "Columns: `tokens` is the number of visual tokens of a clip when the model answers. `tokens in training` is "
        "the number that is kept, the mean over clips of both lengths (masked variants: over the masked steps). `s a "
        "step` is the median over the log's lines, including the decoding of clips, over the same steps of all runs "
        f"(those after masking begins); {report['runs']['jobs']} runs at the same time, each with one thread. `× all` "
        "compares it with the run of `all` with the same seed.\n"
    )


def chart(report: Mapping[str, Any]) -> "Figure":
    """Draw a bar for each variant and task, with the spread over seeds and the accuracy of guessing."""
    from matplotlib.figure import Figure

    tasks, variants = report["tasks"], report["variants"]
    figure = Figure(figsize=(9, 1.2 + 0.85 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    thickness = BARS / len(variants)
    for number, ((name, figures), colour) in enumerate(zip(variants.items(), COLOURS, strict=True)):
        found = [
            (place, figures["accuracy"][task]) for place, task in enumerate(tasks) if figures["accuracy"].get(task)
        ]
        means = [spread["mean"] for _, spread in found]
        reach = [[s["mean"] - s["low"] for _, s in found], [s["high"] - s["mean"] for _, s in found]]
        places = [place - BARS / 2 + (number + 0.5) * thickness for place, _ in found]
        axes.barh(places, means, height=0.9 * thickness, color=colour, label=name)
        axes.errorbar(means, places, xerr=reach, fmt="none", ecolor=GREY, elinewidth=1, capsize=1.5)
    for place, about in enumerate(tasks.values()):
        axes.plot([about["chance"]] * 2, [place - BARS / 2, place + BARS / 2], color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(tasks)), labels=list(tasks))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("strict accuracy, %; lines: lowest and highest of the seeds; dashed: guessing")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(variants), frameon=False, fontsize=8)
    return figure
