"""What a model makes of a clip before anything that trains, so that it can be computed once and stored.

Stages: "vit", the frozen encoder's patch tokens; "qformer", a frozen Q-Former's query tokens where it reads no text.
B clips, T frames, P patches, C encoder width, K queries, Q Q-Former width.
"""

import hashlib
import json

import torch
from torch import Tensor, nn

from stllm.models.configuration import VISION_DEFAULTS, STLLMConfig
from stllm.models.st_llm import STLLM
from stllm.models.vision import build_vision_encoder


def fault(config: STLLMConfig, stage: str) -> str | None:
    """Why a stage's output cannot stand for the pixels in training, and what to do; None when it can."""
    with torch.device("meta"):
        encoder = build_vision_encoder(config)
    if encoder.adapter is not None:
        return (
            f"the temporal adapter (model.vit_model: {config.vision_config['encoder']}) trains even in a frozen "
            "encoder, so that its output changes at every step: train from pixels"
        )
    if not config.freeze_vit:
        return (
            "the vision encoder trains (model.freeze_vit: False), so that its output changes at every step: freeze it, "
            "or train from pixels"
        )
    if stage == "vit":
        return None
    if not config.has_qformer:
        return "the model has no Q-Former (model.has_qformer: False): take the encoder's output, stage vit"
    if config.qformer_text_input:
        return (
            "this Q-Former reads the question too (model.qformer_text_input: True), so that its output is no clip's "
            "own: take the encoder's output, stage vit"
        )
    if not config.freeze_qformer:
        return (
            "the Q-Former trains (model.freeze_qformer: False), so that its output changes at every step: freeze it, "
            "or take the encoder's output, stage vit"
        )
    return None


@torch.inference_mode()
def encode(model: STLLM, pixel_values: Tensor, stage: str) -> Tensor:
    """pixel_values: (B, T, 3, S, S), normalised. Returns (B, T, 1+P, C), or (B, T, K, Q) of stage "qformer"."""
    features = model.vision_features(pixel_values)
    return features if stage == "vit" else model.qformer(features)


def shape(config: STLLMConfig, stage: str, num_frames: int) -> tuple[int, int, int]:
    """Of one clip's features: (T, 1+P, C) or (T, K, Q)."""
    if stage == "vit":
        return num_frames, 1 + config.num_patches, config.vision_config["embed_dim"]
    return num_frames, config.num_query_tokens, config.qformer_config.hidden_size


@torch.no_grad()
def weights_digest(model: STLLM, stage: str) -> str:
    """A digest of all that a stage's output depends on: 16 hex digits, in seconds for a billion weights.

    The same whether the weights are held in float32 or bfloat16: their values are compared as the latter. Held in
    float16 they have been rounded otherwise, unless a file gave them so.
    """
    config = model.config
    parts: dict[str, nn.Module] = {
        "backbone": model.vision_encoder.backbone,
        "ln_vision": model.vision_encoder.ln_vision,
    }
    choices = {name: config.vision_config[name] for name in ("patch_size", "num_heads", "ln_eps")}
    if (encoder := config.vision_config["encoder"]) != VISION_DEFAULTS["encoder"]:
        choices["encoder"] = encoder
    if stage == "qformer":
        parts["qformer"] = model.qformer
        choices["qformer_heads"] = config.qformer_config.num_attention_heads
    digest = hashlib.blake2b(json.dumps(choices).encode(), digest_size=8)
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to(torch.bfloat16).cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
