"""Tiny models and batches for tests. All sizes are a few units, but every code path is used."""

from typing import Any

import torch

from stllm.models.configuration import STLLMConfig
from stllm.models.masking import draw_dropped
from stllm.models.st_llm import STLLM
from stllm.processors.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID, training_sequences

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
    """Return a configuration of a few thousand parameters. encoder: the vision encoder."""
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
    """Return a tiny model in evaluation mode. Weights that start at zero get random values, so that they matter."""
    torch.manual_seed(seed)
    model = STLLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def tiny_batch(
    model: STLLM | None = None,
    *,
    num_clips: int = 2,
    num_frames: int = 6,
    seed: int = 0,
    mask: int | None = None,
    shorter: int = 0,
    packing: bool = False,
) -> dict[str, Any]:
    """Return arguments of `STLLM.forward`: visual tokens at position 2, then nine ids, of which three are labelled.

    model: for which video input and Q-Former; None: all, with text. mask: seed with which half the tokens are dropped.
    shorter: ids that the last prompt lacks.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (num_clips, 12), generator=generator)
    ids[:, 2] = VISUAL_TOKEN_ID
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -3:] = ids[:, -3:]
    num_visual = num_frames * 4
    if model is not None:
        num_visual = model.video_input.num_tokens(num_frames, model.config.tokens_per_frame)
    dropped = None
    if mask is not None:
        dropped = draw_dropped(num_clips, num_visual, rate=0.5, generator=torch.Generator().manual_seed(mask))
    rows, answers = ids.tolist(), labels.tolist()
    rows[-1], answers[-1] = (row[:3] + row[3 + shorter :] for row in (rows[-1], answers[-1]))
    batch = training_sequences(rows, answers, pad_id=0, num_visual=num_visual, dropped=dropped, packing=packing)
    batch["pixel_values"] = torch.randn(num_clips, num_frames, 3, 28, 28, generator=generator)
    if model is None or model.config.qformer_text_input:
        batch["qformer_input_ids"] = torch.randint(1, 40, (num_clips, 7), generator=generator)
        batch["qformer_attention_mask"] = torch.ones(num_clips, 7, dtype=torch.long)
    return batch
