"""The language model: any causal LM of transformers. Its decoder and its output head are called separately.

Training needs the last hidden states at all visual positions, but logits only at labelled positions. Two separate calls
give both without storing the states of every layer or a (B, S, vocabulary) tensor. LoRA comes from peft (lora.py).

Attention masks are built without reading a value from the device, because such a read makes a GPU wait. transformers
reads the mask to check whether it hides anything and can be omitted. Here this is known in advance: a causal model does
not see padding on the right, and a Q-Former always gets its mask. `masks_without_reads` uses transformers' public
interfaces for custom attention.

Packed prompts share one row, and each attends only to itself. torch's SDPA is called once for each group of prompts of
one length, so no mask between prompts is needed. The lengths are known without a read. Questions that share a medium
(`processors.sequences.share_beginning`) do need a mask, which is made on the device.

Letters in shapes: B rows, S positions of a row, D width, H heads, A labelled tokens of a batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from stllm.common.errors import UserError, reason

WITHOUT_READS = "sdpa_without_reads"
PACKED = "sdpa_packed"
PACKING = (None, "auto", "sdpa", "eager")  # values of model.attn_implementation that packed prompts can have


@contextmanager
def masks_without_reads(model: PreTrainedModel, kind: str = WITHOUT_READS) -> Iterator[None]:
    """Make a model that uses torch's SDPA build its attention masks without reading values from the device.

    kind: WITHOUT_READS needs rows padded on the right; the states of a causal model at padded positions are then
    meaningless. PACKED: see `last_hidden_states`. Models that support only transformers' own attention functions are
    left unchanged.
    """
    config = model.config
    if config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = kind
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _mask(*, attention_mask: Tensor | None, allow_is_causal_skip: bool, **options: Any) -> Tensor | None:
    """Replace `sdpa_mask`: causal attention gets no padding mask, other attention always gets its mask."""
    options |= {"allow_is_causal_skip": allow_is_causal_skip, "allow_is_bidirectional_skip": False}
    return sdpa_mask(attention_mask=None if allow_is_causal_skip else attention_mask, **options)


def _packed_mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None, **options: Any) -> Tensor | None:
    """Return the mask of the longest prompt, or None for plain causal attention. Shorter prompts use its first rows and
    columns.
    """
    return sdpa_mask(q_length=kv_length, kv_length=kv_length, attention_mask=None, **options)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention with torch's SDPA, separately within each prompt if the row is packed.

    query: (1, H, S, head width). attention_mask: that of the longest prompt. packed_lengths: the number of positions of
    each prompt; None: not packed. Returns (1, S, H, head width) and None in place of the attention weights.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    outputs, start = [], 0
    for length, group in groupby(packed_lengths):  # adjacent prompts of one length share a call
        count = len(list(group))
        end = start + count * length
        queries, keys, values = (
            part[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value)
        )  # (count, H, length, D)
        mask = None if attention_mask is None else attention_mask[..., :length, :length]
        output, _ = sdpa_attention_forward(module, queries, keys, values, mask, dropout, scaling, **kwargs)
        outputs.append(output.flatten(0, 1))  # (count * length, H, D)
        start = end
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None], None  # torch.cat would copy it


def _attend_packed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    if "packed_lengths" not in kwargs:
        raise UserError(
            f"{type(module).__name__} is not given the lengths of packed samples, so it cannot keep them apart: set "
            "model.attn_implementation=eager, or leave out run.packing"
        )
    return attend(module, *args, **kwargs)


AttentionInterface.register(WITHOUT_READS, sdpa_attention_forward)
AttentionMaskInterface.register(WITHOUT_READS, _mask)
AttentionInterface.register(PACKED, _attend_packed)
AttentionMaskInterface.register(PACKED, _packed_mask)
# gradient checkpointing calls a layer again in the backward pass, when the implementation's name is "sdpa" again
AttentionInterface.register("sdpa", attend)


def packing_fault(config: PretrainedConfig) -> str | None:
    """Return the reason if prompts of this language model cannot be packed, else None."""
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    kinds = set(getattr(config, "layer_types", None) or ())
    others = layers - {DynamicLayer, DynamicSlidingWindowLayer} or kinds - {"full_attention", "sliding_attention"}
    if others or architecture._is_stateful:
        return f"{config.model_type} has other layers than attention, in which one sample would reach into the next"
    if not architecture._supports_attention_backend:
        return f"{config.model_type} computes attention by code of its own, which cannot keep samples apart"
    return None


def _masks_between(
    config: PretrainedConfig, packed: Mapping[str, Any], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return the mask of packed prompts, (B, 1, S, S), or one for each type of layer. packed: see `last_hidden_states`.

    A position attends to earlier ones of its own prompt or question, and to what all questions share. The mask is added
    to the scores: 0 where a position may attend, the lowest number of the type elsewhere, as in transformers.
    """
    positions: Tensor = packed["position_ids"]
    prompts = packed.get("questions", (positions == 0).cumsum(1))  # (B, S)
    order = torch.arange(positions.shape[1], device=positions.device)
    own, shared = prompts[:, :, None] == prompts[:, None], prompts[:, None] == 0
    earlier = (order[:, None] >= order) & (own | shared)
    distance = positions[:, :, None] - positions[:, None]  # within a prompt
    masks = {}
    for window in {getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers}:
        seen = earlier if window is None else earlier & (distance < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        masks["full_attention" if window is None else "sliding_attention"] = mask[:, None]
    return masks if len(masks) > 1 else mask[:, None]


def build_language_model(config: PretrainedConfig, *, lora: dict[str, Any] | None = None) -> PreTrainedModel:
    """Build the causal LM of a configuration, without loading weights. lora: as in `STLLMConfig`."""
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if lora is not None:
        from stllm.models.lora import inject_lora

        model = inject_lora(model, lora)
    return model


def set_attention(
    model: PreTrainedModel,
    name: str | None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Set the attention implementation of a language model by transformers' name for it (None or auto: the default).

    device, dtype: where, and in which precision, the model will compute (default: those of its weights now). Training
    passes them, because it may move the model later, and autocast may compute in half precision with float32 weights.
    Raises UserError if the implementation cannot be used here.
    """
    if name in (None, "auto"):
        return
    refusal = f"model.attn_implementation is {name}, but "
    instead = ": take auto, which suits every device and architecture"
    if name in ("flash_attention_2", "flex_attention") and (device or model.device).type != "cuda":
        raise UserError(f"{refusal}that needs a CUDA GPU, and the model is on {device or model.device}{instead}")
    if name == "flash_attention_2" and (dtype or model.dtype) == torch.float32:
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


def use_liger(model: PreTrainedModel, settings: Mapping[str, bool] | None = None, *, whole: bool = True) -> None:
    """Make a language model use Liger's kernels, in place: norms, MLPs, rotary embedding and `language_loss`.

    Liger replaces the rotary embedding for all models of this architecture in the process.
    settings: arguments of Liger's function for the architecture (default: all of its kernels).
    whole: False if the output head's weight is sharded over processes. The loss is then computed by torch.
    Raises UserError for an architecture that Liger does not know, and for settings that it refuses.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    config, head = model.config, model.get_output_embeddings()
    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = f"Liger has no kernels for a {config.model_type} language model"
        raise UserError(f"run.use_liger_kernel is True, but {known}: leave it out")
    chosen = dict(settings or {})
    if chosen.get("cross_entropy"):  # it would replace torch's function for the whole process
        raise UserError(
            "run.liger_kernel_config.cross_entropy must be False, found True: the loss is either "
            "fused_linear_cross_entropy or torch's"
        )
    fused = chosen.pop("fused_linear_cross_entropy", True)
    try:
        apply_liger_kernel(model, {**chosen, "cross_entropy": False, "fused_linear_cross_entropy": False})
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"run.use_liger_kernel: Liger refuses {type(model).__name__} ({reason(error)})") from error
    scaled = any(getattr(config, name, None) is not None for name in ("logit_scale", "logits_scaling"))
    if fused and whole and type(head) is nn.Linear and not scaled:  # LoRA on the head needs its own forward
        cap = getattr(config, "final_logit_softcapping", None)
        options = {"bias": head.bias, "reduction": "sum", "softcap": cap, "accum_dtype": torch.float32}
        cast(Any, model).fused_loss = partial(liger_fused_linear_cross_entropy, **options)


def last_hidden_states(
    model: PreTrainedModel,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    packed: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the hidden states after the final norm, (B, S, D).

    inputs_embeds: (B, S, D). attention_mask: (B, S), padded on the right. packed: result of
    `processors.sequences.pad_sequences`, used instead of attention_mask; the model must use torch's SDPA or eager
    attention and have no `packing_fault`.
    """
    decoder = model.get_decoder()
    if packed is None:
        with masks_without_reads(decoder):
            return decoder(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
    options: dict[str, Any] = {"position_ids": packed["position_ids"], "use_cache": False}
    if "lengths" in packed and decoder.config._attn_implementation == "sdpa":
        longest = torch.ones(1, max(packed["lengths"]), dtype=torch.long, device=inputs_embeds.device)
        options |= {"attention_mask": longest, "packed_lengths": packed["lengths"]}
        with masks_without_reads(decoder, PACKED):
            return decoder(inputs_embeds=inputs_embeds, **options).last_hidden_state
    options["attention_mask"] = _masks_between(decoder.config, packed, inputs_embeds.dtype)
    return decoder(inputs_embeds=inputs_embeds, **options).last_hidden_state


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the logits (..., vocabulary) of hidden states (..., D), with the architecture's scaling, if any."""
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
) -> tuple[Tensor, Tensor | None]:
    """Return the next-token cross entropy in float32, and the logits (A, vocabulary) that it was computed from.

    hidden: (B, S, D). labels: (B, S). positions: (A,), counted over the flattened B*S positions: the states that
        predict a labelled token.
    num_items: the divisor of the summed loss (default: A). Training passes the number of labelled tokens of the whole
        optimizer step, over all processes and micro-batches, so that the loss does not depend on how it is split.
    With Liger's fused loss, None is returned in place of the logits.
    """
    states = hidden.flatten(0, 1).index_select(0, positions)  # (A, D)
    targets = labels.flatten().index_select(0, positions + 1)
    share = len(positions) if num_items is None else num_items
    if len(positions) and (fused_loss := getattr(model, "fused_loss", None)) is not None:
        return fused_loss(states, model.get_output_embeddings().weight, targets) / share, None
    logits = logits_of(model, states)
    if not len(positions):  # every answer was cut off: a zero loss, with a graph for the distributed backward pass
        return logits.float().sum(), logits
    return F.cross_entropy(logits.float(), targets, reduction="sum") / share, logits
