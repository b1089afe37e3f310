"""The language model: any causal LM of transformers, asked for hidden states and for logits apart.

Training needs the last hidden states at visual positions and logits only where a label is; calling the decoder and the
output head one after the other gives both without keeping every layer's states or a (B, S, vocabulary) tensor.
LoRA is peft's, injected into the model in place (lora.py).

Attention masks are made without reading a value from the device; such a read makes a GPU wait. transformers checks
whether a mask hides anything, so that it can leave the mask out. Here the answer is known: a causal model does not see
padding on the right, and a Q-Former always gets its mask. `masks_without_reads` uses transformers' public interfaces
for custom attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from stllm.common.errors import UserError, reason

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


def build_language_model(config: PretrainedConfig, *, lora: dict[str, Any] | None = None) -> PreTrainedModel:
    """Build the causal LM of that configuration, without its weights. lora: as in `STLLMConfig`."""
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if lora is not None:
        from stllm.models.lora import inject_lora

        model = inject_lora(model, lora)
    return model


def set_attention(model: PreTrainedModel, name: str | None) -> None:
    """Have a language model on its device attend by that implementation of transformers; None, auto: the default.

    Raises UserError where it cannot be had.
    """
    if name in (None, "auto"):
        return
    refusal = f"model.attn_implementation is {name}, but "
    instead = ": take auto, which suits every device and architecture"
    if name in ("flash_attention_2", "flex_attention") and model.device.type != "cuda":
        raise UserError(f"{refusal}that needs a CUDA GPU, and the model is on {model.device}{instead}")
    if name == "flash_attention_2" and model.dtype == torch.float32:
        raise UserError(f"{refusal}that has no float32: add --dtype bfloat16, or take auto")
    # transformers would fetch a build from the hub, and stllm runs no code from there
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(f"{refusal}the package flash-attn is not installed{instead}")
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"{refusal}{type(model).__name__} cannot have it ({reason(error)}){instead}") from error
    if model.config._attn_implementation != name:
        raise UserError(f"{refusal}{type(model).__name__} has only {model.config._attn_implementation}{instead}")


def last_hidden_states(model: PreTrainedModel, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the states after the final norm, (B, S, D). attention_mask: (B, S), padded on the right."""
    decoder = model.get_decoder()
    with masks_without_reads(decoder):
        return decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).last_hidden_state


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return logits (..., vocabulary) of hidden states (..., D), scaled where the architecture scales them."""
    config = model.config
    logits = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def language_loss(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, positions: Tensor, num_items: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the next-token cross entropy in float32: a sum over labelled tokens, divided by `num_items`.

    hidden: (B, S, D); labels: (B, S). positions: (A,) in (B*S), of the states from which a labelled token is predicted.
    num_items: labelled tokens of the whole optimizer step (default: of this batch), all processes' and micro-batches',
        so that the loss does not depend on how they are divided among them.
    Returns the loss and the logits (A, vocabulary); logits are computed nowhere else.
    """
    logits = logits_of(model, hidden.flatten(0, 1).index_select(0, positions))
    if not len(positions):  # every answer was cut off: no loss, but a graph that distributed training can reduce
        return logits.float().sum(), logits
    targets = labels.flatten().index_select(0, positions + 1)
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (len(positions) if num_items is None else num_items), logits
