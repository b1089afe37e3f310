"""Video inputs: numbers of tokens, order of frames, and the published indices of local frames."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stllm.common.errors import UserError
from stllm.common.registry import video_inputs
from stllm.models.video_inputs import residual_frame_indices

SAMPLING = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())
SIZES = {"width": 8, "bottleneck": 2, "residual_size": 4}


@pytest.mark.parametrize("case", SAMPLING["residual"], ids=str)
def test_local_frames_equal_the_published_ones(case: dict) -> None:
    assert residual_frame_indices(case["num_frames"], case["residual_size"]) == case["indices"]


@given(num_frames=st.integers(1, 2000), residual_size=st.integers(1, 128))
def test_local_frames_are_distinct_ordered_and_in_the_clip(num_frames: int, residual_size: int) -> None:
    indices = residual_frame_indices(num_frames, residual_size)
    assert len(indices) == min(num_frames, residual_size)
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < num_frames


@pytest.mark.parametrize("name", video_inputs.names())
@pytest.mark.parametrize("num_frames", [1, 3, 4, 9])
def test_number_of_tokens_is_what_is_announced(name: str, num_frames: int) -> None:
    video_input = video_inputs.get(name)(**SIZES)
    tokens = video_input(torch.randn(2, num_frames, 5, 8))
    assert tokens.shape == (2, video_input.num_tokens(num_frames, 5), 8)


@pytest.mark.parametrize("name", video_inputs.names())
def test_an_image_enters_as_its_own_tokens(name: str) -> None:
    frame = torch.randn(1, 1, 5, 8)
    video_input = video_inputs.get(name)(**SIZES)
    assert torch.equal(video_input(frame), frame[:, 0])


@pytest.mark.parametrize("name", video_inputs.names())
def test_frames_that_are_not_kept_are_absent(name: str) -> None:
    """Their content does not matter, and local frames are chosen from all frames."""
    video_input = video_inputs.get(name)(**SIZES)
    frames, others = torch.randn(2, 1, 8, 5, 8)
    others[:, [0, 2, 7]] = frames[:, [0, 2, 7]]
    assert torch.equal(video_input(frames, [0, 2, 7]), video_input(others, [0, 2, 7]))
    assert torch.equal(video_input(frames, range(8)), video_input(frames))
    local = [index for index in residual_frame_indices(8, 4) if index in (0, 2, 7)]
    count = {"mean": 1, "all": 3, "residual": len(local)}.get(name)
    assert count is None or video_input(frames, [0, 2, 7]).shape[1] == 5 * count


def test_only_mean_is_blind_to_order() -> None:
    frames = torch.randn(1, 8, 5, 8)
    for name in ("mean", "all", "residual"):
        video_input = video_inputs.get(name)(**SIZES)
        same = torch.allclose(video_input(frames), video_input(frames.flip(1)), atol=1e-6)
        assert same == (name == "mean"), name


def test_all_orders_tokens_by_frame() -> None:
    frames = torch.arange(2 * 3 * 5.0).view(1, 2, 3, 5)
    assert torch.equal(video_inputs.get("all")(**SIZES)(frames)[0, 3], frames[0, 1, 0])


def test_residual_with_a_zero_bottleneck_gives_the_local_frames() -> None:
    residual = video_inputs.get("residual")(**SIZES)
    torch.nn.init.zeros_(residual.up_proj.weight)
    torch.nn.init.zeros_(residual.up_proj.bias)
    frames = torch.randn(1, 10, 5, 8)
    assert torch.equal(residual(frames), frames[:, [1, 3, 6, 9]].flatten(1, 2))


def test_an_unknown_video_input_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'residual'"):
        video_inputs.get("residul")
