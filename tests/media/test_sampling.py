"""Frame sampling: indices equal those of the published code, and are valid for any numbers."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stllm.common.errors import UserError
from stllm.media.sampling import at_rate, bounded, middle, rand, sample_indices, segment, uniform

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())

counts = st.integers(1, 200)
totals = st.integers(1, 5000)
rates = st.floats(0.5, 120)
rules = st.sampled_from(["rand", "middle", "uniform", "segment", "fps1", "fps0.5", "fps7"])


@pytest.mark.parametrize("case", GOLDEN["train_middle"])
def test_middle_equals_the_published_indices(case):
    assert middle(case["num_frames"], total_frames=case["total_frames"]) == case["indices"]


@pytest.mark.parametrize("case", GOLDEN["train_fps"])
def test_rate_equals_the_published_indices(case):
    indices = sample_indices(
        case["sample"], num_frames=case["max_num_frames"], total_frames=case["total_frames"], fps=case["input_fps"]
    )
    assert indices == case["indices"]


@pytest.mark.parametrize("case", GOLDEN["chat_uniform"])
def test_uniform_equals_the_published_indices(case):
    assert uniform(case["num_frames"], total_frames=case["total_frames"]) == case["indices"]


@pytest.mark.parametrize("case", GOLDEN["mvbench"])
def test_segment_equals_the_published_indices(case):
    first_index = case["first_index"]
    indices = segment(
        case["num_segments"],
        total_frames=case["max_frame"] + 1 - first_index,  # max_frame is the last valid index
        fps=case["fps"],
        bounds=case["bound"],
        first_index=first_index,
    )
    assert indices == case["indices"]


@given(rule=rules, num_frames=counts, total_frames=totals, fps=rates, first_index=st.integers(0, 1))
def test_indices_ascend_within_the_video(rule, num_frames, total_frames, fps, first_index):
    indices = sample_indices(
        rule,
        num_frames=num_frames,
        total_frames=total_frames,
        fps=fps,
        first_index=first_index,
        generator=np.random.default_rng(0),
    )
    assert indices and all(type(index) is int for index in indices)
    assert indices == sorted(indices)
    assert first_index <= indices[0] and indices[-1] < total_frames + first_index
    if rule in ("rand", "middle", "segment"):
        assert len(indices) == num_frames
    elif rule == "uniform":
        assert len(indices) == min(num_frames, total_frames)
    else:
        assert len(indices) <= num_frames


@given(
    rule=rules,
    num_frames=counts,
    total_frames=totals,
    fps=rates,
    start=st.floats(-10, 200),
    length=st.floats(0.01, 500) | st.just(math.inf),
)
def test_bounds_are_respected_or_refused(rule, num_frames, total_frames, fps, start, length):
    end = start + length
    try:
        indices = sample_indices(
            rule,
            num_frames=num_frames,
            total_frames=total_frames,
            fps=fps,
            bounds=(start, end),
            generator=np.random.default_rng(0),
        )
    except UserError as error:
        assert "bound" in str(error)
        return
    assert all(0 <= index < total_frames for index in indices)
    if rule == "segment":  # its bounds are rounded, not kept
        assert all(round(start * fps) <= index or index == total_frames - 1 for index in indices)
    else:
        assert all(start * fps <= index < end * fps for index in indices)


@given(num_frames=counts, total_frames=totals, seed=st.integers(0, 2**32 - 1))
def test_random_indices_stay_in_their_intervals(num_frames, total_frames, seed):
    edges = np.linspace(0, total_frames, min(num_frames, total_frames) + 1).astype(int)
    for generator in (np.random.default_rng(seed), random.Random(seed)):
        indices = rand(num_frames, total_frames=total_frames, generator=generator)
        assert len(indices) == num_frames
        for index, start, end in zip(indices, edges[:-1], edges[1:], strict=False):
            assert start <= index < max(start + 1, end - 1)


def test_random_indices_depend_only_on_the_generator():
    first, again, other = (rand(8, total_frames=1000, generator=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_every_rule_works_on_a_video_of_one_frame():
    for rule in ("rand", "middle", "uniform", "segment", "fps2"):
        indices = sample_indices(rule, num_frames=4, total_frames=1, fps=25, generator=random.Random(0), first_index=1)
        assert set(indices) == {1}


def test_segments_per_second_are_4_to_16():
    assert len(segment(0, total_frames=10, fps=25)) == 4
    assert len(segment(0, total_frames=226, fps=25)) == 9  # floor of 225 / 25
    assert len(segment(0, total_frames=100_000, fps=25)) == 16
    assert len(segment(0, total_frames=1000, fps=25, bounds=(30.0, math.inf))) == 10  # to the end, 40 s


def test_bounded_is_half_open():
    assert bounded((1.0, 2.0), total_frames=100, fps=25) == (25, 25)
    assert bounded((1.01, 99.0), total_frames=100, fps=25) == (26, 74)
    assert bounded((-5.0, 0.5), total_frames=100, fps=25) == (0, 13)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "unifrom"}, "unknown sampling 'unifrom'.*did you mean 'uniform'"),
        ({"rule": "fps"}, "unknown sampling 'fps'"),
        ({"rule": "fps-1"}, "the sampled rate is -1.0; expected a positive number"),
        ({"rule": "rand"}, "needs a random generator"),
        ({"total_frames": 0}, "the video has 0 frames; expected at least 1"),
        ({"num_frames": 0}, "num_frames is 0; expected 1 or more"),
        ({"rule": "segment", "num_frames": -1}, "num_frames is -1; expected 0"),
        ({"rule": "segment", "fps": 0.0}, "frame rate is 0.0; expected a positive number"),
        ({"bounds": (2.0, 2.0)}, r"the bound \[2, 2\] s is empty"),
        ({"bounds": (math.nan, 2.0)}, "is empty"),
        ({"bounds": (4.0, 5.0)}, r"the bound \[4, 5\] s lies outside the video, which lasts 4.00 s"),
        ({"rule": "segment", "bounds": (4.0, 5.0)}, "lies outside the video"),
        ({"bounds": (-3.0, 0.0)}, "lies outside the video"),
        ({"bounds": (1.01, 1.02)}, "holds no frame"),
    ],
)
def test_invalid_arguments_are_refused(arguments, words):
    defaults = {"rule": "uniform", "num_frames": 8, "total_frames": 100, "fps": 25.0}
    with pytest.raises(UserError, match=words):
        sample_indices(**{**defaults, **arguments})


def test_a_video_shorter_than_the_first_interval_gives_its_middle():
    assert at_rate(0.1, total_frames=25, fps=25) == [12]
