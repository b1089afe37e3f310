"""Precomputed features: outputs of the frozen parts of a model, computed once for each clip and stored.

Two stages can be stored: "vit" is the patch tokens of a frozen encoder; "qformer" is the query tokens of a frozen
Q-Former that reads no text.
Letters in shapes: B clips, T frames, P patches, C encoder width, K queries, Q Q-Former width, S image size.
"""

import hashlib
import json

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stllm.models.configuration import VISION_DEFAULTS, STLLMConfig
from stllm.models.st_llm import STLLM
from stllm.models.vision import build_vision_encoder


def fault(config: STLLMConfig, stage: str) -> str | None:
    """Return the reason why a stage's output cannot replace the pixels in training, and what to do. None: it can."""
    with torch.device("meta"):
        encoder = build_vision_encoder(config)
    moving = "so that its output changes at every step"
    take_vit = "take the encoder's output, stage vit"
    if encoder.adapter is not None:
        adapter = f"the temporal adapter (model.vit_model: {config.vision_config['encoder']})"
        return f"{adapter} trains even in a frozen encoder, {moving}: train from pixels"
    if not config.freeze_vit:
        return f"the vision encoder trains (model.freeze_vit: False), {moving}: freeze it, or train from pixels"
    if stage == "vit":
        return None
    if not config.has_qformer:
        return f"the model has no Q-Former (model.has_qformer: False): {take_vit}"
    if config.qformer_text_input:
        reads = "this Q-Former reads the question too (model.qformer_text_input: True)"
        return f"{reads}, so that its output is no clip's own: {take_vit}"
    if not config.freeze_qformer:
        return f"the Q-Former trains (model.freeze_qformer: False), {moving}: freeze it, or {take_vit}"
    return None


@torch.inference_mode()
def encode(model: STLLM, pixel_values: Tensor, stage: str) -> Tensor:
    """Compute features: (B, T, 1+P, C) for stage "vit", (B, T, K, Q) for "qformer". pixel_values: (B, T, 3, S, S)."""
    features = model.vision_features(pixel_values)
    return features if stage == "vit" else model.qformer(features)


def shape(config: STLLMConfig, stage: str, num_frames: int) -> tuple[int, int, int]:
    """Return the shape of one clip's features: (T, 1+P, C) for stage "vit", (T, K, Q) for "qformer"."""
    if stage == "vit":
        return num_frames, 1 + config.num_patches, config.vision_config["embed_dim"]
    return num_frames, config.num_query_tokens, config.qformer_config.hidden_size


@torch.no_grad()
def weights_digest(model: STLLM, stage: str) -> str:
    """Return a digest (16 hex digits) of the weights and settings that a stage's output depends on.

    Weights are hashed as bfloat16, so a model has the same digest in float32 and in bfloat16. A model loaded in
    float16 has another one, unless its file is float16. A billion weights take seconds.
    """
    config, encoder = model.config, model.vision_encoder
    parts: dict[str, nn.Module] = {"backbone": encoder.backbone, "ln_vision": encoder.ln_vision}
    choices = {name: config.vision_config[name] for name in ("patch_size", "num_heads", "ln_eps")}
    if (name := config.vision_config["encoder"]) != VISION_DEFAULTS["encoder"]:
        choices["encoder"] = name
    if stage == "qformer":
        parts["qformer"] = model.qformer
        choices["qformer_heads"] = config.qformer_config.num_attention_heads
    digest = hashlib.blake2b(json.dumps(choices).encode(), digest_size=8)
    for part, module in parts.items():
        for name, weight in module.state_dict(keep_vars=True).items():
            tensor = _whole(weight)
            digest.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to(torch.bfloat16).cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _whole(weight: Tensor) -> Tensor:
    """Return a whole weight. If FSDP or ZeRO-3 has divided it among processes, all of them must call this together."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if not hasattr(weight, "ds_id"):
        return weight
    from deepspeed.zero import GatheredParameters

    with GatheredParameters([weight]):
        return weight.detach().clone()
