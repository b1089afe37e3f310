"""The vision stage of the tiny model (`run.task: toy_seeing`): encoder and Q-Former learn from single frames.

The published encoder and Q-Former were trained by EVA-CLIP and BLIP-2. Fresh ones learn almost nothing through a
language model in the time that a laptop has. Here they are trained with auxiliary heads that are discarded. Every frame
is drawn by its key when it is requested, so that none is used twice. The run's folder holds the two parts, which
`model.ckpt` then names on top of a language model.

B frames, P patches, C encoder width, K queries, Q their width, H shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stllm.common.errors import UserError
from stllm.common.registry import tasks
from stllm.common.schema import ROOTS
from stllm.datasets.collate import stacked
from stllm.datasets.mixture import Mixture, MixturePart, MixtureSampler
from stllm.datasets.samples import LengthCheck, Sample, SampleKey
from stllm.models.build import build_audited, config_from_settings
from stllm.models.settings import model_section
from stllm.models.st_llm import STLLM, config_of
from stllm.processors.transforms import EvalTransform
from stllm.toy.questions import Generator, pick
from stllm.toy.scenes import COLORS, PATTERNS, SHAPES, UNITS, Scene, follow, nearest_colors, render
from stllm.toy.tasks import PICTURES, RARE, TASKS, split_of

EPOCH = 100_000  # frames; the next epoch's are others
PICTURE_SHARE = 0.5  # of the frames; the others are of clips
LEAST_RADIUS = 6.0  # units: a patch this close to a thing's middle counts as showing it
NUM_COLORS = 1 + len(COLORS)  # 0: no thing
NUM_SHAPES = 1 + len(SHAPES)
NUM_PATTERNS, NUM_PLACES = len(PATTERNS), 3  # x, y and radius
PLACE_UNITS, RADIUS_UNITS = 8.0, 4.0  # of a place and of a radius, so that both vary alike
NOTHING = 0.1  # weight of patches that show no thing, which are most of them
TAUGHT = ("vision_encoder.", "qformer.")


# ---- frames ---------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Labels of frames.

    Of patches: colors and shapes (B, P), numbers of their tables from 1 on, 0 for nothing; places (B, P, 3), x and y of
    the thing's middle, from the picture's, in PLACE_UNITS, and its radius in RADIUS_UNITS. Of slots, one a shape, since
    no scene has two of one: slot_colors (B, H), slot_places (B, H, 3). patterns: (B,), of the background.
    """

    colors: Tensor
    shapes: Tensor
    places: Tensor
    slot_colors: Tensor
    slot_places: Tensor
    patterns: Tensor


@dataclass(kw_only=True)
class SeenFrame(Sample):
    """One frame: pixel_values (1, 3, S, S), and its labels, without B."""

    seen: Seen


class SeenFrames:
    """A data set without files. size, patch: pixels a side."""

    name = "toy_seeing"
    media: str | None = "image"

    def __init__(self, *, size: int, patch: int) -> None:
        self.size, self.grid = size, size // patch
        self.transform = EvalTransform(size)

    def __len__(self) -> int:
        return EPOCH

    def load(self, key: SampleKey, generator: Generator, check: LengthCheck | None = None) -> SeenFrame:
        """A frame drawn with the generator; the key only names it. It has no text to check."""
        task = PICTURES if generator.random() < PICTURE_SHARE else pick(generator, (*TASKS, RARE))
        while split_of(scene := task.make(generator).scene) != "train":
            pass
        time = generator.random(1)
        frame = render(scene, times=time, size=self.size, generator=generator)[0]
        return SeenFrame(
            key,
            f"frame {key.index} of epoch {key.epoch}",
            (),
            self.media,
            pixel_values=self.transform(frame)[None],
            seen=labels(scene, time, self.grid),
        )


def collate(frames: Sequence[SeenFrame]) -> dict[str, Any]:
    """Arguments of `SeeingModel.forward` for a batch of frames, and names and failures; a DataLoader's `collate_fn`."""
    seen = Seen(*(torch.stack(part) for part in zip(*(frame.seen for frame in frames), strict=True)))
    return {
        **stacked(frames),  # pixel_values: (B, 1, 3, S, S)
        "seen": seen._asdict(),
        "labels": seen.patterns,
        "names": [frame.name for frame in frames],
        "failures": [failure for frame in frames for failure in frame.failures],
    }


def labels(scene: Scene, time: np.ndarray, grid: int) -> Seen:
    """Labels of the frame at a time, (1,), a part of the clip; without B."""
    middles = (np.arange(grid) + 0.5) * (UNITS / grid)
    across, down = np.meshgrid(middles, middles)
    colors, shapes = np.zeros((grid, grid), int), np.zeros((grid, grid), int)
    places = np.zeros((grid, grid, NUM_PLACES), np.float32)
    slot_colors, slot_places = np.zeros(len(SHAPES), int), np.zeros((len(SHAPES), NUM_PLACES), np.float32)
    for thing in scene.things:
        track = follow(thing, time)
        if track.opacity[0] <= 0.5:
            continue
        color = 1 + int(nearest_colors(track.color)[0])
        slot = list(SHAPES).index(thing.shape)
        x, y, radius = track.x[0], track.y[0], track.radius[0]
        place = (x - UNITS / 2) / PLACE_UNITS, (y - UNITS / 2) / PLACE_UNITS, radius / RADIUS_UNITS
        covered = np.hypot(across - x, down - y) < max(radius, LEAST_RADIUS)
        colors[covered], shapes[covered], places[covered] = color, 1 + slot, place
        slot_colors[slot], slot_places[slot] = color, place
    background = scene.background if scene.cut is None or time[0] < scene.cut.time else scene.cut.background
    pattern = np.array(list(PATTERNS).index(background.pattern))
    parts = (colors.ravel(), shapes.ravel(), places.reshape(-1, NUM_PLACES), slot_colors, slot_places, pattern)
    return Seen(*map(torch.as_tensor, parts))


# ---- heads ----------------------------------------------------------------------------------------------------------


class SeeingHeads(nn.Module):
    """Linear layers that predict the labels from the encoder's patches and the Q-Former's queries.

    Of the queries, the first predict one shape each and the next one the background.
    """

    def __init__(self, *, width: int, query_width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, NUM_COLORS + NUM_SHAPES + NUM_PLACES)
        self.slots = nn.ModuleList(_normed(query_width, NUM_COLORS + NUM_PLACES) for _ in SHAPES)
        self.patterns = nn.ModuleList([nn.Linear(width, NUM_PATTERNS), _normed(query_width, NUM_PATTERNS)])

    def forward(self, features: Tensor, queries: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """The loss, and the share of frames whose things all have their right colors.

        features: (B, 1+P, C); queries: (B, K, Q). Both results are scalars.
        """
        colors, shapes, places = self.patch(features[:, 1:]).split([NUM_COLORS, NUM_SHAPES, NUM_PLACES], dim=-1)
        there = seen.colors > 0  # (B, P)
        named = F.cross_entropy(colors.transpose(1, 2), seen.colors, reduction="none")
        named = named + F.cross_entropy(shapes.transpose(1, 2), seen.shapes, reduction="none")
        loss = _mean(named, there + NOTHING * ~there)
        loss = loss + _mean(F.mse_loss(places, seen.places, reduction="none").mean(-1), there)
        found = torch.stack([slot(queries[:, number]) for number, slot in enumerate(self.slots)], dim=1)  # (B, H, ...)
        slot_colors, slot_places = found.split([NUM_COLORS, NUM_PLACES], dim=-1)
        known = seen.slot_colors > 0  # (B, H)
        loss = loss + F.cross_entropy(slot_colors.transpose(1, 2), seen.slot_colors) * len(self.slots) / 2
        loss = loss + _mean(F.mse_loss(slot_places, seen.slot_places, reduction="none").mean(-1), known)
        of_patches, of_queries = self.patterns
        for patterns in (of_patches(features[:, 0]), of_queries(queries[:, len(self.slots)])):
            loss = loss + F.cross_entropy(patterns, seen.patterns) / 4
        return loss, (slot_colors.argmax(-1) == seen.slot_colors).all(1).float().mean()


class SeeingModel(nn.Module):
    """The vision encoder and Q-Former of an ST-LLM under their own names, and heads. model: has the two parts."""

    def __init__(self, model: STLLM) -> None:
        super().__init__()
        self.config = config = config_of(model)
        self.vision_encoder, self.qformer = model.vision_encoder, model.qformer
        self.heads = SeeingHeads(width=config.vision_config["embed_dim"], query_width=config.qformer_config.hidden_size)

    def forward(
        self,
        *,
        pixel_values: Tensor,
        seen: Mapping[str, Tensor],
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """loss and accuracy, the share of frames whose things all have their right colors: scalars.

        pixel_values: (B, 1, 3, S, S), bytes. seen: the parts of `Seen`. labels: (B,), one a frame.
        num_items_in_batch: frames of the whole step, of which these are a share.
        """
        features = self.vision_encoder(pixel_values)  # (B, 1, 1+P, C)
        queries = self.qformer(features)  # (B, 1, K, Q)
        loss, accuracy = self.heads(features[:, 0], queries[:, 0], Seen(**seen))
        share = 1 if num_items_in_batch is None else len(labels) / num_items_in_batch
        return {"loss": loss * share, "accuracy": accuracy}


def _normed(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean; 0 where no weight is, as in a batch of empty frames."""
    return (values * weights).sum() / weights.sum().clamp(min=1)


# ---- the task -------------------------------------------------------------------------------------------------------


@tasks.register("toy_seeing")
@dataclass
class ToySeeingTask:
    """Training on single frames, drawn as they are asked for."""

    cfg: DictConfig
    mixture: Mixture

    runner = "trainer"
    processor = None  # nothing is asked, so there are no prompts

    @classmethod
    def from_config(cls, cfg: DictConfig, *, seed: int) -> "ToySeeingTask":
        """The task of a checked configuration. Raises UserError for a model or settings that it cannot train with."""
        config = config_from_settings(model_section(cfg))
        if not config.has_qformer or config.num_query_tokens <= len(SHAPES):
            raise UserError(
                f"run.task toy_seeing needs a Q-Former of more than {len(SHAPES)} queries, one a shape and one for the "
                f"background: set model.has_qformer=True and model.num_query_token={len(SHAPES) + 1} or more"
            )
        if config.qformer_text_input:
            raise UserError(
                "run.task toy_seeing asks no questions, which this Q-Former would read: set "
                "model.qformer_text_input=False"
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
        frames = SeenFrames(
            size=config.vision_config["image_size"],
            patch=config.vision_config["patch_size"],
        )
        return cls(cfg, Mixture([MixturePart(frames)], seed=seed, max_tries=cfg.run.max_tries))

    def build_model(
        self, *, device: torch.device | str, dtype: torch.dtype, trained_dtype: torch.dtype | None, division: Any = None
    ) -> SeeingModel:
        """The two parts with fresh heads; all of it trains. division: not used, so small a model is divided later."""
        model, _ = build_audited(self.cfg, device=device, dtype=dtype, trained_dtype=trained_dtype)
        return SeeingModel(model).to(device=device, dtype=trained_dtype or dtype)

    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> MixtureSampler:
        """The frames of each batch; batch_size: of one process."""
        return MixtureSampler(self.mixture, batch_size=batch_size, rank=rank, world_size=world_size)

    def collator(self) -> Any:
        """Frames to model arguments."""
        return collate

    def export(self, model: nn.Module, folder: Path, *, sharded: bool) -> None:
        """Keep in the trained model's folder only the two parts, without heads, and their configuration."""
        assert isinstance(model, SeeingModel)
        path = folder / "model.safetensors"
        # copies: the file that they come from is written over
        learned = {name: value.clone() for name, value in load_file(path).items() if name.startswith(TAUGHT)}
        save_file(learned, path, metadata={"format": "pt"})
        model.config.save_pretrained(folder)
