"""Pictures to tensors: one transform for evaluation and chat, one for training.

Source: the published preparation (224 px, bicubic and antialiased, CLIP's mean and standard deviation; random crops of
50 to 100 % of the area in training). Resizing works on bytes as PIL's does, with which it agrees to one level of 255.
Frames stay bytes, a quarter of the size, until the model normalises them on its device.

Letters: H, W a frame's size in pixels, S the model's image size.
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

CROP_RATIO = (3 / 4, 4 / 3)  # width to height of a training crop, as torchvision's RandomResizedCrop
CROP_TRIES = 10

FrameTransform = Callable[[np.ndarray], Tensor]  # (H, W, 3) uint8 -> (3, S, S) uint8


class ClipTransform(Protocol):
    """Prepares clips: `TrainTransform` or `EvalTransform`."""

    def for_clip(self, generator: torch.Generator) -> FrameTransform:
        """The transform of one clip's frames, with whatever is random in it drawn from the generator."""
        ...


@processors.register("video_eval")
class EvalTransform:
    """(H, W, 3) uint8 -> (3, S, S) uint8: shorter side to S, centre crop.

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
        """The transform of one clip's frames: itself, there is nothing random in it."""
        return self


@processors.register("video_train")
class TrainTransform:
    """One random crop a clip, resized to S x S (RandomResizedCrop); `for_clip` draws it.

    scale: least and most of the frame's area that a crop covers.
    """

    def __init__(self, image_size: int = 224, scale: tuple[float, float] = (0.5, 1.0)) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"the crop scale is {scale}; expected two parts of the area, 0 < least <= most <= 1")
        self.image_size, self.scale = image_size, scale

    def for_clip(self, generator: torch.Generator) -> FrameTransform:
        """(H, W, 3) uint8 -> (3, S, S) uint8 with one crop for every frame of the clip.

        The crop is drawn at the first frame; in a clip of mixed sizes it covers the same part of every frame.
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
    """(top, left, bottom, right) of a random crop, as parts of the height and width.

    Area uniform in `scale`, logarithm of the ratio uniform; after ten misses the largest centred crop of a fair ratio.
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
    """(H, W, 3) uint8 array -> (3, H, W) uint8 tensor over the same memory. Raises UserError for anything else."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise UserError(f"found a frame of shape {frame.shape} and type {frame.dtype}, expected (H, W, 3) uint8 RGB")
    if not (frame.flags.c_contiguous and frame.flags.writeable):
        frame = frame.copy()
    return torch.from_numpy(frame).permute(2, 0, 1)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, height, width) uint8, bicubic and antialiased."""
    if pixels.shape[1:] == (height, width):
        return pixels
    return interpolate(pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
