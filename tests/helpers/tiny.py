"""Tiny models and batches for tests: every size a few units, every code path there."""

from typing import Any

import torch
from torch import Tensor

from stllm.models.configuration import STLLMConfig
from stllm.models.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID
from stllm.models.st_llm import STLLM

VISION = {"image_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 4, "max_frames": 16}
QFORMER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def tiny_config(**changes: Any) -> STLLMConfig:
    """A configuration of a few thousand parameters. encoder=... changes the vision encoder."""
    encoder = changes.pop("encoder", "eva_clip_g")
    values: dict[str, Any] = {
        "vision_config": {**VISION, "encoder": encoder},
        "qformer_config": dict(QFORMER),
        "text_config": dict(LLAMA),
        "num_query_tokens": 4,
        "residual_size": 4,
        "vit_chunk_size": 8,
    }
    return STLLMConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> STLLM:
    """A tiny model in evaluation mode. What starts at zero gets random values, so that no path is silent."""
    torch.manual_seed(seed)
    model = STLLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def tiny_batch(num_clips: int = 2, num_frames: int = 6, seed: int = 0, text_input: bool = True) -> dict[str, Tensor]:
    """Arguments of `STLLM.forward`: the visual block at position 2, a label on the last three tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (num_clips, 12), generator=generator)
    ids[:, 2] = VISUAL_TOKEN_ID
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -3:] = ids[:, -3:]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(num_clips, num_frames, 3, 28, 28, generator=generator),
    }
    if text_input:
        batch["qformer_input_ids"] = torch.randint(1, 40, (num_clips, 7), generator=generator)
        batch["qformer_attention_mask"] = torch.ones(num_clips, 7, dtype=torch.long)
    return batch
