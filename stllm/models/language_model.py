"""The language model: any causal LM of transformers, asked for hidden states and for logits apart.

Training needs the last hidden states at visual positions and logits only where a label is; calling the decoder and the
output head one after the other gives both without keeping every layer's states or a (B, S, vocabulary) tensor.
LoRA is peft's, injected into the model in place (lora.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from stllm.common.errors import UserError, reason
from stllm.models.attention import masks_without_reads


def build_language_model(config: PretrainedConfig, *, lora: dict[str, Any] | None = None) -> PreTrainedModel:
    """The causal LM of that configuration, weights not loaded. lora: {r, alpha, dropout, target_modules} or None."""
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
    """States after the final norm, (B, S, D). inputs_embeds: (B, S, D); attention_mask: (B, S), padded on the right."""
    decoder = model.get_decoder()
    with masks_without_reads(decoder):
        return decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).last_hidden_state


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of hidden states (..., D), with the scaling that some architectures put after it."""
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
    """Next-token cross entropy in float32: the labelled tokens' sum over `num_items`, by default their own number.

    hidden: (B, S, D); labels: (B, S). positions: (A,) in (B*S), of the states from which a labelled token is predicted.
    num_items: labelled tokens of the whole optimizer step, all processes' and micro-batches', so that the loss does not
        depend on how it is divided among them.
    Returns the loss and the logits (A, vocabulary); logits are computed nowhere else.
    """
    logits = logits_of(model, hidden.flatten(0, 1).index_select(0, positions))
    if not len(positions):  # every answer was cut off: no loss, but a graph that distributed training can reduce
        return logits.float().sum(), logits
    targets = labels.flatten().index_select(0, positions + 1)
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (len(positions) if num_items is None else num_items), logits
