"""Attention masks made without reading a value from the device; such a read makes a GPU wait.

transformers checks whether a mask hides anything, so that it can leave the mask out. Here the answer is known: a causal
model does not see padding on the right, and a Q-Former always gets its mask. This file uses transformers' public
interfaces for custom attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WITHOUT_READS = "sdpa_without_reads"


@contextmanager
def masks_without_reads(model: PreTrainedModel) -> Iterator[None]:
    """Have a model that attends by torch's SDPA make its masks without reads.

    A causal model's rows must be padded on the right, and its states at padded positions are then meaningless. Models
    whose attention code knows only transformers' own kinds are not changed.
    """
    config = model.config
    if config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = WITHOUT_READS
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _mask(*, attention_mask: Tensor | None, allow_is_causal_skip: bool, **options: Any) -> Tensor | None:
    """Arguments and result of `sdpa_mask`: causal attention needs no padding mask, any other gets the whole mask."""
    options |= {"allow_is_causal_skip": allow_is_causal_skip, "allow_is_bidirectional_skip": False}
    return sdpa_mask(attention_mask=None if allow_is_causal_skip else attention_mask, **options)


AttentionInterface.register(WITHOUT_READS, sdpa_attention_forward)
AttentionMaskInterface.register(WITHOUT_READS, _mask)
