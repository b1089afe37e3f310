"""Seeing the toy world: the tiny vision encoder's and Q-Former's own stage, before any language.

The published ones arrive with EVA-CLIP's and BLIP-2's training behind them; fresh ones learn almost nothing through a
language model in the time a laptop has. The run's folder holds these two parts, to be named as `model.ckpt` over a
language model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from stllm.common.errors import UserError
from stllm.common.registry import tasks
from stllm.common.schema import ROOTS
from stllm.datasets.mixture import Mixture, MixtureSampler, Source
from stllm.models.build import build_audited, config_from_settings
from stllm.models.configuration import STLLMConfig
from stllm.models.settings import model_section
from stllm.toy.heads import SeeingModel
from stllm.toy.scenes import SHAPES
from stllm.toy.seeing import SeenFrames, collate

TAUGHT = ("vision_encoder.", "qformer.")


@tasks.register("toy_seeing")
@dataclass
class ToySeeingTask:
    """What is learned: what single frames show, drawn as they are asked for."""

    cfg: DictConfig
    mixture: Mixture

    runner = "trainer"
    processor = None  # nothing is asked, so there are no prompts

    @classmethod
    def from_config(cls, cfg: DictConfig, *, seed: int) -> "ToySeeingTask":
        """The task of a checked configuration. Raises UserError for a model that this cannot be learned with."""
        config = config_from_settings(model_section(cfg))
        _check(cfg, config)
        frames = SeenFrames(
            size=config.vision_config["image_size"],
            patch=config.vision_config["patch_size"],
            vocab_size=config.qformer_config.vocab_size,
        )
        return cls(cfg, Mixture([Source(frames)], seed=seed, max_tries=cfg.run.max_tries))

    def build_model(
        self, *, device: torch.device | str, dtype: torch.dtype, trained_dtype: torch.dtype | None
    ) -> SeeingModel:
        """The two parts under fresh heads; all of it trains."""
        model, _ = build_audited(self.cfg, device=device, dtype=dtype, trained_dtype=trained_dtype)
        return SeeingModel(model).to(device=device, dtype=trained_dtype or dtype)

    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> MixtureSampler:
        """Which frames make which batch; batch_size: of one process."""
        return MixtureSampler(self.mixture, batch_size=batch_size, rank=rank, world_size=world_size)

    def collator(self) -> Any:
        """Frames to model arguments."""
        return collate

    def export(self, model: nn.Module, folder: Path, *, sharded: bool) -> None:
        """Leaves in the trained model's folder its two parts alone, and their configuration."""
        assert isinstance(model, SeeingModel)
        path = folder / "model.safetensors"
        # copies: the file that they come from is written over
        learned = {name: value.clone() for name, value in load_file(path).items() if name.startswith(TAUGHT)}
        save_file(learned, path, metadata={"format": "pt"})
        model.config.save_pretrained(folder)


def _check(cfg: DictConfig, config: STLLMConfig) -> None:
    """Raises UserError for what this task cannot do with the configuration."""
    if not config.has_qformer or config.num_query_tokens <= len(SHAPES):
        raise UserError(
            f"run.task toy_seeing needs a Q-Former of more than {len(SHAPES)} queries, one a shape and one for the "
            f"background: set model.has_qformer=True and model.num_query_token={len(SHAPES) + 1} or more"
        )
    if config.freeze_vit or config.freeze_qformer:
        raise UserError(
            "run.task toy_seeing teaches the vision encoder and the Q-Former, but one of them is frozen: set "
            "model.freeze_vit=False and model.freeze_qformer=False"
        )
    if cfg.run.get("gradient_checkpointing") or cfg.run.get("activation_checkpointing"):
        raise UserError("run.task toy_seeing has no activation checkpointing: leave out run.gradient_checkpointing")
    if listed := [name for name in cfg.datasets if name not in ROOTS]:
        raise UserError(f"run.task toy_seeing draws its frames itself: found datasets.{listed[0]}, leave it out")
