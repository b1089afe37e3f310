"""The runs of the experiment: `stllm train` and `stllm evaluate` for each variant and seed.

The folder WORK/<variant>-<seed> holds recipe.yaml, model (written by `stllm train`), evaluation (by `stllm evaluate`),
the output of both commands (*.txt) and, when the run has ended, result.json.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from experiments.temporal.plan import ALL, ROOT, VARIANTS, Plan, Variant, recipe
from stllm.common.files import write_text
from stllm.evaluation.results import write_json
from stllm.runners.run_folder import RunFolder
from stllm.toy.tasks import RARE

Result = dict[str, Any]
MAX_NEW_TOKENS = 16  # enough for the letter and the text of an option


class RunError(Exception):
    """A run failed. The message is the reason."""


async def run_all(plan: Plan, seeds: Sequence[int], jobs: int) -> AsyncIterator[Result]:
    """Yield the result of each run when it ends. A failed run has only `variant`, `seed` and `error`, the reason.

    jobs: the number of runs at the same time. Runs start seed by seed.
    """
    free = asyncio.Semaphore(jobs)
    tasks: dict[tuple[str, int], asyncio.Task[Result]] = {}

    async def one(variant: Variant, seed: int) -> Result:
        try:
            async with free:  # first come, first served, so `all` of the same seed started before
                if variant.masked and plan.switch and "error" in (first := await tasks[ALL.name, seed]):
                    raise RunError(f"`all`, which this run continues, failed: {first['error']}")
                print(f"{variant.name}, seed {seed}: {plan.folder(variant, seed)}", flush=True)
                return await run(plan, variant, seed)
        except (RunError, OSError, KeyError, ValueError) as error:
            return {"variant": variant.name, "seed": seed, "error": str(error)}

    for seed in seeds:
        for variant in VARIANTS:
            tasks[variant.name, seed] = asyncio.create_task(one(variant, seed))
    for done in asyncio.as_completed(tasks.values()):
        yield await done


async def run(plan: Plan, variant: Variant, seed: int) -> Result:
    """Train and evaluate a variant with a seed, and return the result. Finished parts of an earlier call are reused.

    Raises RunError if a command fails.
    """
    folder = plan.folder(variant, seed).resolve()
    file = folder / "result.json"
    if file.is_file():
        found: Result = json.loads(file.read_text(encoding="utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "commit.txt").is_file():
        write_text(folder / "commit.txt", commit())
    model = RunFolder(folder / "model")
    if not model.is_finished():  # the trainer resumes by itself
        options = list(plan.options)
        if variant.masked and plan.switch and model.last_checkpoint() is None:
            begun = plan.folder(ALL, seed).resolve() / "model" / f"checkpoint-{plan.switch}"
            options.append(f"run.resume_from_checkpoint={begun}")
        path = folder / "recipe.yaml"
        write_text(path, yaml.safe_dump(recipe(plan, variant, seed), sort_keys=False))
        words = ["train", "--device", plan.device, "--cfg-path", str(path)]
        await command([*words, *(["--options", *options] if options else [])], folder / "train.txt")
    tasks: dict[str, float] = {}  # strict accuracy by task, in percent of all items
    parts = [("short", [slug for slug in plan.slugs if slug != RARE.benchmark], plan.short_frames)]
    parts += [("long", [RARE.benchmark], plan.long_frames)] if plan.has_long else []
    for name, slugs, frames in parts:
        results = folder / "evaluation" / f"{name}.results.json"
        if not results.is_file():
            words = ["evaluate", "mvbench", "--device", plan.device, "--ckpt-path", str(folder / "model")]
            words += ["--anno-path", str(plan.test_world.resolve() / "mvbench"), "--tasks", ",".join(slugs)]
            words += ["--num-frames", str(plan.frames(variant, frames)), "--max-new-tokens", str(MAX_NEW_TOKENS)]
            words += ["--output-dir", str(results.parent), "--output-name", name, "--num-workers", "0"]
            words += [] if plan.limit is None else ["--limit", str(plan.limit)]
            await command(words, folder / "evaluate.txt")
        tasks |= json.loads(results.read_text(encoding="utf-8"))["scores"]["strict"]["tasks"]
    result = {
        "variant": variant.name,
        "seed": seed,
        "commit": (folder / "commit.txt").read_text(encoding="utf-8"),
        "tasks": tasks,
        **training_figures(plan, folder / "model"),
    }
    write_json(file, result)
    return result


async def command(words: Sequence[str], log: Path) -> None:
    """Run `python -m stllm` with one thread, and append its output to `log`. If it fails, raises RunError.

    If this task is cancelled, the process gets SIGTERM, so that training writes a checkpoint, and is awaited.
    """
    with log.open("ab") as stream:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stllm", *words),
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            if process.returncode is None:
                process.terminate()
                await process.wait()
            raise
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        raise RunError(f"stllm {words[0]} ended with {code}: {last}")


def training_figures(plan: Plan, model: Path) -> Result:
    """Return the seconds per step (median over log lines) and the mean number of visual tokens per clip.

    For comparison, all variants use the steps in which masked runs mask, except for the first log line after a masked
    run's start. model: output folder of `stllm train`.
    """
    text = (model / "log.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if line["step"] > plan.switch + plan.logging_steps]
    settings = OmegaConf.load(model / "config.yaml").run
    batch = settings.per_device_train_batch_size * (settings.get("gradient_accumulation_steps") or 1)
    times = [batch / line["samples_per_second"] for line in lines if line["samples_per_second"]]
    kept = [line["kept_visual_tokens"] for line in lines if line["kept_visual_tokens"] is not None]
    return {
        "seconds_per_step": statistics.median(times) if times else None,
        "training_tokens": statistics.mean(kept) if kept else None,
    }


def commit() -> str:
    """Return the commit of the repository, with a note if the code has uncommitted changes."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "stllm", "configs")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with uncommitted changes" if changed else "")
