"""The `datasets` section: shipped corpora, the user's own data, roots, overrides and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from stllm.common.config import check_entry, load_config
from stllm.common.errors import UserError
from stllm.datasets.corpora import build_corpora, resolved_settings, shipped_entries
from stllm.datasets.features import FeatureWriter
from stllm.datasets.instruction import InstructionCorpus
from stllm.datasets.samples import SampleKey, keyed_numpy
from tests.helpers.corpora import numbered_record, write_numbered_videos

# Section 1 of the data formats: the corpora of the published configurations.
VIDEO = {
    "caption": ["videochat", "videochatgpt", "webvid", "textvr", "youcook2"],
    "classification": ["k710", "ssv2"],
    "conversation": ["videochat1", "videochat2"],
    "reasoning": ["next_qa", "clevrer_qa", "clevrer_mc"],
    "vqa": ["ego_qa", "tgif_frame_qa", "tgif_transition_qa", "webvid_qa"],
}
IMAGE = {
    "llava": ["full"],
    "caption": ["coco", "llava", "minigpt4", "paragraph_captioning", "textcaps"],
    "classification": ["imagenet", "coco_itm"],
    "conversation": ["llava"],
    "reasoning": ["clevr", "visual_mrc", "llava"],
    "vqa": ["vqav2", "gqa", "okvqa", "a_okvqa", "viquae", "ocr_vqa", "text_vqa", "st_vqa", "docvqa"],
}
SHARDS = ["cc_sbu", "laion", "cc_sbu_align"]


def configured(folder: Path, text: str, *options: str) -> Any:
    path = folder / "my.yaml"
    path.write_text(f"model: {{model_type: tiny}}\ndatasets:\n{text}\n")
    return load_config(path, options)


def message(folder: Path, text: str, *options: str) -> str:
    with pytest.raises(UserError) as error:
        build_corpora(configured(folder, text, *options), image_size=32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write two shipped corpora at their usual paths, and a data set of the user's own."""
    write_numbered_videos(tmp_path / "media" / "webvid", range(2))
    write_numbered_videos(tmp_path / "own", range(1))
    for name in ("caption/videochat/train.json", "conversation/videochat1/train_flat.json"):
        path = tmp_path / "anno" / "video" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([numbered_record(number) for number in range(2)]))
    (tmp_path / "own" / "mine.jsonl").write_text(json.dumps(numbered_record(0)))
    return tmp_path


ROOTS = "  anno_root: ./anno\n  media_root: ./media\n"


def test_the_whole_corpus_list_is_shipped() -> None:
    entries = shipped_entries()
    videos, images = ({f"{kind}_{name}" for kind in sets for name in sets[kind]} for sets in (VIDEO, IMAGE))
    assert set(entries) == videos | images | set(SHARDS) and len(videos) == 16 and len(images) == 21
    for name, entry in entries.items():
        kind = "video" if name in videos else "image" if name in images else None
        assert check_entry(name, entry, lambda key: "here") == entry and entry.get("media") == kind
        assert ("shards" in entry) == (name in SHARDS)
    assert entries["conversation_videochat1"]["anno_path"] == "video/conversation/videochat1/train_flat.json"
    assert entries["caption_videochatgpt"]["anno_path"] == "video/conversation/videochatgpt/train_full_flat.json"
    assert entries["llava_full"]["anno_path"] == "image/llava/llava_full.json"
    own_names = {"conversation_videochat1", "caption_videochatgpt", "llava_full"}
    for name in (videos | images) - own_names:  # {video,image}/<type>/<set>/train.json
        kind, _, of_kind = name.partition("_")
        medium = "video" if name in videos else "image"
        assert entries[name]["anno_path"] == f"{medium}/{kind}/{of_kind}/train.json"


def test_known_and_own_data_sets(data: Path) -> None:
    own = "  mine: {anno_path: own/mine.jsonl, media_dir: ./own, sample_ratio: 2, qa_sampling: all}"
    cfg = configured(data, ROOTS + "  caption_videochat: {num_frames: 6}\n  conversation_videochat1:\n" + own)
    sources = build_corpora(cfg, image_size=32)
    assert [(s.corpus.name, len(s.corpus), s.ratio) for s in sources] == [
        ("caption_videochat", 2, None),
        ("conversation_videochat1", 2, None),
        ("mine", 2, 2.0),
    ]
    for source, num_frames in zip(sources, (6, 16, 16), strict=True):
        sample = source.corpus.load(SampleKey(0, 0, 0, 0), keyed_numpy(0))
        assert sample.pixel_values is not None and sample.pixel_values.shape == (num_frames, 3, 32, 32)


def test_paths_are_joined_to_the_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIA", "/media")
    text = (
        "  anno_root: /anno\n  media_root: ${oc.env:MEDIA}\n  features_root: /features\n"
        "  caption_webvid:\n"
        "  vqa_gqa: {media_dir: /elsewhere, features_dir: /gqa}\n"
        "  cc_sbu:\n"
        "  mine: {anno_path: mine.json, media_root: /my}\n"
        "  laion: {shards: ['s3://bucket/{00..11}.tar', laion/0.tar]}\n"
    )
    found = resolved_settings(configured(tmp_path, text, "datasets.caption_webvid.anno_root=/new"))
    assert found["caption_webvid"].anno_path == "/new/video/caption/webvid/train.json"
    assert found["caption_webvid"].media_dir == "/media/webvid"
    assert found["caption_webvid"].features_dir == "/features/caption_webvid"
    assert (found["vqa_gqa"].media_dir, found["vqa_gqa"].features_dir) == ("/elsewhere", "/gqa")
    assert found["cc_sbu"].shards == ["/media/cc_sbu/cc_sbu_dataset/{00000..01255}.tar"]
    assert (found["mine"].anno_path, found["mine"].media_dir) == ("/anno/mine.json", "/my")
    assert found["laion"].shards == ["s3://bucket/{00..11}.tar", "/media/laion/0.tar"]


def test_training_and_evaluation_differ_in_crop_and_frames(data: Path) -> None:
    cfg = configured(data, ROOTS + "  caption_videochat: {num_frames: 2}")
    drawn = {}
    for train in (True, False):
        corpus = build_corpora(cfg, image_size=32, train=train)[0].corpus
        samples = [corpus.load(SampleKey(0, 0, 0, 0), keyed_numpy(seed)).pixel_values for seed in range(2)]
        assert samples[0] is not None and samples[1] is not None
        drawn[train] = samples[0].equal(samples[1])
    assert drawn == {True: False, False: True}


def test_training_can_take_the_frames_of_evaluation(data: Path) -> None:
    cfg = configured(data, ROOTS + "  caption_videochat: {num_frames: 2, sampling: middle, crop: center}")
    key = SampleKey(0, 0, 0, 0)
    samples = [
        build_corpora(cfg, image_size=32, train=train)[0].corpus.load(key, keyed_numpy(0)) for train in (True, False)
    ]
    assert samples[0].pixel_values is not None and samples[1].pixel_values is not None
    assert samples[0].pixel_values.equal(samples[1].pixel_values)
    with pytest.raises(UserError, match="crop 'centre': known are center, random"):
        configured(data, ROOTS + "  caption_videochat: {crop: centre}")


@pytest.mark.parametrize(("sampling", "expected"), [("all", 4), ("one", 2)])
def test_qa_sampling_comes_from_the_run(data: Path, sampling: str, expected: int) -> None:
    cfg = configured(data, ROOTS + "  caption_videochat:")
    cfg.run = OmegaConf.create({"qa_sampling": sampling})
    assert len(build_corpora(cfg, image_size=32)[0].corpus) == expected


def test_features_replace_the_media(data: Path) -> None:
    settings = {"digest": "abc", "num_frames": 2, "image_size": 32, "sampling": "middle"}
    writer = FeatureWriter(data / "f" / "caption_videochat", stage="vit", settings=settings)
    writer.add("0.mp4", torch.zeros(2, 5, 8))
    writer.finish()
    text = "  anno_root: ./anno\n  features_root: ./f\n  caption_videochat: {num_frames: 2}"  # no media are needed
    corpus = build_corpora(configured(data, text), image_size=32, feature_settings={"digest": "abc"})[0].corpus
    sample = corpus.load(SampleKey(0, 0, 0, 0), keyed_numpy(0))
    assert isinstance(corpus, InstructionCorpus) and sample.vision_features is not None
    assert "made with num_frames 2, expected 4" in message(data, text, "datasets.caption_videochat.num_frames=4")
    other = message(data, text, "datasets.caption_videochat.sampling=uniform")
    assert "made with sampling 'middle', expected 'uniform'" in other


def test_unknown_names_are_refused(data: Path) -> None:
    assert "unknown data set 'caption_videochatt'; did you mean 'caption_videochat'?" in message(
        data, "  caption_videochatt: {num_frames: 4}"
    )
    assert "a data set of your own needs anno_path" in message(data, "  zzz:")
    assert message(data, "  anno_root: ./anno").startswith("no data set is named: list at least one")
    unknown = "unknown data set type 'videos': known are image_text, instruction, video_text"
    assert unknown in message(data, "  mine: {anno_path: own/mine.jsonl, type: videos}")


def test_invalid_values_are_reported_when_a_data_set_is_built(data: Path) -> None:
    own = "  mine: {anno_path: own/mine.jsonl}"
    assert message(data, own, "datasets.mine.sampling=random").startswith("data set mine: unknown sampling 'random'")
    assert message(data, own, "datasets.mine.reader=opencv").startswith("data set mine: unknown reader 'opencv'")
    assert "no anno_path is given" in message(data, "  mine: {shards: a.tar}")


def test_all_missing_files_are_named_at_once(data: Path) -> None:
    text = ROOTS + "  caption_videochat:\n  caption_webvid:\n  vqa_tgif_frame_qa:\n  vqa_tgif_transition_qa:"
    found = message(data, text)
    assert found.startswith("not found: ") and "caption/videochat/" not in found
    for part in (
        f"{data}/anno/video/caption/webvid/train.json (caption_webvid)",
        f"{data}/media/tgif (vqa_tgif_frame_qa, vqa_tgif_transition_qa)",
        "set datasets.anno_root and datasets.media_root",
    ):
        assert part in found
    # faults of a whole file are reported before training, too
    (data / "own" / "mine.jsonl").write_text("{")
    assert "line 1, column 2: not valid JSON" in message(data, "  mine: {anno_path: own/mine.jsonl}")
