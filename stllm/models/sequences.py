"""Puts visual tokens where the prompt's placeholder stands: the one path for training, chat and benchmarks.

B samples, L text positions, N visual tokens of a sample, S positions of the joined sequence, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

VISUAL_TOKEN_ID = -200  # stands in input_ids for the whole visual block; in no vocabulary
IGNORE_INDEX = -100  # labels that carry no loss


@dataclass(frozen=True)
class JoinedSequence:
    """inputs_embeds (B, S, D); attention_mask (B, S); labels (B, S) or None; visual_start (B,) position in S."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    visual_start: Tensor

    def visual_positions(self, num_tokens: int) -> Tensor:
        """Positions of the visual tokens in S, (B, num_tokens)."""
        return self.visual_start[:, None] + torch.arange(num_tokens, device=self.visual_start.device)


def join_visual_tokens(
    text_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    visual_tokens: Sequence[Tensor] | None,
    *,
    labels: Tensor | None = None,
    padding_side: str = "right",
) -> JoinedSequence:
    """Replaces each row's placeholder by that row's visual tokens.

    text_embeds: (B, L, D), embedded `input_ids` (what stands at the placeholder is not used).
    input_ids, attention_mask, labels: (B, L), padded on either side; padding embeddings are kept as they are.
    visual_tokens: B tensors (N_b, D); None for text alone.
    Raises ValueError when a row has no placeholder or several, or when there is one but nothing to put there.
    """
    placeholders = input_ids == VISUAL_TOKEN_ID
    if visual_tokens is None:
        if placeholders.any():
            raise ValueError("a prompt has a place for a video or image, but no visual tokens were given")
        return JoinedSequence(text_embeds, attention_mask, labels, torch.zeros_like(input_ids[:, 0]))
    if not (placeholders.sum(dim=1) == 1).all():
        counts = placeholders.sum(dim=1).tolist()
        raise ValueError(f"each prompt needs exactly one place for its visual tokens, found {counts} in this batch")
    starts = placeholders.int().argmax(dim=1)  # (B,)
    embeds, masks, row_labels = [], [], []
    for row, (start, visual) in enumerate(zip(starts.tolist(), visual_tokens, strict=True)):
        embeds.append(_splice(text_embeds[row], start, visual.to(text_embeds)))
        masks.append(_splice(attention_mask[row], start, attention_mask.new_ones(len(visual))))
        if labels is not None:
            row_labels.append(_splice(labels[row], start, labels.new_full((len(visual),), IGNORE_INDEX)))
    lengths = torch.tensor([len(row) for row in embeds], device=starts.device)
    shift = lengths.max() - lengths if padding_side == "left" else torch.zeros_like(lengths)

    def pad(rows: list[Tensor], value: float) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)

    joined_labels = pad(row_labels, IGNORE_INDEX) if labels is not None else None
    return JoinedSequence(pad(embeds, 0.0), pad(masks, 0), joined_labels, starts + shift)


def _splice(row: Tensor, start: int, middle: Tensor) -> Tensor:
    return torch.cat([row[:start], middle, row[start + 1 :]])
