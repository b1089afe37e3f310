"""Tests a claim of the paper on the toy world: a model that reads all tokens learns temporal order; pooling does not.

Each variant of the video input is trained with several seeds, from the same checkpoint, on the same clips and for the
same number of steps. It is then evaluated on the toy version of MVBench. The same command resumes an interrupted
experiment and repeats failed runs.

    python -m experiments.temporal --world TOY_ROOT --ckpt CHECKPOINT [--quick]
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.common import RESULTS
from experiments.temporal.plan import ROOT, VARIANTS, Plan, tested
from experiments.temporal.report import summary, write_report
from experiments.temporal.runs import Result, run_all
from stllm.commands.options import path, whole
from stllm.common.config import describe_changes, flat, load_config
from stllm.common.errors import UserError
from stllm.evaluation.results import write_json
from stllm.evaluation.runs import content_digest

QUICK = {"steps": 300, "seeds": 1, "limit": 40}
NUM_SEEDS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing runs, and write the report. Returns 0 if all succeeded, 1 if not, 130 if interrupted."""
    args = _arguments(argv)
    try:
        plan = _plan(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        failed = asyncio.run(_run(plan, args))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted: what was trained is kept, and the same command goes on", file=sys.stderr)
        return 130
    print((args.output_dir / "temporal.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


async def _run(plan: Plan, args: argparse.Namespace) -> list[Result]:
    """Run all variants and seeds, and write the report after each run. Returns the results of failed runs."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # as Ctrl-C does
    seeds = range(args.seeds or (QUICK["seeds"] if args.quick else NUM_SEEDS))
    results: list[Result] = []
    async for result in run_all(plan, seeds, args.jobs):
        results.append(result)
        write_report(args.output_dir, summary(plan, results, jobs=args.jobs))
        if "error" in result:
            outcome = f" failed: {result['error']}"
        else:
            outcome = f": {statistics.mean(result['tasks'].values()):.1f} % right on average"
            if spent := result["seconds_per_step"]:
                outcome += f", {spent:.3f} s a step"
        count = f"{len(results)} of {len(seeds) * len(VARIANTS)}"
        print(f"[{count}] {result['variant']}, seed {result['seed']}{outcome}", flush=True)
    return [result for result in results if "error" in result]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.temporal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quick = " ".join(f"--{name} {value}" for name, value in QUICK.items())
    parser.add_argument("--world", type=Path, required=True, metavar="DIR", help="toy world, from `stllm toy --long`")
    parser.add_argument("--test-world", type=Path, metavar="DIR", help="toy world to test on (default: --world)")
    parser.add_argument(
        "--ckpt",
        dest="checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint of stages/temporal_base.yaml, from which runs start",
    )
    parser.add_argument("--quick", action="store_true", help=f"rough figures: changes defaults to {quick}")
    parser.add_argument("--seeds", type=whole(1), metavar="N", help=f"number of seeds (default: {NUM_SEEDS})")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="steps of each run (default: as in --base)")
    parser.add_argument(
        "--mask-after", type=float, default=0.5, metavar="SHARE", help="share of steps without masking (default: 0.5)"
    )
    parser.add_argument(
        "--residual-size", type=whole(1), default=4, metavar="R", help="local frames of residual (default: 4)"
    )
    parser.add_argument(
        "--long-frames", type=whole(2), default=16, metavar="T", help="frames of a 64-frame clip (default: 16)"
    )
    parser.add_argument("--limit", type=whole(1), metavar="N", help="questions per task (default: all)")
    parser.add_argument(
        "--jobs", type=whole(1), default=2, metavar="N", help="runs at the same time, each with one thread (default: 2)"
    )
    base = ROOT / "configs" / "tiny" / "temporal.yaml"
    parser.add_argument("--base", type=Path, default=base, metavar="YAML", help="recipe (default: tiny/temporal.yaml)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override --base, in all runs")
    parser.add_argument(
        "--work", type=path, metavar="DIR", help="folder of the runs (default: output/temporal; --quick: _quick)"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="folder of table and chart")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return parser.parse_args(argv)


def _plan(args: argparse.Namespace) -> Plan:
    """Make the plan, and write its settings to experiment.json in the folder of the runs.

    Raises UserError for unusable arguments, and if the folder holds runs with other settings.
    """
    args.test_world = args.test_world or args.world
    for folder in {args.world, args.test_world}:
        if not (folder / "toy_world.json").is_file():
            raise UserError(f"{folder} is no toy world: make one with stllm toy --output {folder} --long")
    if not (args.checkpoint / "config.json").is_file():
        advice = "make it with bash scripts/train_tiny.sh --experiment"
        raise UserError(f"{args.checkpoint} holds no trained model: {advice}")
    if not 0 <= args.mask_after < 1:
        raise UserError(f"--mask-after is {args.mask_after}; expected a share of the steps, from 0 to below 1")
    os.environ["TOY_ROOT"] = str(args.world.resolve())  # the recipes read it
    args.work = Path(args.work or f"output/temporal{'_quick' if args.quick else ''}")
    if args.quick:
        args.steps, args.limit = args.steps or QUICK["steps"], args.limit or QUICK["limit"]
    args.steps = args.steps or load_config(args.base, args.options).run.max_steps
    plan = Plan(**{f.name: getattr(args, f.name) for f in fields(Plan)})
    weights = sorted(plan.checkpoint.glob("*.safetensors"))
    now: dict[str, Any] = {
        "base": OmegaConf.to_container(plan.settings),
        "checkpoint": content_digest([file.read_bytes().hex() for file in weights]),
        "world": json.loads((plan.world / "toy_world.json").read_text(encoding="utf-8")),
        "test_world": json.loads((plan.test_world / "toy_world.json").read_text(encoding="utf-8")),
        **{name: getattr(plan, name) for name in ("steps", "mask_after", "residual_size", "long_frames")},
        "tasks": tested(plan),
    }
    file = plan.work / "experiment.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if changes := describe_changes(flat(before), flat(json.loads(json.dumps(now)))):
            raise UserError(f"{plan.work} holds runs of another experiment: {changes}; name another --work")
    else:
        plan.work.mkdir(parents=True, exist_ok=True)
        write_json(file, now)
    return plan


if __name__ == "__main__":
    sys.exit(main())
