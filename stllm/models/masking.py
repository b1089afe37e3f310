"""Dynamic masking of visual tokens and the masked video modelling (MVM) loss, both for training only.

Masked tokens are removed from the sequence, which makes training faster. The MVM loss pulls the hidden states of the
kept tokens towards the states that they have in an unmasked pass. Source: paper section 3.3.

Letters in shapes: B clips, N visual tokens of a clip, V kept tokens of the batch, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def draw_mask_rate(
    *, mean: float, std: float, min: float, max: float, generator: torch.Generator | None = None
) -> float:
    """Draw the share of visual tokens to drop from Normal(mean, std), clipped to [min, max]."""
    return (torch.randn((), generator=generator) * std + mean).clamp(min, max).item()


def draw_dropped(
    batch_size: int, num_tokens: int, *, rate: float, bucket: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the tokens to drop: (B, N) bool, true for int(rate*N) random tokens of each row.

    bucket: rounds the number of kept tokens to the nearest multiple of this number (at least one multiple, at most N).
    """
    order = torch.rand(batch_size, num_tokens, generator=generator).argsort(dim=1)
    kept = num_tokens - int(rate * num_tokens)
    kept = min(max((kept + bucket // 2) // bucket, 1) * bucket, num_tokens)
    return order < num_tokens - kept  # a rank below the count drops exactly that many in every row


class MVMDecoder(nn.Module):
    """Linear(D, D) and LayerNorm(D), applied to the masked pass's hidden states before the MVM loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Decode hidden states (..., D). Returns the same shape."""
        return self.norm(self.head(hidden))


def mvm_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 2 - 2*cos(student, teacher) over the kept tokens, a float32 scalar. student, teacher: (V, D).

    student: states from the masked pass. teacher: states of the same tokens from the unmasked pass.
    """
    return (2 - 2 * F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()
