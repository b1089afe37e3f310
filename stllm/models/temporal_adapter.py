"""The branching temporal adapter: a side branch that adds temporal attention to a frozen image encoder.

The branch has one temporal and one spatial layer for each of the encoder's last blocks. The temporal layer attends over
the frames of each patch position, the spatial layer over the patches of each frame. Each layer pair reads the output of
its block; the result is averaged with the encoder's output. Sources: ST-LLM (arXiv 2404.00308) section 3.4, BT-Adapter
(arXiv 2309.15785); attention and MLP are timm's.

Letters in shapes: B clips, T frames, P patches, C width.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from stllm.common.errors import UserError

MAX_DROP_PATH = 0.1  # rate of the last layer; rates rise linearly from 0: 0, 0.05, 0.1 for the published three


class TemporalLayer(nn.Module):
    """Self-attention of each patch position over the T frames, followed by a linear layer that starts at zero."""

    def __init__(self, *, embed_dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = EvaAttention(embed_dim, num_heads=num_heads, scale_norm=False)
        self.temporal_fc = nn.Linear(embed_dim, embed_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: (B, T, P, C). Returns the same shape."""
        num_clips, num_frames, num_patches, width = patches.shape
        x = patches.transpose(1, 2).reshape(num_clips * num_patches, num_frames, width)  # (B*P, T, C)
        update = self.temporal_fc(self.attn(self.norm1(x)))
        update = update.view(num_clips, num_patches, num_frames, width).transpose(1, 2)  # (B, T, P, C)
        return patches + self.drop_path(update)


class SpatialLayer(nn.Module):
    """A ViT block over the patches of each frame and the clip's class token.

    All frames share one class token; its T attention updates are averaged.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-5)
        self.attn = EvaAttention(embed_dim, num_heads=num_heads, scale_norm=False)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-5)
        self.mlp = Mlp(embed_dim, hidden_features=int(embed_dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, class_token: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """class_token: (B, 1, C). patches: (B, T, P, C). Returns both in the same shapes."""
        num_clips, num_frames, num_patches, width = patches.shape
        per_frame = class_token[:, None].expand(-1, num_frames, -1, -1)
        frames = torch.cat([per_frame, patches], dim=2).flatten(0, 1)  # (B*T, 1+P, C)
        update = self.attn(self.norm1(frames)).view(num_clips, num_frames, 1 + num_patches, width)
        tokens = torch.cat([class_token, patches.flatten(1, 2)], dim=1)  # (B, 1+T*P, C)
        update = torch.cat([update[:, :, 0].mean(1, keepdim=True), update[:, :, 1:].flatten(1, 2)], dim=1)
        tokens = tokens + self.drop_path(update)
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens[:, :1], tokens[:, 1:].view_as(patches)


class TemporalAdapter(nn.Module):
    """The branch beside the last `depth` blocks of the encoder.

    max_frames: entries of the learned time embedding, the largest number of frames that a clip may have.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, mlp_ratio: float, depth: int, max_frames: int) -> None:
        super().__init__()
        rates = [MAX_DROP_PATH * j / max(depth - 1, 1) for j in range(depth)]
        self.depth = depth
        self.max_frames = max_frames
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.time_embed = nn.Embedding(max_frames, embed_dim)
        self.temporal = nn.ModuleList(
            TemporalLayer(embed_dim=embed_dim, num_heads=num_heads, drop_path=rate) for rate in rates
        )
        self.spatial = nn.ModuleList(
            SpatialLayer(embed_dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=rate)
            for rate in rates
        )

    def forward(self, features: Sequence[Tensor], pos_embed: Tensor, num_frames: int) -> Tensor:
        """Compute the branch and average it with the encoder's output.

        features: the outputs of the encoder's last `depth` blocks, each (B*T, 1+P, C).
        pos_embed: (1, 1+P, C), the encoder's position embedding, class token first.
        num_frames: T. Returns (B*T, 1+P, C). Raises UserError for more than `max_frames` frames.
        """
        if num_frames > self.max_frames:
            raise UserError(
                f"{num_frames} frames were given, but the temporal adapter knows {self.max_frames} positions in time: "
                f"use at most {self.max_frames} frames"
            )
        clips = [x.unflatten(0, (-1, num_frames)) for x in features]  # (B, T, 1+P, C) each
        first = clips[0]
        own = self.class_token + pos_embed[:, :1]  # (1, 1, C)
        class_token = (first[:, :, 0].mean(1, keepdim=True) + own) / 2  # (B, 1, C)
        times = self.time_embed(torch.arange(num_frames, device=first.device))  # (T, C)
        patches = first[:, :, 1:] + pos_embed[:, 1:] + times[:, None]  # (B, T, P, C)
        for j, x in enumerate(clips):
            if j > 0:
                class_token = class_token + x[:, :, 0].mean(1, keepdim=True)
                patches = patches + x[:, :, 1:]
            patches = self.temporal[j](patches)
            class_token, patches = self.spatial[j](class_token, patches)
        branch = torch.cat([class_token[:, None].expand(-1, num_frames, -1, -1), patches], dim=2)  # (B, T, 1+P, C)
        return (clips[-1] + branch).flatten(0, 1) / 2
