"""Views of a clip: changes of order and content after sampling."""

from pathlib import Path

import pytest
import torch

from stllm.common.errors import UserError
from stllm.media.clip import Media, load_clip
from stllm.media.views import VIEWS, view_frames, view_order
from stllm.models.vision import normalised
from stllm.processors.transforms import EvalTransform
from tests.helpers.videos import write_video


def test_orders_of_four_frames() -> None:
    assert {view: view_order(view, 4) for view in VIEWS} == {
        "forward": [0, 1, 2, 3],
        "reversed": [3, 2, 1, 0],
        "shuffled": [3, 1, 2, 0],
        "single": [2, 2, 2, 2],
        "blank": [0, 1, 2, 3],
    }


def test_the_shuffle_is_the_same_in_every_run() -> None:
    assert view_order("shuffled", 16) == [11, 8, 12, 6, 2, 0, 10, 9, 5, 7, 15, 3, 4, 1, 13, 14]


@pytest.mark.parametrize("num_frames", range(1, 130))
def test_a_shuffle_shows_every_frame_once_and_is_no_other_view(num_frames: int) -> None:
    order = view_order("shuffled", num_frames)
    assert sorted(order) == list(range(num_frames))
    if num_frames > 1:
        assert order != view_order("forward", num_frames)
    if num_frames > 2:  # two frames have no third order
        assert order != view_order("reversed", num_frames)


@pytest.mark.parametrize("view", VIEWS)
def test_one_frame_stays_one_frame(view: str) -> None:
    assert view_order(view, 1) == [0]


def test_blank_frames_are_the_mean_colour() -> None:
    frames = torch.randint(256, (3, 3, 2, 2), dtype=torch.uint8)
    blank = view_frames("blank", frames)
    assert blank.shape == frames.shape and normalised(blank).abs().max() < 0.01


def test_an_unknown_view_lists_the_known_ones() -> None:
    for fails in (lambda: view_order("backwards", 3), lambda: Media("x", view="revers")):
        with pytest.raises(UserError, match=r"unknown view .*: known are blank, forward, reversed, shuffled, single"):
            fails()


def test_clips_show_the_same_frames_in_the_order_of_the_view(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=40)
    clips = {view: load_clip(Media(str(video), 5, view=view), EvalTransform(28)) for view in VIEWS}
    forward = clips["forward"]
    assert forward.indices == sorted(forward.indices)
    for view, clip in clips.items():
        order = view_order(view, 5)
        assert clip.indices == [forward.indices[place] for place in order]
        assert clip.times == [forward.times[place] for place in order]
        assert torch.equal(clip.frames, view_frames(view, forward.frames))
    assert len({clip.digest for clip in clips.values()}) == len(VIEWS)
    assert len({Media(str(video), view=view).stamp() for view in VIEWS}) == len(VIEWS)
