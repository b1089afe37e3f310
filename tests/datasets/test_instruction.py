"""Instruction data: the choice of question, frames and crop, and clips of always T frames."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stllm.datasets.features import FeatureStore, FeatureWriter, feature_key
from stllm.datasets.samples import Sample, SampleKey, keyed_numpy
from stllm.media.info import MediaError
from stllm.media.sampling import middle
from stllm.processors.templates import Turn
from stllm.processors.transforms import TrainTransform
from tests.helpers.corpora import FRAMES, codes_of, corpus_of, numbered_record, write_numbered_videos
from tests.helpers.videos import frame_code, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("videos")
    write_numbered_videos(folder, range(3))
    write_video(folder / "short.mp4", num_frames=3)
    for number in range(3):
        Image.fromarray(frame_code(number)).save(folder / f"{number}.png")
    (folder / "raw").mkdir()
    for number in range(1, 21):
        Image.fromarray(frame_code(number)).save(folder / "raw" / f"{number:06d}.png")
    return folder


def load(corpus: Any, index: int = 0, seed: int = 0) -> Sample:
    sample: Sample = corpus.load(SampleKey(0, 0, 0, index), keyed_numpy(seed, index))
    return sample


def codes(sample: Sample) -> list[int]:
    assert sample.pixel_values is not None
    return codes_of(sample.pixel_values)


def test_one_pair_of_each_record_at_random(folder: Path) -> None:
    corpus = corpus_of(folder / "a.json", [numbered_record(n) for n in range(3)])
    assert len(corpus) == 3 and corpus.media == "video"
    answers = {load(corpus, 1, seed).turns for seed in range(20)}
    assert answers == {(Turn(f"pair {p}?", f"1 {p}", "video 1"),) for p in range(2)}
    assert load(corpus, 1).name == f"{folder / '1.mp4'} ({folder / 'a.json'}, record 2)"


def test_all_pairs_are_a_sample_each(folder: Path) -> None:
    records = [numbered_record(0), {"video": "1.mp4"}, numbered_record(2)]
    records[2]["QA"].insert(0, {"q": "unanswered", "a": ""})
    corpus = corpus_of(folder / "a.json", records, qa_sampling="all")
    assert len(corpus) == 5  # two, the unusable one, two
    assert [load(corpus, index).turns[0].answer for index in (0, 1, 3, 4)] == ["0 0", "0 1", "2 0", "2 1"]
    assert len(corpus_of(folder / "a.json", records, qa_sampling="all", max_samples=3)) == 3
    with pytest.raises(IndexError):
        load(corpus, 5)


def test_all_pairs_together_have_the_first_instruction(folder: Path) -> None:
    corpus = corpus_of(folder / "a.json", [numbered_record(0), numbered_record(1)], qa_sampling="together")
    assert len(corpus) == 2 and load(corpus).together and not load(corpus).judge_options
    assert load(corpus_of(folder / "a.json", [numbered_record(0)], judge_options=True)).judge_options
    assert load(corpus).turns == (Turn("pair 0?", "0 0", "video 0"), Turn("pair 1?", "0 1", "video 0"))


@pytest.mark.parametrize("qa_sampling", ["one", "all", "together"])
def test_all_pairs_as_one_conversation(folder: Path, qa_sampling: str) -> None:
    corpus = corpus_of(folder / "a.json", [numbered_record(0)], multi_turn=True, qa_sampling=qa_sampling)
    assert len(corpus) == 1
    assert load(corpus).turns == (Turn("pair 0?", "0 0", "video 0"), Turn("pair 1?", "0 1"))
    assert not load(corpus).together


def test_an_instruction_is_drawn_for_those_without(folder: Path) -> None:
    records = [{"video": "0.mp4", "caption": "A code."}, numbered_record(1)]
    drawn = corpus_of(folder / "a.json", records, instruction=["Describe.", "Tell me."])
    assert {load(drawn, 0, seed).turns[0].instruction for seed in range(20)} == {"Describe.", "Tell me."}
    assert load(drawn, 1).turns[0].instruction == "video 1"
    assert load(corpus_of(folder / "a.json", records), 0).turns == (Turn("", "A code."),)


def test_frames_are_chosen_by_the_sampling_rule(folder: Path) -> None:
    record = numbered_record(1)
    assert codes(load(corpus_of(folder / "a.json", [record], sampling="middle"))) == [
        100 + index for index in middle(4, total_frames=FRAMES)
    ]
    assert codes(load(corpus_of(folder / "a.json", [record], sampling="fps2"))) == [102, 108, 112, 118]
    bounded = corpus_of(folder / "a.json", [{**record, "start": 0.5, "end": "1.5"}])
    drawn = [codes(load(bounded, seed=seed)) for seed in range(10)]
    assert all(105 <= code < 115 for clip in drawn for code in clip) and len({tuple(clip) for clip in drawn}) > 1


@pytest.mark.parametrize(("sampling", "expected"), [("middle", [0, 1, 2, 2, 2]), ("fps5", [2, 2, 2, 2, 2])])
def test_short_clips_are_padded_with_their_last_frame(folder: Path, sampling: str, expected: list[int]) -> None:
    record = {**numbered_record(0), "video": "short.mp4"}
    assert codes(load(corpus_of(folder / "a.json", [record], sampling=sampling, num_frames=5))) == expected


def test_raw_frame_folders_are_read_at_5_frames_a_second(folder: Path) -> None:
    record = {**numbered_record(0), "video": "raw", "num_frames": 20, "start": 1, "end": 2}
    assert codes(load(corpus_of(folder / "a.json", [record], sampling="middle"))) == [6, 7, 8, 9]  # 5 frames a second
    faster = corpus_of(folder / "a.json", [record], sampling="middle", fps=10.0)
    assert codes(load(faster)) == [11, 14, 16, 19]


def test_images_are_one_frame_and_no_videos(folder: Path) -> None:
    qa = numbered_record(0)["QA"]
    images = corpus_of(folder / "a.json", [{"image": "2.png", "QA": qa}], num_frames=8)
    sample = load(images)
    assert (images.media, sample.media, codes(sample)) == ("image", "image", [2])
    with pytest.raises(MediaError, match=r"2\.png: found an image, expected a video"):
        load(corpus_of(folder / "a.json", [{"video": "2.png", "QA": qa}]))
    with pytest.raises(MediaError, match=r"0\.mp4: found a video, expected an image"):
        load(corpus_of(folder / "a.json", [{"image": "0.mp4", "QA": qa}]))


def test_text_only_records_give_text_only_samples(folder: Path) -> None:
    corpus = corpus_of(folder / "a.json", [{"QA": [{"q": "What is 1 + 1?", "a": "2"}]}], kind="text")
    sample = load(corpus)
    assert corpus.media is None and sample.media is None and sample.pixel_values is None
    assert sample.turns == (Turn("What is 1 + 1?", "2"),) and sample.name.endswith("record 1")


def test_a_clip_has_one_crop_drawn_only_from_the_generator(folder: Path) -> None:
    corpus = corpus_of(folder / "a.json", [numbered_record(0)], transform=TrainTransform(32), sampling="middle")
    first, other = load(corpus, seed=1).pixel_values, load(corpus, seed=2).pixel_values
    torch.manual_seed(7)
    np.random.seed(7)  # nothing global may matter
    again = load(corpus, seed=1).pixel_values
    assert first is not None and other is not None and again is not None
    assert first.equal(again) and not first.equal(other) and first.shape == (4, 3, 32, 32)


@pytest.mark.parametrize(("stage", "shape"), [("vit", (4, 5, 8)), ("qformer", (4, 2, 6))])
def test_features_in_place_of_pixels(folder: Path, tmp_path: Path, stage: str, shape: tuple[int, ...]) -> None:
    records = [numbered_record(0, start=0.5, end=1), numbered_record(7), numbered_record(8)]  # there is no such video
    corpus = corpus_of(folder / "a.json", records)
    writer = FeatureWriter(tmp_path, stage=stage, settings={})
    written = [torch.full(shape, number, dtype=torch.float16) for number in range(2)]
    for number, features in enumerate(written):
        writer.add(feature_key(corpus.records[number], folder), features)
    writer.finish()
    corpus.features = FeatureStore(tmp_path)
    for number, features in enumerate(written):
        sample = load(corpus, number)
        stored, absent = sample.vision_features, sample.query_features
        if stage == "qformer":
            stored, absent = absent, stored
        assert stored is not None and stored.equal(features) and stored.dtype == torch.float16
        assert absent is None and sample.pixel_values is None and sample.media == "video"
    with pytest.raises(MediaError, match=r"found no features of 8\.mp4") as error:
        load(corpus, 2)
    assert error.value.cause == "missing"
