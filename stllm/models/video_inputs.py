"""Video inputs: modules that turn a clip's frame tokens into the visual tokens of the language model.

mean: the frames are averaged. all: every token enters. residual: some local frames enter, each with the mean of all
frames added. Source: paper section 3.2 (joint spatial-temporal tokens) and 3.5 (global-local module for long videos).

Letters in shapes: B clips, T frames, K tokens a frame, D language-model width, R local frames. A single image always
gives its K tokens.
kept: the frames to use, as ascending positions (None: all). The other frames are left out, as if they were masked.
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
    """Return the number of visual tokens that a clip of `num_frames` frames gives, before masking."""
    with torch.device("meta"):  # num_tokens needs no weights
        return int(build_video_input(config).num_tokens(num_frames, config.tokens_per_frame))


@video_inputs.register("mean")
class MeanInput(nn.Module):
    """The mean over time: K tokens for any T. This baseline cannot see the order of the frames."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, frame_tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """frame_tokens: (B, T, K, D). Returns (B, K, D)."""
        return _only(frame_tokens, kept).mean(dim=1)

    def num_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """Return the number of visual tokens of a clip of `num_frames` frames."""
        return tokens_per_frame


@video_inputs.register("all")
class AllInput(nn.Module):
    """All T*K tokens, frame after frame: the paper's joint spatial-temporal modelling."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, frame_tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """frame_tokens: (B, T, K, D). Returns (B, T*K, D)."""
        return _only(frame_tokens, kept).flatten(1, 2)

    def num_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """Return the number of visual tokens of a clip of `num_frames` frames."""
        return num_frames * tokens_per_frame


@video_inputs.register("residual")
class ResidualInput(nn.Module):
    """The tokens of R local frames, each with the mean over all T frames added through a bottleneck.

    A long video then costs the language model as much as a video of R frames.
    """

    def __init__(self, *, width: int, bottleneck: int, residual_size: int) -> None:
        super().__init__()
        self.residual_size = residual_size
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)  # starts at zero, so the mean is ignored at first

    def forward(self, frame_tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """frame_tokens: (B, T, K, D). Returns (B, R*K, D), or (B, K, D) for a single image.

        The local frames are chosen from all T frames. A frame that is not in `kept` is then left out, both as a local
        frame and in the mean.
        """
        if frame_tokens.shape[1] == 1:
            return frame_tokens[:, 0]
        indices = residual_frame_indices(frame_tokens.shape[1], self.residual_size)
        frames = frame_tokens.split(1, dim=1)  # indexing by a list would wait for a copy to the device
        chosen = [frames[index] for index in indices if kept is None or index in kept]
        local = torch.cat([frame_tokens[:, :0], *chosen], dim=1)  # (B, R, K, D)
        pooled = self.up_proj(F.relu(self.down_proj(_only(frame_tokens, kept).mean(dim=1))))  # (B, K, D)
        return (local + pooled[:, None]).flatten(1, 2)

    def num_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """Return the number of visual tokens of a clip of `num_frames` frames."""
        return min(num_frames, self.residual_size) * tokens_per_frame


def _only(frame_tokens: Tensor, kept: Sequence[int] | None) -> Tensor:
    return frame_tokens if kept is None else frame_tokens[:, list(kept)]


def residual_frame_indices(num_frames: int, residual_size: int) -> list[int]:
    """Return the positions of the local frames, r_i = int(s/2 + round(s*i)) with s = T/R (paper section 3.5).

    Halves are rounded to even. A clip of fewer than R frames gives each of its frames once.
    """
    count = min(num_frames, residual_size)
    segment = num_frames / count
    return [int(segment / 2 + round(segment * i)) for i in range(count)]
