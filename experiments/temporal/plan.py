"""The plan of the experiment: the variants, the settings that all runs share, and the recipe of each run."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from stllm.common.config import load_config
from stllm.common.registry import video_inputs
from stllm.evaluation.benchmarks.mvbench import MVBenchTask, task_of
from stllm.processors.templates import SYSTEM
from stllm.toy.tasks import RARE, TASKS

ROOT = Path(__file__).resolve().parents[2]
PARTS = 4  # checkpoints in the part of a run without masking
LONG_PATH = f"video/{RARE.corpus}/choices.json"


@dataclass(frozen=True)
class Variant:
    """A variant of the video input. settings: keys of the recipe's section `model`.

    local: clips have as many frames as `residual` has local frames. masked: continues a run of `all`, see
    `Plan.switch`.
    """

    name: str
    settings: Mapping[str, Any]
    local: bool = False
    masked: bool = False

    @property
    def slug(self) -> str:
        """The name of this variant in paths."""
        return self.name.replace("+", "_").replace(" ", "_")


_ALL = {"video_input": "all", "mvm_decode": True}  # with the decoder, so that masked runs can continue it
ALL = Variant("all", _ALL)
VARIANTS = (  # masked variants last, because they wait for `all` of the same seed
    ALL,
    Variant("mean", {"video_input": "mean"}),
    Variant("residual", {"video_input": "residual"}),
    Variant("local frames only", {"video_input": "all"}, local=True),
    Variant("all+mask", {**_ALL, "use_mask": True, "use_mvm": False}, masked=True),
    Variant("all+mask+mvm", {**_ALL, "use_mask": True, "use_mvm": True}, masked=True),
)


@dataclass(frozen=True)
class Plan:
    """The settings that all runs share.

    world, test_world: toy worlds to train on and to test on. checkpoint: the checkpoint that every run starts from.
    base: the recipe that each run's recipe extends. work: folder of the runs. steps: steps of each run.
    mask_after: share of the steps before masking begins. residual_size: local frames of `residual`.
    long_frames: frames sampled from a 64-frame clip. limit: questions per task (None: all).
    options: `key=value`, which override each recipe.
    """

    world: Path
    test_world: Path
    checkpoint: Path
    base: Path
    work: Path
    steps: int
    mask_after: float
    residual_size: int
    long_frames: int
    limit: int | None
    device: str
    options: Sequence[str] = ()

    @property
    def every(self) -> int:
        """The number of steps between checkpoints."""
        return max(1, round((self.mask_after or 1.0) * self.steps / PARTS))

    @property
    def switch(self) -> int:
        """The step of the checkpoint of `all` from which masked variants continue; 0: they start like the others."""
        return max(1, round(self.mask_after * self.steps / self.every)) * self.every if self.mask_after else 0

    @property
    def logging_steps(self) -> int:
        """The number of steps that each line of the log averages."""
        return max(1, min(25, self.steps // 40))

    @cached_property
    def settings(self) -> DictConfig:
        """The base recipe with the options applied. Raises UserError if it is invalid."""
        return load_config(self.base, self.options)

    @cached_property
    def video_frames(self) -> dict[str, int]:
        """The frames sampled from each clip, by data set, including the 64-frame clips if the world has them."""
        sets = {str(name): entry for name, entry in self.settings.datasets.items() if isinstance(entry, DictConfig)}
        long = [name for name, entry in sets.items() if RARE.corpus in str(entry.get("anno_path"))]
        if self.has_long and not long:
            long = [Path(RARE.corpus).name]
        frames = {name: int(entry.num_frames) for name, entry in sets.items() if "num_frames" in entry}
        return frames | dict.fromkeys(long, self.long_frames)

    @cached_property
    def short_frames(self) -> int:
        """The number of frames sampled from a clip of the usual length."""
        entries = [entry for entry in self.settings.datasets.values() if isinstance(entry, DictConfig)]
        return max(entry.num_frames for entry in entries if "num_frames" in entry and RARE.corpus not in str(entry))

    @cached_property
    def has_long(self) -> bool:
        """True if both worlds have 64-frame clips (`stllm toy --long`)."""
        return (self.world / "vc2" / LONG_PATH).is_file() and RARE.benchmark in self.slugs

    @cached_property
    def slugs(self) -> list[str]:
        """The tasks to test, as names of their files: those that the base trains, and the rare event."""
        learned = [
            str(entry.get("anno_path"))
            for entry in self.settings.datasets.values()
            if isinstance(entry, DictConfig) and entry.get("sample_ratio") != 0
        ]
        left_out = {task.benchmark for task in TASKS if not any(f"/{task.corpus}/" in path for path in learned)}
        files = (self.test_world / "mvbench" / "json").glob("*.json")
        return sorted(file.stem for file in files if file.stem not in left_out)

    def frames(self, variant: Variant, number: int) -> int:
        """Return how many of `number` frames a variant gets."""
        return min(number, self.residual_size) if variant.local else number

    def tokens(self, variant: Variant, number: int) -> int:
        """Return the number of visual tokens of a clip of `number` frames, without masking."""
        config = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        build = video_inputs.get(variant.settings["video_input"])
        video_input: Any = build(width=1, bottleneck=1, residual_size=self.residual_size)
        return int(video_input.num_tokens(self.frames(variant, number), config["num_query_tokens"]))

    def folder(self, variant: Variant, seed: int) -> Path:
        """Return the folder of one run."""
        return self.work / f"{variant.slug}-{seed}"


def recipe(plan: Plan, variant: Variant, seed: int) -> dict[str, Any]:
    """Return the recipe of one run. All runs of a seed train on the same clips in the same order."""
    datasets: dict[str, Any] = {
        name: {"num_frames": plan.frames(variant, number)} for name, number in plan.video_frames.items()
    }
    for name in set(datasets).difference(map(str, plan.settings.datasets)):
        asked = {"instruction": f"{SYSTEM}\n", "judge_options": True}  # as the base's multiple choice
        datasets[name] |= {"anno_path": LONG_PATH, "crop": "center", "sample_ratio": 1, **asked}
    return {
        "base": str(plan.base.resolve()),
        "model": {
            "ckpt": str(plan.checkpoint.resolve()),
            "residual_size": plan.residual_size,
            "use_mask": False,
            **variant.settings,
        },
        "datasets": datasets,
        "run": {
            "output_dir": str(plan.folder(variant, seed).resolve() / "model"),
            "seed": seed,
            "max_steps": plan.steps,
            "logging_steps": plan.logging_steps,
            "save_steps": plan.every,
            "save_total_limit": None if variant is ALL else 1,  # masked runs continue one of `all`
        },
    }


def tested(plan: Plan) -> dict[str, dict[str, float]]:
    """Return for each task `items`, the number of questions, and `chance`, the accuracy of guessing in percent."""
    found = {}
    for slug in plan.slugs:
        file = plan.test_world / "mvbench" / "json" / f"{slug}.json"
        items = json.loads(file.read_text(encoding="utf-8"))[: plan.limit]
        chance = statistics.mean(100 / len(item["candidates"]) for item in items)
        if slug != RARE.benchmark or plan.has_long:
            task = task_of(file)
            assert isinstance(task, MVBenchTask), file  # the toy world has only tasks of MVBench
            found[task.name] = {"items": len(items), "chance": chance}
    return found
