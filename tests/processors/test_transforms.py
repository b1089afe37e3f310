"""Transforms of frames: agreement with PIL, one crop per clip, and random numbers only from the generator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stllm.common.errors import UserError
from stllm.common.registry import processors
from stllm.processors.transforms import EvalTransform, TrainTransform, draw_crop


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return an image of smooth noise with full contrast."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(240, 320), (320, 240), (224, 224), (100, 60), (271, 641), (720, 1280)])
def test_evaluation_agrees_with_pil(size):
    height, width = size
    frame = picture(height, width)
    scale = 224 / min(height, width)
    shape = (224, int(224 * width / height)) if height <= width else (int(224 * height / width), 224)
    assert min(shape) == 224 and scale > 0
    resized = Image.fromarray(frame).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    top, left = round((shape[0] - 224) / 2), round((shape[1] - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))

    found = EvalTransform()(frame)

    assert found.shape == (3, 224, 224) and found.dtype == torch.uint8 and found.is_contiguous()
    difference = (found.int() - torch.from_numpy(expected.copy()).permute(2, 0, 1).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.integers(8, 64))
def test_every_frame_size_gives_a_square(height, width, size):
    grey = np.full((height, width, 3), 100, np.uint8)
    for transform in (EvalTransform(size), TrainTransform(size).for_clip(torch.Generator().manual_seed(0))):
        found = transform(grey)
        assert torch.equal(found, torch.full((3, size, size), 100, dtype=torch.uint8))


@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    seed=st.integers(0, 2**32),
    least=st.floats(0.05, 1),
)
def test_crops_are_inside_the_frame_and_large_enough(height, width, seed, least):
    generator = torch.Generator().manual_seed(seed)
    top, left, bottom, right = draw_crop(height, width, (least, 1.0), generator)
    assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
    rows, columns = (bottom - top) * height, (right - left) * width
    if min(height, width) > 50 and 3 / 4 < width / height < 4 / 3:
        assert (bottom - top) * (right - left) > least - 0.03
        assert 0.74 < columns / rows < 1.36


def test_all_frames_of_a_clip_have_the_same_crop():
    frame = picture(120, 160)
    transform = TrainTransform(32).for_clip(torch.Generator().manual_seed(3))
    first, second = transform(frame), transform(frame)
    assert torch.equal(first, second)
    other = TrainTransform(32).for_clip(torch.Generator().manual_seed(4))(frame)
    assert not torch.equal(first, other)


def test_a_crop_covers_the_same_relative_part_of_other_frame_sizes():
    transform = TrainTransform(32, scale=(0.5, 0.6)).for_clip(torch.Generator().manual_seed(0))
    ramp = np.repeat(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], 300, axis=0).repeat(3, axis=2)
    large, small = transform(ramp), transform(np.ascontiguousarray(ramp[::2, ::2]))
    torch.testing.assert_close(large.float(), small.float(), atol=3, rtol=0)


def test_training_transforms_do_not_use_global_random_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    TrainTransform(8).for_clip(torch.Generator().manual_seed(0))(picture(20, 20))
    assert torch.equal(torch.rand(1), expected)


def test_processors_are_registered():
    assert processors.get("video_eval") is EvalTransform
    assert processors.get("video_train") is TrainTransform


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_frames_of_wrong_shape_or_type_are_refused(frame):
    with pytest.raises(UserError, match=r"expected \(H, W, 3\) uint8 RGB"):
        EvalTransform()(frame)


def test_the_input_frame_is_not_changed():
    frame = picture(64, 64)
    frame.setflags(write=False)
    before = frame.copy()
    EvalTransform(64)(frame)
    np.testing.assert_array_equal(frame, before)


def test_invalid_crop_scales_are_refused():
    with pytest.raises(UserError, match="crop scale"):
        TrainTransform(8, scale=(0.5, 1.5))
