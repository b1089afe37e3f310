"""The vision stage of the tiny model (`run.task: toy_seeing`): it trains the vision encoder and the Q-Former.

The published encoder and Q-Former were trained by EVA-CLIP and BLIP-2. Randomly initialised ones learn almost nothing
through a language model within the hours of a laptop. Here they learn from single frames, with auxiliary heads that are
discarded. Each frame is drawn when it is requested, so no frame is used twice. The output folder holds the weights of
the two parts. A later stage reads them with `model.ckpt`, together with a language model.

Letters: B frames, P patches, C encoder width, K queries, Q query width, H shapes, S height and width in pixels.
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

EPOCH = 100_000  # frames; each epoch has other frames
PICTURE_SHARE = 0.5  # share of frames from pictures; the others are from clips
LEAST_RADIUS = 6.0  # units: a patch shows a thing if the patch's center is this close to the thing's center
NUM_COLORS = 1 + len(COLORS)  # 0: no thing
NUM_SHAPES = 1 + len(SHAPES)
NUM_PATTERNS, NUM_PLACES = len(PATTERNS), 3  # x, y and radius
PLACE_UNITS, RADIUS_UNITS = 8.0, 4.0  # scales of places and radii in the loss, so that both have similar variance
NOTHING = 0.1  # weight of patches without a thing, which are the majority
TAUGHT = ("vision_encoder.", "qformer.")  # beginnings of the keys of the trained weights


# ---- frames ---------------------------------------------------------------------------------------------------------


class FrameLabels(NamedTuple):
    """Labels of a batch of frames.

    Labels of patches: colors and shapes (B, P), as index in their table plus 1, 0 for no thing; places (B, P, 3): x and
    y of the thing's center from the picture's center, in PLACE_UNITS, and its radius in RADIUS_UNITS.
    Labels of shapes (a scene has at most one thing of each shape): slot_colors (B, H) and slot_places (B, H, 3).
    patterns: (B,), index of the background's pattern.
    """

    colors: Tensor
    shapes: Tensor
    places: Tensor
    slot_colors: Tensor
    slot_places: Tensor
    patterns: Tensor


@dataclass(kw_only=True)
class ToyFrame(Sample):
    """A frame with pixel_values (1, 3, S, S). truth: its labels, without the dimension B."""

    truth: FrameLabels


class ToyFrames:
    """A data set of frames that are drawn on request. size, patch: side of a frame and of a patch in pixels."""

    name = "toy_seeing"
    media: str | None = "image"

    def __init__(self, *, size: int, patch: int) -> None:
        self.size, self.grid = size, size // patch
        self.transform = EvalTransform(size)

    def __len__(self) -> int:
        return EPOCH

    def load(self, key: SampleKey, generator: Generator, check: LengthCheck | None = None) -> ToyFrame:
        """Draw a frame with the generator. `key` only names the frame; `check` is ignored."""
        task = PICTURES if generator.random() < PICTURE_SHARE else pick(generator, (*TASKS, RARE))
        while split_of(scene := task.make(generator).scene) != "train":
            pass
        time = generator.random(1)
        frame = render(scene, times=time, size=self.size, generator=generator)[0]
        return ToyFrame(
            key,
            f"frame {key.index} of epoch {key.epoch}",
            (),
            self.media,
            pixel_values=self.transform(frame)[None],
            truth=labels(scene, time, self.grid),
        )


def collate(frames: Sequence[ToyFrame]) -> dict[str, Any]:
    """Convert frames to the arguments of `SeeingModel.forward`, `names` and `failures`, as a `collate_fn`."""
    truth = FrameLabels(*(torch.stack(part) for part in zip(*(frame.truth for frame in frames), strict=True)))
    return {
        **stacked(frames),  # pixel_values: (B, 1, 3, S, S)
        "truth": truth._asdict(),
        "labels": truth.patterns,
        "names": [frame.name for frame in frames],
        "failures": [failure for frame in frames for failure in frame.failures],
    }


def labels(scene: Scene, time: np.ndarray, grid: int) -> FrameLabels:
    """Compute the labels of one frame, without the dimension B. time: (1,), from 0 to 1. grid: patches per side."""
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
    return FrameLabels(*map(torch.as_tensor, parts))


# ---- heads ----------------------------------------------------------------------------------------------------------


class SeeingHeads(nn.Module):
    """Linear layers that predict the labels from the encoder's patches and the Q-Former's queries.

    The first H queries predict one shape each; the next query predicts the background.
    """

    def __init__(self, *, width: int, query_width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, NUM_COLORS + NUM_SHAPES + NUM_PLACES)
        self.slots = nn.ModuleList(_normed(query_width, NUM_COLORS + NUM_PLACES) for _ in SHAPES)
        self.patterns = nn.ModuleList([nn.Linear(width, NUM_PATTERNS), _normed(query_width, NUM_PATTERNS)])

    def forward(self, features: Tensor, queries: Tensor, truth: FrameLabels) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy: the share of frames in which all colors are correct. Both are scalars.

        features: (B, 1+P, C). queries: (B, K, Q).
        """
        colors, shapes, places = self.patch(features[:, 1:]).split([NUM_COLORS, NUM_SHAPES, NUM_PLACES], dim=-1)
        there = truth.colors > 0  # (B, P)
        named = F.cross_entropy(colors.transpose(1, 2), truth.colors, reduction="none")
        named = named + F.cross_entropy(shapes.transpose(1, 2), truth.shapes, reduction="none")
        loss = _mean(named, there + NOTHING * ~there)
        loss = loss + _mean(F.mse_loss(places, truth.places, reduction="none").mean(-1), there)
        found = torch.stack([slot(queries[:, number]) for number, slot in enumerate(self.slots)], dim=1)  # (B, H, ...)
        slot_colors, slot_places = found.split([NUM_COLORS, NUM_PLACES], dim=-1)
        known = truth.slot_colors > 0  # (B, H)
        loss = loss + F.cross_entropy(slot_colors.transpose(1, 2), truth.slot_colors) * len(self.slots) / 2
        loss = loss + _mean(F.mse_loss(slot_places, truth.slot_places, reduction="none").mean(-1), known)
        of_patches, of_queries = self.patterns
        for patterns in (of_patches(features[:, 0]), of_queries(queries[:, len(self.slots)])):
            loss = loss + F.cross_entropy(patterns, truth.patterns) / 4
        return loss, (slot_colors.argmax(-1) == truth.slot_colors).all(1).float().mean()


class SeeingModel(nn.Module):
    """The vision encoder and the Q-Former of `model`, with heads. The parts keep their names in the checkpoint."""

    def __init__(self, model: STLLM) -> None:
        super().__init__()
        self.config = config = config_of(model)
        self.vision_encoder, self.qformer = model.vision_encoder, model.qformer
        self.heads = SeeingHeads(width=config.vision_config["embed_dim"], query_width=config.qformer_config.hidden_size)

    def forward(
        self,
        *,
        pixel_values: Tensor,
        truth: Mapping[str, Tensor],
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss` and `accuracy`, the share of frames in which all colors are correct, as scalars.

        pixel_values: (B, 1, 3, S, S) uint8. truth: the fields of `FrameLabels`. labels: (B,), by which the Trainer
        counts the frames. num_items_in_batch: frames of the whole step; the loss is the share of these frames in it.
        """
        features = self.vision_encoder(pixel_values)  # (B, 1, 1+P, C)
        queries = self.qformer(features)  # (B, 1, K, Q)
        loss, accuracy = self.heads(features[:, 0], queries[:, 0], FrameLabels(**truth))
        share = 1 if num_items_in_batch is None else len(labels) / num_items_in_batch
        return {"loss": loss * share, "accuracy": accuracy}


def _normed(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean; 0 if all weights are 0, as for a batch of empty frames."""
    return (values * weights).sum() / weights.sum().clamp(min=1)


# ---- the task -------------------------------------------------------------------------------------------------------


@tasks.register("toy_seeing")
@dataclass
class ToySeeingTask:
    """The training task of the vision stage."""

    cfg: DictConfig
    mixture: Mixture

    runner = "trainer"
    processor = None  # the task has no prompts

    @classmethod
    def from_config(cls, cfg: DictConfig, *, seed: int) -> "ToySeeingTask":
        """Build the task of a checked configuration. Raises UserError for a model or settings that do not fit it."""
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
        frames = ToyFrames(
            size=config.vision_config["image_size"],
            patch=config.vision_config["patch_size"],
        )
        return cls(cfg, Mixture([MixturePart(frames)], seed=seed, max_tries=cfg.run.max_tries))

    def build_model(
        self, *, device: torch.device | str, dtype: torch.dtype, trained_dtype: torch.dtype | None, division: Any = None
    ) -> SeeingModel:
        """Build the two parts with new heads. All weights are trained.

        division: ignored, because such a small model is divided among processes after it is built.
        """
        model, _ = build_audited(self.cfg, device=device, dtype=dtype, trained_dtype=trained_dtype)
        return SeeingModel(model).to(device=device, dtype=trained_dtype or dtype)

    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> MixtureSampler:
        """Return the sampler of the batches. batch_size: frames per process."""
        return MixtureSampler(self.mixture, batch_size=batch_size, rank=rank, world_size=world_size)

    def collator(self) -> Any:
        """Return the `collate_fn` of the task."""
        return collate

    def export(self, model: nn.Module, folder: Path, *, sharded: bool) -> None:
        """Remove the heads from the model in `folder`, and write the configuration."""
        assert isinstance(model, SeeingModel)
        path = folder / "model.safetensors"
        # clone: the file that the tensors come from is overwritten
        learned = {name: value.clone() for name, value in load_file(path).items() if name.startswith(TAUGHT)}
        save_file(learned, path, metadata={"format": "pt"})
        model.config.save_pretrained(folder)
