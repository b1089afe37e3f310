"""The tiny vision encoder and Q-Former under linear heads, which say what a frame shows and are thrown away afterwards.

Each patch says what it shows; of the queries, the first take a shape each and the next one the background.
B frames, P patches, C encoder width, K queries, Q their width, H shapes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stllm.models.st_llm import STLLM, config_of
from stllm.toy.scenes import SHAPES
from stllm.toy.seeing import NUM_COLORS, NUM_PATTERNS, NUM_PLACES, NUM_SHAPES, Seen

NOTHING = 0.1  # weight of patches that show no thing: most of them


class SeeingHeads(nn.Module):
    """What is seen, read off the encoder's patches and the Q-Former's queries by one linear layer each."""

    def __init__(self, *, width: int, query_width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, NUM_COLORS + NUM_SHAPES + 2)
        self.slots = nn.ModuleList(_normed(query_width, NUM_COLORS + 2 * NUM_PLACES) for _ in SHAPES)
        self.patterns = nn.ModuleList([nn.Linear(width, NUM_PATTERNS), _normed(query_width, NUM_PATTERNS)])

    def forward(self, features: Tensor, queries: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """The loss, and the share of frames whose things all have their right colors.

        features: (B, 1+P, C); queries: (B, K, Q). Both results are scalars.
        """
        colors, shapes, places = self.patch(features[:, 1:]).split([NUM_COLORS, NUM_SHAPES, 2], dim=-1)
        there = seen.colors > 0  # (B, P)
        named = F.cross_entropy(colors.transpose(1, 2), seen.colors, reduction="none")
        named = named + F.cross_entropy(shapes.transpose(1, 2), seen.shapes, reduction="none")
        loss = _mean(named, there + NOTHING * ~there)
        loss = loss + _mean(F.mse_loss(places, seen.places, reduction="none").mean(-1), there)
        found = torch.stack([slot(queries[:, number]) for number, slot in enumerate(self.slots)], dim=1)  # (B, H, ...)
        slot_colors, *slot_places = found.split([NUM_COLORS, NUM_PLACES, NUM_PLACES], dim=-1)
        known = seen.slot_colors > 0  # (B, H)
        loss = loss + F.cross_entropy(slot_colors.transpose(1, 2), seen.slot_colors) * len(self.slots) / 2
        for axis, scores in enumerate(slot_places):
            placed = F.cross_entropy(scores.transpose(1, 2), seen.slot_places[..., axis], reduction="none")
            loss = loss + _mean(placed, known) / 2
        of_patches, of_queries = self.patterns
        for patterns in (of_patches(features[:, 0]), of_queries(queries[:, len(self.slots)])):
            loss = loss + F.cross_entropy(patterns, seen.patterns) / 4
        return loss, (slot_colors.argmax(-1) == seen.slot_colors).all(1).float().mean()


class SeeingModel(nn.Module):
    """An ST-LLM's vision encoder and Q-Former, and heads. model: gives the two parts, under their own names."""

    def __init__(self, model: STLLM) -> None:
        super().__init__()
        self.config = config = config_of(model)
        self.vision_encoder, self.qformer = model.vision_encoder, model.qformer
        self.heads = SeeingHeads(width=config.vision_config["embed_dim"], query_width=config.qformer_config.hidden_size)

    def forward(
        self,
        *,
        pixel_values: Tensor,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor,
        seen: Mapping[str, Tensor],
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """loss and accuracy, the share of frames whose things all have their right colors: scalars.

        pixel_values: (B, 1, 3, S, S), normalised; qformer_*: (B, L), for a Q-Former that reads text. seen: the parts of
        `Seen`. labels: (B,), one a frame. num_items_in_batch: frames of the whole step, of which these are a share.
        """
        features = self.vision_encoder(pixel_values)  # (B, 1, 1+P, C)
        queries = self.qformer(features, qformer_input_ids, qformer_attention_mask)  # (B, 1, K, Q)
        loss, accuracy = self.heads(features[:, 0], queries[:, 0], Seen(**seen))
        share = 1 if num_items_in_batch is None else len(labels) / num_items_in_batch
        return {"loss": loss * share, "accuracy": accuracy}


def _normed(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean; 0 where no weight is, as in a batch of empty frames."""
    return (values * weights).sum() / weights.sum().clamp(min=1)
