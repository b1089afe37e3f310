"""Video inputs: a clip's frame tokens enter the language model pooled, all, or as local frames with a global residual.

Source: paper section 3.2 (joint spatial-temporal tokens) and 3.5 (global-local module for long videos).
B clips, T frames, K tokens a frame, D language-model width, R local frames. A single image enters as its K tokens.
`kept`: positions of the frames that enter, ascending; the others are absent, as if masked. None: all.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stllm.common.registry import video_inputs

if TYPE_CHECKING:
    from stllm.models.configuration import STLLMConfig


def build_video_input(config: "STLLMConfig") -> Any:
    """Build the video input that a configuration names: a module with `forward` and `num_tokens`."""
    return video_inputs.get(config.video_input)(
        width=config.text_config.hidden_size, bottleneck=config.residual_bottleneck, residual_size=config.residual_size
    )


def num_visual_tokens(config: "STLLMConfig", num_frames: int) -> int:
    """Count the tokens of a clip of `num_frames` frames in the language model, before masking."""
    with torch.device("meta"):  # num_tokens needs no weights
        return int(build_video_input(config).num_tokens(num_frames, config.tokens_per_frame))


@video_inputs.register("mean")
class MeanInput(nn.Module):
    """The mean over time: K tokens whatever T is. The baseline that cannot see order."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, frame_tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """frame_tokens: (B, T, K, D). Returns (B, K, D)."""
        return _only(frame_tokens, kept).mean(dim=1)

    def num_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """Tokens that enter the language model."""
        return tokens_per_frame


@video_inputs.register("all")
class AllInput(nn.Module):
    """All T*K joint spatial-temporal tokens, frame after frame: the paper's point."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, frame_tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """frame_tokens: (B, T, K, D). Returns (B, T*K, D)."""
        return _only(frame_tokens, kept).flatten(1, 2)

    def num_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """Tokens that enter the language model."""
        return num_frames * tokens_per_frame


@video_inputs.register("residual")
class ResidualInput(nn.Module):
    """R local frames, each plus a bottleneck of the mean over all T: long videos at the price of short ones."""

    def __init__(self, *, width: int, bottleneck: int, residual_size: int) -> None:
        super().__init__()
        self.residual_size = residual_size
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)  # starts at zero: local frames only

    def forward(self, frame_tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """frame_tokens: (B, T, K, D). Returns (B, R*K, D), or (B, K, D) for a single image.

        The local frames are chosen among all T; those that are not kept are absent from them and from the mean.
        """
        if frame_tokens.shape[1] == 1:
            return frame_tokens[:, 0]
        indices = residual_frame_indices(frame_tokens.shape[1], self.residual_size)
        frames = frame_tokens.split(1, dim=1)  # by a list of indices the device would wait for the list's copy
        chosen = [frames[index] for index in indices if kept is None or index in kept]
        local = torch.cat([frame_tokens[:, :0], *chosen], dim=1)  # (B, R, K, D)
        pooled = self.up_proj(F.relu(self.down_proj(_only(frame_tokens, kept).mean(dim=1))))  # (B, K, D)
        return (local + pooled[:, None]).flatten(1, 2)

    def num_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """Tokens that enter the language model."""
        return min(num_frames, self.residual_size) * tokens_per_frame


def _only(frame_tokens: Tensor, kept: Sequence[int] | None) -> Tensor:
    return frame_tokens if kept is None else frame_tokens[:, list(kept)]


def residual_frame_indices(num_frames: int, residual_size: int) -> list[int]:
    """The local frames r_i = int(seg/2 + round(seg*i)), seg = T/R, round half to even (paper section 3.5).

    They depend on T, so they are computed for each clip. A clip of fewer than R frames gives all its frames once.
    """
    count = min(num_frames, residual_size)
    segment = num_frames / count
    return [int(segment / 2 + round(segment * i)) for i in range(count)]
