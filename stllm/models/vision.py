"""The image encoder: timm's EVA-ViT-g on chunks of frames, with or without the temporal adapter.

The published encoder's keys are those of `timm.models.eva.Eva` (EVA-CLIP, arXiv 2211.07636). Its final norm is replaced
by `ln_vision` (BLIP-2), which always computes in float32.

Letters in shapes: B clips, T frames, P patches, C width.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stllm.common.errors import UserError
from stllm.common.registry import vision_encoders

CHUNK_SIZES = {"cpu": 8}  # chosen here: the activations of more frames do not fit into a CPU's caches
CHUNK_SIZE = 16  # frames encoded at once on all other devices

if TYPE_CHECKING:  # timm is imported when an encoder is built, not when its name is looked up
    from timm.models.eva import Eva

    from stllm.models.configuration import STLLMConfig
    from stllm.models.temporal_adapter import TemporalAdapter


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's mean of each colour channel, for values from 0 to 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
POSITION_SCALE = 0.3  # about the size of a fresh patch embedding
POSITION_BASE = 100.0


def build_vision_encoder(config: "STLLMConfig") -> "VisionEncoder":
    """Build the vision encoder that a configuration names."""
    build = vision_encoders.get(config.vision_config["encoder"])
    encoder: VisionEncoder = build(vision=config.vision_config, chunk_size=config.vit_chunk_size)
    return encoder


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 and returned in the input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).type_as(
            x
        )


class VisionEncoder(nn.Module):
    """Turns frames into patch tokens: the backbone, the temporal adapter if there is one, then `ln_vision`.

    chunk_size: frames encoded at once, which keeps activation memory independent of T (None: 8 on a CPU, 16 elsewhere).
    """

    def __init__(
        self, *, backbone: "Eva", adapter: "TemporalAdapter | None", ln_eps: float, chunk_size: int | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.ln_vision = Float32LayerNorm(backbone.embed_dim, eps=ln_eps)
        self.chunk_size = chunk_size
        self.gradient_checkpointing = False  # set by transformers, and passed on to timm's blocks

    def forward(self, video: Tensor) -> Tensor:
        """video: (B, T, 3, H, W), bytes or normalised. Returns (B, T, 1+P, C)."""
        return self.ln_vision(self.encode(video)).unflatten(0, video.shape[:2])

    def encode(self, video: Tensor) -> Tensor:
        """Return the tokens before `ln_vision`, (B*T, 1+P, C). video: (B, T, 3, H, W), bytes or normalised."""
        dtype, frames = self.ln_vision.weight.dtype, video.flatten(0, 1)  # (B*T, 3, H, W)
        self.backbone.set_grad_checkpointing(self.gradient_checkpointing and self.backbone.training)
        size = self.chunk_size or CHUNK_SIZES.get(frames.device.type, CHUNK_SIZE)
        chunks = (normalised(chunk).to(dtype) for chunk in frames.split(size))
        if self.adapter is None:
            return torch.cat([self.backbone.forward_features(chunk) for chunk in chunks])
        blocks = zip(*(self._last_blocks(chunk, self.adapter.depth) for chunk in chunks), strict=True)
        return self.adapter([torch.cat(block) for block in blocks], self.backbone.pos_embed, video.shape[1])

    def _last_blocks(self, frames: Tensor, count: int) -> list[Tensor]:
        outputs = self.backbone.forward_intermediates(
            frames, indices=count, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]


def normalised(pixels: Tensor) -> Tensor:
    """Normalise bytes (..., 3, H, W) as CLIP does, to float32. Pixels of another type count as already normalised."""
    if pixels.dtype != torch.uint8:
        return pixels
    values = pixels.float().div_(255)
    for colour, mean, std in zip(values.unbind(-3), CLIP_MEAN, CLIP_STD, strict=True):
        colour.sub_(mean).div_(std)
    return values


def sine_cosine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return initial position embeddings, (1, 1+P, C), in which neighbouring patches are similar.

    With them, a new encoder need not learn the places of the patches first. The sine and the cosine of the row and of
    the column take a quarter of the width each, at wave lengths from 2 pi to 200 pi patches. The class token's
    embedding and the remainder of the width are zero.
    """
    rates = POSITION_BASE ** -(torch.arange(width // 4) / (width // 4))  # (C/4,)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    angles = [side.flatten()[:, None] * rates for side in (rows, columns)]  # (P, C/4) each
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    positions = torch.zeros(1, 1 + len(waves), width)
    positions[0, 1:, : waves.shape[1]] = POSITION_SCALE * waves
    return positions


def _build(*, vision: dict[str, Any], chunk_size: int | None, with_adapter: bool) -> VisionEncoder:
    from timm.models.eva import Eva

    from stllm.models.temporal_adapter import TemporalAdapter

    sizes = {key: vision[key] for key in ("embed_dim", "num_heads", "mlp_ratio")}
    backbone = Eva(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        depth=vision["depth"],
        drop_path_rate=vision["drop_path_rate"],
        qkv_bias=True,
        init_values=None,
        use_rot_pos_emb=False,
        use_abs_pos_emb=True,
        class_token=True,
        num_classes=0,
        global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **sizes,
    )
    backbone.norm = nn.Identity()  # ln_vision takes its place
    adapter = None
    if with_adapter:
        if vision["adapter_depth"] > vision["depth"]:
            raise UserError(
                f"the temporal adapter has {vision['adapter_depth']} layers, but the encoder has only "
                f"{vision['depth']} blocks: lower model.vision.adapter_depth"
            )
        adapter = TemporalAdapter(depth=vision["adapter_depth"], max_frames=vision["max_frames"], **sizes)
    return VisionEncoder(backbone=backbone, adapter=adapter, ln_eps=vision["ln_eps"], chunk_size=chunk_size)


@vision_encoders.register("eva_clip_g")
def eva_clip_g(*, vision: dict[str, Any], chunk_size: int | None) -> VisionEncoder:
    """Build EVA-ViT-g/14, which encodes each frame separately. vision: see configuration.VISION_DEFAULTS."""
    return _build(vision=vision, chunk_size=chunk_size, with_adapter=False)


@vision_encoders.register("eva_btadapter_g")
def eva_btadapter_g(*, vision: dict[str, Any], chunk_size: int | None) -> VisionEncoder:
    """Build EVA-ViT-g/14 with the branching temporal adapter. vision: see configuration.VISION_DEFAULTS."""
    return _build(vision=vision, chunk_size=chunk_size, with_adapter=True)
