"""The experiment's runs: each variant trained and evaluated by `stllm`'s own commands, and what their files say.

WORK/<variant>-<seed>/recipe.yaml, model (what `stllm train` leaves), evaluation, *.txt (what the commands printed), and
result.json once all of it is there.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from benchmarks.temporal_plan import ALL, Plan, Variant, recipe
from stllm.common.files import write_text
from stllm.evaluation.results import write_json
from stllm.runners.run_folder import RunFolder
from stllm.toy.tasks import RARE

Result = dict[str, Any]
MAX_NEW_TOKENS = 16  # an option's letter and text
ROOT = Path(__file__).resolve().parent.parent


class RunError(Exception):
    """A run that failed; its words say why."""


@dataclass
class Commands:
    """Runs commands in processes of one thread each; `stop` asks all of them to end, and lets none begin."""

    stopping: bool = False
    _running: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, words: Sequence[str], log: Path) -> None:
        """`python -m stllm` with those words, printing to the end of `log`. Raises RunError with its last line."""
        with log.open("a", encoding="utf-8") as stream:
            with self._lock:
                if self.stopping:
                    raise RunError("interrupted")
                process = subprocess.Popen(
                    [sys.executable, "-m", "stllm", *words],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        if self.stopping:
            raise RunError("interrupted")
        if code:
            said = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            raise RunError(f"stllm {words[0]} ended with {code}: {last}")

    def stop(self) -> None:
        """SIGTERM to those that run: training writes a checkpoint first."""
        with self._lock:
            self.stopping = True
            for process in self._running:
                process.terminate()


def run(plan: Plan, variant: Variant, seed: int, commands: Commands) -> Result:
    """Trains and evaluates, or reads what an earlier call has left. Raises RunError."""
    folder = plan.folder(variant, seed)
    file = folder / "result.json"
    if file.is_file():
        found: Result = json.loads(file.read_text(encoding="utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "commit.txt").is_file():
        write_text(folder / "commit.txt", commit())
    _train(plan, variant, seed, commands)
    short = [slug for slug in plan.slugs if slug != RARE.benchmark]
    tasks = _evaluate(plan, variant, seed, commands, "short", short, plan.short_frames)
    if plan.has_long:
        tasks |= _evaluate(plan, variant, seed, commands, "long", [RARE.benchmark], plan.long_frames)
    result = {
        "variant": variant.name,
        "seed": seed,
        "commit": (folder / "commit.txt").read_text(encoding="utf-8"),
        "tasks": tasks,
        **training_figures(plan, folder / "model"),
    }
    write_json(file, result)
    return result


def _train(plan: Plan, variant: Variant, seed: int, commands: Commands) -> None:
    """The trainer itself goes on where it stopped; a masked run begins with the checkpoint of `all`."""
    folder = plan.folder(variant, seed)
    model = RunFolder(folder / "model")
    if model.is_finished():
        return
    options = list(plan.options)
    if variant.masked and plan.switch and model.last_checkpoint() is None:
        begun = plan.folder(ALL, seed).resolve() / "model" / f"checkpoint-{plan.switch}"
        options.append(f"run.resume_from_checkpoint={begun}")
    path = folder.resolve() / "recipe.yaml"
    write_text(path, yaml.safe_dump(recipe(plan, variant, seed), sort_keys=False))
    words = ["train", "--device", plan.device, "--cfg-path", str(path), *(["--options", *options] if options else [])]
    commands.run(words, folder / "train.txt")


def _evaluate(
    plan: Plan, variant: Variant, seed: int, commands: Commands, name: str, slugs: Sequence[str], frames: int
) -> dict[str, float]:
    """Strict accuracy by task, in percent of all items."""
    folder = plan.folder(variant, seed).resolve()
    output = folder / "evaluation"
    results = output / f"{name}.results.json"
    if not results.is_file():
        words = ["evaluate", "mvbench", "--device", plan.device, "--ckpt-path", str(folder / "model")]
        words += ["--anno-path", str(plan.test_world.resolve() / "mvbench"), "--tasks", ",".join(slugs)]
        words += ["--num-frames", str(plan.frames(variant, frames)), "--max-new-tokens", str(MAX_NEW_TOKENS)]
        words += ["--output-dir", str(output), "--output-name", name, "--num-workers", "0"]
        words += [] if plan.limit is None else ["--limit", str(plan.limit)]
        commands.run(words, folder / "evaluate.txt")
    scores: dict[str, float] = json.loads(results.read_text(encoding="utf-8"))["scores"]["strict"]["tasks"]
    return scores


def training_figures(plan: Plan, model: Path) -> Result:
    """Seconds a step, the median over the log's lines, and mean visual tokens a clip, of the same steps in every run.

    Only steps after the switch count, and the line after it does not: there a masked run starts.
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
    """The repository's commit, and whether the code differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "stllm", "configs")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with uncommitted changes" if changed else "")
