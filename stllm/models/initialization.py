"""Fresh weights of the parts that transformers doesn't know: timm's encoder, the adapter, the queries, the bottleneck.

transformers' `init` functions leave alone what was loaded from a file, so this serves a model built from nothing, one
built on some pretrained parts, and the buffers that no file carries. Source of the values: paper section 3.
"""

import torch
from timm.models.eva import Eva, EvaAttention
from torch import nn
from transformers import initialization as init

from stllm.models.qformer import FrameQFormer
from stllm.models.temporal_adapter import TemporalAdapter, TemporalLayer
from stllm.models.video_inputs import ResidualInput
from stllm.models.vision import VisionEncoder

STD = 0.02
POSITION_SCALE = 0.3  # about the size of a fresh patch embedding
POSITION_BASE = 100.0


@torch.no_grad()
def initialize_parts(model: nn.Module) -> None:
    """Starts every part of `model` that holds parameters of its own; Linear and norm layers are transformers' work."""
    for module in model.modules():
        if isinstance(module, EvaAttention):
            for bias in (module.q_bias, module.k_bias, module.v_bias):  # k_bias is a buffer that stays zero
                assert bias is not None
                init.zeros_(bias)
        elif isinstance(module, Eva):
            assert module.cls_token is not None and module.pos_embed is not None
            init.trunc_normal_(module.cls_token, std=STD)
            grid = module.patch_embed.grid_size
            init.copy_(module.pos_embed, sine_cosine_positions(grid, module.embed_dim))
        elif isinstance(module, TemporalAdapter):
            init.zeros_(module.class_token)
        elif isinstance(module, TemporalLayer):
            init.zeros_(module.temporal_fc.weight)
        elif isinstance(module, FrameQFormer):
            init.normal_(module.query_tokens, std=STD)
        elif isinstance(module, ResidualInput):
            init.zeros_(module.up_proj.weight)
    for module in model.modules():  # when the backbone has its values
        if isinstance(module, VisionEncoder) and module.adapter is not None:
            _copy_last_blocks(module.backbone, module.adapter)


def sine_cosine_positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Position embeddings (1, 1+P, C) in which neighbours are alike from the first step on; zero for the class token.

    A quarter of the width each: sine and cosine of the row and of the column, at wave lengths from 2 pi to 200 pi
    patches; what a width leaves over is zero. A fresh encoder need not find out first where its patches lie.
    """
    rates = POSITION_BASE ** -(torch.arange(width // 4) / (width // 4))  # (C/4,)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    angles = [side.flatten()[:, None] * rates for side in (rows, columns)]  # (P, C/4) each
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    positions = torch.zeros(1, 1 + len(waves), width)
    positions[0, 1:, : waves.shape[1]] = POSITION_SCALE * waves
    return positions


def _copy_last_blocks(backbone: Eva, adapter: TemporalAdapter) -> None:
    """The adapter's spatial layers start as copies of the backbone's last blocks."""
    for layer, block in zip(adapter.spatial, backbone.blocks[-adapter.depth :], strict=True):
        source = dict(block.named_parameters())
        for name, parameter in layer.named_parameters():
            init.copy_(parameter, source[name])
