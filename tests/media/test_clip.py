"""Clips: opening a medium, sampling its frames and preparing them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stllm.media.clip import Clip, Media, MediaError, load_clip
from stllm.media.open import open_media
from stllm.media.sampling import segment, uniform
from stllm.processors.transforms import EvalTransform, TrainTransform
from tests.helpers.videos import frame_code, read_code, write_video

TRANSFORM = EvalTransform(32)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "video.mp4", num_frames=100, gop=20)


def clip_codes(clip: Clip) -> list[int]:
    return [read_code(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]


def test_a_clip_holds_the_frames_sampled(video: Path) -> None:
    clip = load_clip(Media(str(video), num_frames=8), TRANSFORM)
    assert clip.frames.shape == (8, 3, 32, 32) and clip.frames.dtype == torch.uint8
    assert clip.indices == uniform(8, total_frames=100) == clip_codes(clip)
    assert clip.times == pytest.approx([index / 25 for index in clip.indices])
    assert clip.info.kind == "video" and clip.path == str(video)


def test_each_frame_of_a_clip_is_transformed(video: Path) -> None:
    clip = load_clip(Media(str(video), num_frames=3), TRANSFORM)
    with open_media(video) as reader:
        expected = torch.stack([TRANSFORM(frame) for frame in reader.frames(clip.indices)])
    assert torch.equal(clip.frames, expected)


def test_a_bound_limits_the_clip(video: Path) -> None:
    clip = load_clip(Media(str(video), num_frames=4, start=2.0, end=3.0, own_times=False), TRANSFORM)
    assert all(50 <= index < 75 for index in clip_codes(clip))
    clip = load_clip(
        Media(str(video), num_frames=4, sampling="segment", start=2.0, end=3.0, own_times=False), TRANSFORM
    )
    assert clip_codes(clip) == segment(4, total_frames=100, fps=25, bounds=(2.0, 3.0))


def test_random_sampling_uses_the_given_generator(video: Path) -> None:
    first, again, other = (
        load_clip(Media(str(video), num_frames=4, sampling="rand"), TRANSFORM, generator=np.random.default_rng(seed))
        for seed in (0, 0, 1)
    )
    assert first.indices == again.indices != other.indices


@pytest.mark.parametrize("sampling", ["uniform", "segment"])
def test_bounds_outside_the_video_give_one_sentence(video: Path, sampling: str) -> None:
    with pytest.raises(MediaError, match=r"video.mp4: the bound \[9, 12\] s lies outside the video, which lasts 4"):
        load_clip(Media(str(video), num_frames=4, sampling=sampling, start=9, end=12, own_times=False), TRANSFORM)


def test_a_clip_can_be_checked_without_decoding_it(video: Path, tmp_path: Path) -> None:
    Media(str(video), 4, start=2.0, end=3.0, own_times=False).check()
    with pytest.raises(MediaError, match=r"video.mp4: the bound \[9, end\] s lies outside"):
        Media(str(video), 4, start=9, own_times=False).check()
    cut = tmp_path / "cut.mp4"
    write_video(cut, num_frames=100, container_options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    with pytest.raises(MediaError, match="the file is cut short"):
        Media(str(cut), 16).check()


def test_frame_folders_give_file_numbers(tmp_path: Path) -> None:
    for index in range(1, 31):
        Image.fromarray(frame_code(index)).save(tmp_path / f"{index:05d}.jpg")
    clip = load_clip(
        Media(str(tmp_path), num_frames=4, sampling="segment", start=2.0, end=8.0, own_times=False), TRANSFORM
    )
    assert clip.indices == segment(4, total_frames=30, fps=3, bounds=(2.0, 8.0), first_index=1) == clip_codes(clip)
    clip = load_clip(Media(str(tmp_path), num_frames=4, sampling="uniform"), TRANSFORM)
    assert clip.indices == [1 + index for index in uniform(4, total_frames=30)] == clip_codes(clip)
    assert clip.times[0] == (clip.indices[0] - 1) / 3


def test_an_image_is_one_frame(tmp_path: Path) -> None:
    Image.fromarray(frame_code(77)).save(tmp_path / "image.png")
    clip = load_clip(Media(str(tmp_path / "image.png"), num_frames=64, start=3, end=4, own_times=False), TRANSFORM)
    assert clip.frames.shape == (1, 3, 32, 32) and clip_codes(clip) == [77]
    assert (clip.indices, clip.times) == ([0], [0.0])


def test_a_clip_of_one_frame_is_padded_with_it(tmp_path: Path) -> None:
    video = write_video(tmp_path / "one.mp4", num_frames=1)
    assert load_clip(Media(str(video), num_frames=8, sampling="middle"), TRANSFORM).frames.shape[0] == 8
    assert load_clip(Media(str(video), num_frames=8), TRANSFORM).frames.shape[0] == 1


def test_a_training_clip_has_one_crop(video: Path) -> None:
    transform = TrainTransform(32).for_clip(torch.Generator().manual_seed(0))
    clip = load_clip(Media(str(video), num_frames=8, sampling="fps0.01"), transform)
    assert clip.frames.shape == (1, 3, 32, 32)
    still = write_video(video.with_name("still.mp4"), frames=[frame_code(21845)] * 9)
    frames = load_clip(Media(str(still), num_frames=4), TrainTransform(32).for_clip(torch.Generator())).frames
    torch.testing.assert_close(frames[0].expand_as(frames).int(), frames.int(), atol=6, rtol=0)


def test_the_digest_tells_content_apart(video: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another name.mkv"
    copy.write_bytes(video.read_bytes())
    clips = [load_clip(Media(str(path), num_frames=4), TRANSFORM) for path in (video, copy)]
    assert clips[0].digest == clips[1].digest and len(clips[0].digest) == 32
    clips[1].frames[0, 0, 0, 0] += 1
    assert clips[0].digest != clips[1].digest
    flat = Clip(clips[0].frames.reshape(1, 12, 32, 32), [0], [0.0], clips[0].info, "")
    assert flat.digest != clips[0].digest
