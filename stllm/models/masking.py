"""Dynamic masking of visual tokens and the masked video modelling (MVM) loss; training only.

Source: paper section 3.3. B clips, N visual tokens of a clip, V kept ones of all, D width. Dropped tokens are absent
from the sequence, which makes training faster; the loss pulls the kept ones' hidden states towards those of an
unmasked pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def draw_mask_rate(
    *, mean: float, std: float, min: float, max: float, generator: torch.Generator | None = None
) -> float:
    """Draw the share of visual tokens to drop, ~ Normal(mean, std) clipped to [min, max]."""
    return (torch.randn((), generator=generator) * std + mean).clamp(min, max).item()


def draw_dropped(
    batch_size: int, num_tokens: int, *, rate: float, bucket: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Draw what is dropped, (B, N) bool: int(rate*N) tokens in each row, each with equal chance.

    bucket: the number of tokens kept is rounded to the nearest multiple of it, from one multiple up to N.
    """
    order = torch.rand(batch_size, num_tokens, generator=generator).argsort(dim=1)
    kept = num_tokens - int(rate * num_tokens)
    kept = min(max((kept + bucket // 2) // bucket, 1) * bucket, num_tokens)
    return order < num_tokens - kept  # ranks below the count: exactly that many in every row


class MVMDecoder(nn.Module):
    """Linear(D, D) and LayerNorm(D) on the student's hidden states, before they are compared with the teacher's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Decode hidden states (..., D); same shape out."""
        return self.norm(self.head(hidden))


def mvm_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean(2 - 2*cos) over all kept tokens, a scalar in float32. student, teacher: (V, D)."""
    return (2 - 2 * F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()
