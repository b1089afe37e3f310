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
            init.trunc_normal_(module.pos_embed, std=STD)
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


def _copy_last_blocks(backbone: Eva, adapter: TemporalAdapter) -> None:
    """The adapter's spatial layers start as copies of the backbone's last blocks."""
    for layer, block in zip(adapter.spatial, backbone.blocks[-adapter.depth :], strict=True):
        source = dict(block.named_parameters())
        for name, parameter in layer.named_parameters():
            init.copy_(parameter, source[name])
