"""The plan of the experiment: the variants, what all runs share, and each run's recipe."""

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
from stllm.toy.tasks import RARE, TASKS

ROOT = Path(__file__).resolve().parents[2]
PARTS = 4  # checkpoints of the part without masks
LONG_PATH = f"video/{RARE.corpus}/asked.json"


@dataclass(frozen=True)
class Variant:
    """One way for videos to enter the language model. settings: keys of the recipe's section `model`.

    local: clips are of as many frames as `residual` has local ones. masked: begins as `all`, see `Plan.switch`.
    """

    name: str
    settings: Mapping[str, Any]
    local: bool = False
    masked: bool = False

    @property
    def slug(self) -> str:
        """Its name in a path."""
        return self.name.replace("+", "_").replace(" ", "_")


_ALL = {"video_input": "all", "mvm_decode": True}  # the decoder is there from the start, unused, so that runs can part
ALL = Variant("all", _ALL)
VARIANTS = (  # the masked ones last: they wait for `all` of their seed
    ALL,
    Variant("mean", {"video_input": "mean"}),
    Variant("residual", {"video_input": "residual"}),
    Variant("local frames only", {"video_input": "all"}, local=True),
    Variant("all+mask", {**_ALL, "use_mask": True, "use_mvm": False}, masked=True),
    Variant("all+mask+mvm", {**_ALL, "use_mask": True, "use_mvm": True}, masked=True),
)


@dataclass(frozen=True)
class Plan:
    """What all runs share. base: the recipe below theirs. limit: items asked of each task, None for all.

    long_frames: frames looked at of a 64-frame clip. options: `key=value`, over every recipe.
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
        """Steps between checkpoints."""
        return max(1, round((self.mask_after or 1.0) * self.steps / PARTS))

    @property
    def switch(self) -> int:
        """The step, one with a checkpoint, after which masked variants go on from `all` of their seed; 0: none."""
        return max(1, round(self.mask_after * self.steps / self.every)) * self.every if self.mask_after else 0

    @property
    def logging_steps(self) -> int:
        """Steps that a line of the log, and so a time, is the mean of."""
        return max(1, min(25, self.steps // 40))

    @cached_property
    def settings(self) -> DictConfig:
        """The base, resolved, with the options over it. Raises UserError."""
        return load_config(self.base, self.options)

    @cached_property
    def video_frames(self) -> dict[str, int]:
        """Frames of each data set of clips; that of 64-frame clips, if the world has one, is always among them."""
        sets = {str(name): entry for name, entry in self.settings.datasets.items() if isinstance(entry, DictConfig)}
        long = [name for name, entry in sets.items() if RARE.corpus in str(entry.get("anno_path"))]
        if self.has_long and not long:
            long = [Path(RARE.corpus).name]
        frames = {name: int(entry.num_frames) for name, entry in sets.items() if "num_frames" in entry}
        return frames | dict.fromkeys(long, self.long_frames)

    @cached_property
    def short_frames(self) -> int:
        """Frames looked at of a clip of the usual length."""
        entries = [entry for entry in self.settings.datasets.values() if isinstance(entry, DictConfig)]
        return max(entry.num_frames for entry in entries if "num_frames" in entry and RARE.corpus not in str(entry))

    @cached_property
    def has_long(self) -> bool:
        """Whether both worlds have 64-frame clips (stllm toy --long)."""
        return (self.world / "vc2" / LONG_PATH).is_file() and RARE.benchmark in self.slugs

    @cached_property
    def slugs(self) -> list[str]:
        """The test world's tasks, by their files: those that the base trains, and the rare event."""
        learned = [
            str(entry.get("anno_path"))
            for entry in self.settings.datasets.values()
            if isinstance(entry, DictConfig) and entry.get("sample_ratio") != 0
        ]
        left_out = {task.benchmark for task in TASKS if not any(f"/{task.corpus}/" in path for path in learned)}
        files = (self.test_world / "mvbench" / "json").glob("*.json")
        return sorted(file.stem for file in files if file.stem not in left_out)

    def frames(self, variant: Variant, number: int) -> int:
        """How many of that many frames the variant is given."""
        return min(number, self.residual_size) if variant.local else number

    def tokens(self, variant: Variant, number: int) -> int:
        """Visual tokens that enter the language model of a clip of that many frames, without masking."""
        config = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        build = video_inputs.get(variant.settings["video_input"])
        video_input: Any = build(width=1, bottleneck=1, residual_size=self.residual_size)
        return int(video_input.num_tokens(self.frames(variant, number), config["num_query_tokens"]))

    def folder(self, variant: Variant, seed: int) -> Path:
        """Of one run."""
        return self.work / f"{variant.slug}-{seed}"


def recipe(plan: Plan, variant: Variant, seed: int) -> dict[str, Any]:
    """The run's YAML. All runs of a seed see the same clips in the same order."""
    datasets: dict[str, Any] = {
        name: {"num_frames": plan.frames(variant, number)} for name, number in plan.video_frames.items()
    }
    for name in set(datasets).difference(map(str, plan.settings.datasets)):
        datasets[name] |= {"anno_path": LONG_PATH, "crop": "center", "multi_turn": True, "sample_ratio": 1}
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
            "save_total_limit": None if variant is ALL else 1,  # of `all` one is gone on from
        },
    }


def tested(plan: Plan) -> dict[str, dict[str, float]]:
    """By task's name: `items` asked, and `chance`, percent right by guessing."""
    found = {}
    for slug in plan.slugs:
        file = plan.test_world / "mvbench" / "json" / f"{slug}.json"
        items = json.loads(file.read_text(encoding="utf-8"))[: plan.limit]
        chance = statistics.mean(100 / len(item["candidates"]) for item in items)
        if slug != RARE.benchmark or plan.has_long:
            task = task_of(file)
            assert isinstance(task, MVBenchTask), file  # the toy world's are MVBench's own
            found[task.name] = {"items": len(items), "chance": chance}
    return found
