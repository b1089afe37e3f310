"""Transforms of frames to tensors: one for evaluation and chat, one for training.

Source: the published preparation (224 pixels, bicubic with antialiasing, CLIP's mean and standard deviation; random
crops of 50 to 100 % of the area in training). Resized uint8 values differ from PIL's by at most 1. Frames stay uint8,
which needs a quarter of the memory of float32; the model normalises them on its device.

Letters in shapes: H, W height and width of a frame in pixels, S the model's image size.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stllm.common.errors import UserError
from stllm.common.registry import processors

CROP_RATIO = (3 / 4, 4 / 3)  # range of width / height of a training crop, as in torchvision's RandomResizedCrop
CROP_TRIES = 10

FrameTransform = Callable[[np.ndarray], Tensor]  # (H, W, 3) uint8 -> (3, S, S) uint8


class ClipTransform(Protocol):
    """Type of a transform of clips: `TrainTransform` or `EvalTransform`."""

    def for_clip(self, generator: torch.Generator) -> FrameTransform:
        """Return the transform for the frames of one clip. Random numbers are drawn from the generator."""
        ...


@processors.register("video_eval")
class EvalTransform:
    """Transform for evaluation: resize the shorter side to S, and crop the centre. (H, W, 3) uint8 -> (3, S, S) uint8.

    Raises UserError for a frame of another shape or type.
    """

    def __init__(self, image_size: int = 224) -> None:
        self.image_size = image_size

    def __call__(self, frame: np.ndarray) -> Tensor:
        pixels, size = to_bytes(frame), self.image_size
        height, width = pixels.shape[1:]
        shorter = min(height, width)
        pixels = resized(pixels, size * height // shorter, size * width // shorter)  # (3, S, >= S) or (3, >= S, S)
        top, left = (round((side - size) / 2) for side in pixels.shape[1:])
        return pixels[:, top : top + size, left : left + size].contiguous()

    def for_clip(self, generator: torch.Generator | None = None) -> FrameTransform:
        """Return itself, because this transform is not random."""
        return self


@processors.register("video_train")
class TrainTransform:
    """Transform for training: a random crop, the same for all frames of a clip, resized to (S, S).

    scale: smallest and largest share of the frame's area that a crop covers.
    """

    def __init__(self, image_size: int = 224, scale: tuple[float, float] = (0.5, 1.0)) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"the crop scale is {scale}; expected two parts of the area, 0 < least <= most <= 1")
        self.image_size, self.scale = image_size, scale

    def for_clip(self, generator: torch.Generator) -> FrameTransform:
        """Return the transform of a clip's frames, (H, W, 3) uint8 -> (3, S, S) uint8.

        The crop is drawn at the first frame. If frames have different sizes, it covers the same relative part of each.
        """
        crop: tuple[float, float, float, float] | None = None

        def transform(frame: np.ndarray) -> Tensor:
            nonlocal crop
            pixels = to_bytes(frame)
            height, width = pixels.shape[1:]
            if crop is None:
                crop = draw_crop(height, width, self.scale, generator)
            top, left = round(crop[0] * height), round(crop[1] * width)
            bottom, right = max(top + 1, round(crop[2] * height)), max(left + 1, round(crop[3] * width))
            return resized(pixels[:, top:bottom, left:right], self.image_size, self.image_size).contiguous()

        return transform


def draw_crop(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[float, float, float, float]:
    """Draw a random crop: (top, left, bottom, right) as fractions of height and width, as RandomResizedCrop does.

    Area and logarithm of the aspect ratio are uniform. If ten draws do not fit into the frame, the result is the
    largest centred crop whose ratio is in CROP_RATIO.
    """
    for _ in range(CROP_TRIES):
        draws = torch.rand(4, generator=generator).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
        low, high = (math.log(ratio) for ratio in CROP_RATIO)
        ratio = math.exp(low + (high - low) * draws[1])
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = int(draws[2] * (height - rows + 1)), int(draws[3] * (width - columns + 1))
            return top / height, left / width, (top + rows) / height, (left + columns) / width
    rows = min(height, max(1, round(width / CROP_RATIO[0])))
    columns = min(width, max(1, round(height * CROP_RATIO[1])))
    top, left = (height - rows) // 2, (width - columns) // 2
    return top / height, left / width, (top + rows) / height, (left + columns) / width


def to_bytes(frame: np.ndarray) -> Tensor:
    """Convert an (H, W, 3) uint8 array to a (3, H, W) uint8 tensor, without a copy if possible. Raises UserError."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise UserError(f"found a frame of shape {frame.shape} and type {frame.dtype}, expected (H, W, 3) uint8 RGB")
    if not (frame.flags.c_contiguous and frame.flags.writeable):
        frame = frame.copy()
    return torch.from_numpy(frame).permute(2, 0, 1)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize (3, H, W) uint8 to (3, height, width) uint8, bicubic with antialiasing."""
    if pixels.shape[1:] == (height, width):
        return pixels
    return interpolate(pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
