"""Stored features: written in complete shards, resumed, read back equal, and refused if they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.datasets.annotations import Record
from stllm.datasets.features import FeatureStore, FeatureWriter, clip_key, feature_key
from stllm.media.info import MediaError

SETTINGS = {"digest": "abc", "num_frames": 4, "dtype": "float16"}


def features(number: int) -> Tensor:
    return torch.full((4, 3, 8), number, dtype=torch.bfloat16)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_features_come_back_as_they_were_written(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, stage="vit", settings=SETTINGS, shard_bytes=2 * features(0).nbytes)
    for number in range(5):
        writer.add(f"some folder/é {number}.mp4", features(number))
    writer.finish()
    assert shards(tmp_path) == [f"features-00000-{number:05d}.safetensors" for number in range(3)]
    store = FeatureStore(tmp_path, expected={"digest": "abc"})
    assert len(store) == 5 and store.stage == "vit" and store.settings == SETTINGS
    for number in range(5):
        loaded = store.load(f"some folder/é {number}.mp4")
        assert loaded.equal(features(number)) and loaded.dtype == torch.bfloat16
    with pytest.raises(MediaError, match=r"found no features of b\.mp4"):
        store.load("b.mp4")


def test_feature_keys_identify_the_medium_and_its_part() -> None:
    record = Record((), "/media/webvid/a/b.mp4", "video", "here", bounds=(0.1, float("inf")))
    assert feature_key(record, "/media/webvid") == feature_key(record, "/media/webvid/") == "a/b.mp4[0.1,inf]"
    assert feature_key(record, "/media/web") == "/media/webvid/a/b.mp4[0.1,inf]"
    assert clip_key("b.mp4", None) == "b.mp4" and clip_key("b.mp4", (1.0, 2.5)) == "b.mp4[1.0,2.5]"


def test_an_interrupted_extraction_resumes(tmp_path: Path) -> None:
    def writer(rank: int = 0) -> FeatureWriter:
        return FeatureWriter(tmp_path, stage="vit", settings=SETTINGS, shard_bytes=1, rank=rank)

    first = writer()
    first.add("0", features(0))
    lost = FeatureWriter(tmp_path, stage="vit", settings=SETTINGS)
    lost.add("1", features(1))  # waiting in memory when the process dies
    assert "1" in lost
    with pytest.raises(UserError, match="the features are not complete: run the same `stllm extract` again"):
        FeatureStore(tmp_path)
    second, other = writer(), writer(rank=1)
    assert "0" in second and "0" in other and "1" not in second
    second.add("1", features(1))
    other.add("2", features(2))
    second.finish()
    assert shards(tmp_path) == [
        f"features-{name}.safetensors" for name in ("00000-00000", "00000-00001", "00001-00000")
    ]
    store = FeatureStore(tmp_path)
    assert [store.load(str(number)).equal(features(number)) for number in range(3)] == [True] * 3


def test_features_with_other_settings_are_refused(tmp_path: Path) -> None:
    FeatureWriter(tmp_path, stage="vit", settings=SETTINGS).finish()
    with pytest.raises(UserError, match="made with num_frames 4, expected 8: name another folder"):
        FeatureWriter(tmp_path, stage="vit", settings={**SETTINGS, "num_frames": 8})
    with pytest.raises(UserError, match="made with stage 'vit', expected 'qformer'"):
        FeatureWriter(tmp_path, stage="qformer", settings=SETTINGS)
    with pytest.raises(UserError, match="made with digest 'abc', expected 'abd'"):
        FeatureStore(tmp_path, expected={"digest": "abd"})


def test_damaged_feature_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no features \(no index.json\); write them with `stllm extract`"):
        FeatureStore(tmp_path)
    whole = {"stage": "vit", "settings": {}, "complete": True, "shards": {}}
    parts: tuple[dict[str, Any], ...] = (
        {"settings": []},
        {"complete": None, "settings": 1},
        {"shards": []},
        {"shards": {"a": 1}},
    )
    no_end = {name: whole[name] for name in ("stage", "settings", "shards")}
    for text in ("{", "[]", "{}", json.dumps(no_end), *(json.dumps({**whole, **part}) for part in parts)):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match="the index is damaged"):
            FeatureStore(tmp_path)
    (tmp_path / "index.json").unlink()
    writer = FeatureWriter(tmp_path, stage="vit", settings=SETTINGS)
    writer.add("0", features(0))
    writer.finish()
    store, (shard,) = FeatureStore(tmp_path), shards(tmp_path)
    (tmp_path / shard).write_bytes(b"damaged")
    with pytest.raises(MediaError, match="the shard is damaged"):
        store.load("0")
    with pytest.raises(UserError, match="the shard is damaged"):
        FeatureWriter(tmp_path, stage="vit", settings=SETTINGS)
    (tmp_path / shard).unlink()
    with pytest.raises(MediaError, match="the shard is gone") as error:
        store.load("0")
    assert error.value.cause == "missing"
    assert json.loads((tmp_path / "index.json").read_text())["complete"]
