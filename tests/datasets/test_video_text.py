"""Clips in webdataset shards: the same frames as on disk, the texts beside them, lookup by name, faults."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.common.registry import datasets
from stllm.common.schema import DatasetSettings
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.features import FeatureStore, FeatureWriter
from stllm.datasets.instruction import InstructionCorpus
from stllm.datasets.samples import SampleKey, Stream, keyed_numpy
from stllm.media import info as media_info
from stllm.media.images import GifReader
from stllm.media.info import MediaError
from stllm.media.open import open_media
from stllm.processors.templates import Turn
from stllm.processors.transforms import EvalTransform
from tests.datasets.test_image_text import AsDataset, picture, server, write_tar  # noqa: F401  # a fixture
from tests.helpers.videos import copy_packets, importable, read_code, write_video

SIZE = 32
DIALOGUE = [
    {"from": "human", "value": "<video>\nWho runs?"},
    {"from": "gpt", "value": "A boy."},
    {"from": "human", "value": "Where to?"},
    {"from": "gpt", "value": "To the gate."},
]


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    media_info.warn_once.cache_clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", num_frames=40, b_frames=2)


def packed(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def corpus(tmp_path: Path, shards: Any, kind: str = "video_text", **changed: Any) -> InstructionCorpus:
    given = {"type": kind, "shards": str(shards), "num_frames": 4, "sampling": "middle"}
    settings = DatasetSettings(**{**given, "cache_dir": str(tmp_path / "cache"), **changed})
    data: InstructionCorpus = datasets.get(kind).from_settings("clips", settings, transform=EvalTransform(SIZE))
    return data


def load(data: Any, index: int, epoch: int = 0):
    return data.load(SampleKey(epoch, 0, 0, index), keyed_numpy(0, Stream.SAMPLE, epoch, 0, index))


@pytest.mark.parametrize("reader", ["pyav", "decord", "torchcodec"])
def test_a_clip_in_a_tar_has_the_frames_that_it_has_on_disk(tmp_path, clip, reader) -> None:
    """Byte for byte, whatever the container and the reader."""
    if reader != "pyav" and not importable(reader):
        pytest.skip(f"{reader} is not installed")
    others = {name: write_video(tmp_path / f"x.{name}", num_frames=30) for name in ("mkv", "mov")}
    others["avi"] = write_video(tmp_path / "x.avi", num_frames=30, codec="mpeg4", b_frames=2)  # counted frames
    others["webm"] = write_video(tmp_path / "x.webm", num_frames=30, codec="libvpx-vp9")
    files = {"mp4": clip, **others}
    members = [
        item for end, path in files.items() for item in ((f"{end}.{end}", path.read_bytes()), (f"{end}.txt", b"a"))
    ]
    shard = write_tar(tmp_path / "x.tar", members)
    data = corpus(tmp_path, shard, reader=reader)
    for index, path in enumerate(files.values()):
        member = data.records[index].member
        assert member is not None and member.name == f"{shard}/{path.suffix[1:]}{path.suffix}"
        with open_media(member, reader=reader) as inside, open_media(path) as outside:
            assert inside.info == outside.info
            wanted = [25, 3, 4, 29]
            assert inside.times(wanted) == outside.times(wanted)
            for found, expected in zip(inside.frames(wanted), outside.frames(wanted), strict=True):
                np.testing.assert_array_equal(found, expected)
        sample = load(data, index)
        assert sample.pixel_values.shape == (4, 3, SIZE, SIZE) and sample.media == "video"


def test_a_gif_in_a_tar(tmp_path) -> None:
    from PIL import Image

    stream = io.BytesIO()
    first, *rest = (Image.new("RGB", (16, 16), (40 * number,) * 3) for number in range(5))
    first.save(stream, "gif", save_all=True, append_images=rest)
    data = corpus(tmp_path, write_tar(tmp_path / "x.tar", [("a.gif", stream.getvalue()), ("a.txt", b"grey")]))
    member = data.records[0].member
    assert member is not None
    with open_media(member) as reader:
        assert isinstance(reader, GifReader) and reader.info.num_frames == 5
        assert [int(frame.mean()) // 40 for frame in reader.frames([4, 1])] == [4, 1]


def test_the_texts_beside_a_clip(tmp_path, clip) -> None:
    mp4 = clip.read_bytes()
    metadata = packed({"url": "https://x", "caption": "from json", "status": "success"})  # as video2dataset has it
    texts: list[tuple[dict[str, bytes], tuple[Turn, ...]]] = [
        ({"txt": b" a caption\n"}, (Turn("", "a caption"),)),
        ({"json": metadata}, (Turn("", "from json"),)),
        ({"json": metadata, "txt": b"from txt"}, (Turn("", "from txt"),)),
        ({"json": packed({"question": "Who?", "answer": "A boy."}), "txt": b"x"}, (Turn("Who?", "A boy."),)),
        (
            {"json": packed({"QA": [{"i": "Look.", "q": "Who?", "a": "A boy."}, {"q": "Why?", "a": ""}]})},
            (Turn("Who?", "A boy.", "Look."), Turn("Why?", None)),
        ),
        (
            {"json": packed({"conversations": DIALOGUE})},
            (Turn("Who runs?", "A boy."), Turn("Where to?", "To the gate.")),
        ),
    ]
    members = []
    for number, (files, _) in enumerate(texts):
        members += [(f"{number}.mp4", mp4), *((f"{number}.{end}", data) for end, data in files.items())]
    shard = write_tar(tmp_path / "x.tar", members)
    data = corpus(tmp_path, shard)
    assert [data.records[index].turns for index in range(len(data))] == [turns for _, turns in texts]
    assert data.records.num_pairs.tolist() == [1, 1, 1, 1, 1, 2]
    every = corpus(tmp_path, shard, qa_sampling="all")
    asked = [load(every, index).turns[0].question for index in range(len(every))]
    assert asked == ["", "", "", "Who?", "Who?", "Who runs?", "Where to?"]
    together = load(corpus(tmp_path, shard, multi_turn=True), 5)
    assert together.turns == texts[5][1] and together.name == f"{shard}/5.mp4"


def test_a_part_of_a_clip_and_the_rule_of_frames(tmp_path, clip) -> None:
    """start, end and num_frames mean what they do in an annotation file; a shorter clip is padded."""
    fields = {"caption": "x", "start": 0.4, "end": 1.2}
    shard = write_tar(tmp_path / "x.tar", [("a.mp4", clip.read_bytes()), ("a.json", packed(fields))])
    (tmp_path / "a.json").write_text(json.dumps([{**fields, "video": str(clip)}]))
    on_disk = DatasetSettings(anno_path=str(tmp_path / "a.json"), num_frames=6, sampling="rand")
    expected = load(InstructionCorpus.from_settings("clips", on_disk, transform=EvalTransform(SIZE)), 0)
    found = load(corpus(tmp_path, shard, num_frames=6, sampling="rand"), 0)
    assert torch.equal(found.pixel_values, expected.pixel_values) and found.turns == expected.turns
    assert len(load(corpus(tmp_path, shard, num_frames=50), 0).pixel_values) == 50


BAD: list[tuple[dict[str, Any], type[UserError], str, str]] = [
    ({"a.txt": b"text"}, MediaError, "the text has no video beside it", "missing"),
    ({"a.mp4": None}, AnnotationError, "found neither txt nor json beside the clip", "annotation"),
    ({"a.mp4": None, "a.json": b"{"}, AnnotationError, "the text beside the clip cannot be read", "annotation"),
    ({"a.mp4": None, "a.txt": b"\xff\xfe"}, AnnotationError, "the text beside the clip cannot be read", "annotation"),
    ({"a.mp4": None, "a.json": b"[1]"}, AnnotationError, r"found '\[1\]' in the json", "annotation"),
    ({"a.mp4": None, "a.json": b'{"url": "x"}'}, AnnotationError, "found a json with url", "annotation"),
    ({"a.mp4": None, "a.txt": b" \n"}, AnnotationError, "found an empty answer", "annotation"),
    (
        {"a.mp4": None, "a.json": packed({"conversations": DIALOGUE[1:]})},
        AnnotationError,
        r"as turn 1 of the conversation, expected \{from: human",
        "annotation",
    ),
    ({"a.mp4": None, "a.json": packed({"caption": "x", "start": 99})}, MediaError, "outside the video", "bounds"),
    ({"a.mp4": None, "a.json": b" " * (2 << 20)}, MediaError, "found a caption of 2,097,152 bytes", "unreadable"),
    ({"a.mp4": b"no video" * 99, "a.txt": b"x"}, MediaError, "found text", "unreadable"),
    ({"a.mp4": "cut", "a.txt": b"x"}, MediaError, "without its index", "unreadable"),
]


@pytest.mark.parametrize(("files", "error", "words", "cause"), BAD)
def test_a_bad_sample_is_named_and_the_next_one_is_read(tmp_path, clip, files, error, words, cause) -> None:
    mp4 = clip.read_bytes()
    members = [(name, mp4 if data is None else mp4[:600] if data == "cut" else data) for name, data in files.items()]
    shard = write_tar(tmp_path / "x.tar", [*members, ("b.mp4", mp4), ("b.txt", b"good")])
    data = corpus(tmp_path, shard)
    assert len(data) == 2
    with pytest.raises(error, match=words) as caught:
        load(data, 0)
    assert str(caught.value).startswith(f"{shard}/a.") and caught.value.cause == cause
    assert load(data, 1).turns[0].answer == "good"


def test_shards_without_a_clip_are_refused(tmp_path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.png", picture(1)), ("a.txt", b"text")])
    with pytest.raises(UserError, match="clips: found no video in 1 shards; expected mp4"):
        corpus(tmp_path, shard)
    with pytest.raises(UserError, match="shards: found none"):
        datasets.get("video_text").from_settings("clips", DatasetSettings(), transform=EvalTransform(SIZE))


def test_remote_clips_survive_the_bound_of_the_cache(tmp_path, clip, server, caplog) -> None:  # noqa: F811
    """A tar that makes room for another one while its clip is being read is still read to the end."""
    url, asked = server
    for number in range(3):
        members = [("a.mp4", clip.read_bytes()), ("a.txt", b"caption %d" % number)]
        write_tar(tmp_path / "data" / f"{number}.tar", members)
    one = (tmp_path / "data" / "0.tar").stat().st_size
    with caplog.at_level(logging.WARNING):
        data = corpus(tmp_path, f"{url}/{{0..2}}.tar", cache_gb=1.5 * one / 2**30)
    assert "fetched again and again" in caplog.text
    first = data.records[0].member
    assert first is not None
    with open_media(first) as reader:
        assert [load(data, index).turns[0].answer for index in (1, 2)] == ["caption 1", "caption 2"]
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
        assert [read_code(frame) for frame in reader.frames([30, 2])] == [30, 2]
    assert len(asked) > 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_worker_gives_the_same(tmp_path, clip, num_workers) -> None:
    members = []
    for number in range(6):
        members += [(f"{number}.mp4", clip.read_bytes()), (f"{number}.json", packed({"conversations": DIALOGUE}))]
    data = corpus(tmp_path, write_tar(tmp_path / "x.tar", members), sampling="rand")
    order = [3, 0, 5, 1, 4, 2]
    loaded = DataLoader(AsDataset(data), batch_size=None, sampler=order, num_workers=num_workers)  # type: ignore[arg-type]
    for index, (_, answer, pixels) in zip(order, loaded, strict=True):
        here = load(data, index)
        assert answer == here.turns[0].answer and torch.equal(pixels, here.pixel_values)


def test_features_are_kept_by_shard_number_and_name(tmp_path, clip) -> None:
    """Two samples of one name in a shard have features of their own."""
    pair = [("a.mp4", clip.read_bytes()), ("a.txt", b"x")]
    shard = write_tar(tmp_path / "data" / "x.tar", [*pair, ("b.mp4", clip.read_bytes()), ("b.txt", b"y"), *pair])
    data = corpus(tmp_path, shard, media_dir=str(tmp_path / "data"))
    assert [data.key_of(index) for index in range(3)] == ["x.tar/0/a.mp4", "x.tar/1/b.mp4", "x.tar/2/a.mp4"]
    writer = FeatureWriter(tmp_path / "features", stage="qformer", settings={})
    for index in range(3):
        writer.add(data.key_of(index), torch.full((4, 2, 3), float(index)))
    writer.finish()
    data.features = FeatureStore(tmp_path / "features")
    assert load(data, 2).query_features.equal(torch.full((4, 2, 3), 2.0))


def test_an_annotation_file_finds_its_clips_in_tars(tmp_path, clip, capsys) -> None:
    """By the names that the tars have, dots and folders included; the texts are the file's."""
    other = copy_packets(clip, tmp_path / "other.mkv")
    names = {"clips/v_1.2_3.5.mp4": clip, "b.mkv": other}
    write_tar(tmp_path / "0.tar", [(f"./{name}", path.read_bytes()) for name, path in names.items()])
    write_tar(
        tmp_path / "1.tar", [("c.mp4", clip.read_bytes()), ("b2.mp4", b"x"), ("x" * 150 + ".mp4", clip.read_bytes())]
    )
    asked = [*names, "c.mp4", "x" * 150 + ".mp4", "gone.mp4"]
    records = [{"video": name, "QA": [{"q": f"Question {name}?", "a": "yes"}]} for name in asked]
    anno = tmp_path / "train.json"
    anno.write_text(json.dumps(records))
    data = corpus(tmp_path, tmp_path / "{0,1}.tar", "instruction", anno_path=str(anno))
    for index, name in enumerate(asked[:4]):
        sample = load(data, index)
        assert sample.turns[0].question == f"Question {name}?" and data.key_of(index) == name
        on_disk = {"video": str(names.get(name, clip)), "QA": records[index]["QA"]}
        (tmp_path / "one.json").write_text(json.dumps([on_disk]))
        settings = DatasetSettings(anno_path=str(tmp_path / "one.json"), num_frames=4, sampling="middle")
        expected = load(InstructionCorpus.from_settings("clips", settings, transform=EvalTransform(SIZE)), 0)
        assert torch.equal(sample.pixel_values, expected.pixel_values)
    with pytest.raises(MediaError, match=r"gone\.mp4: no clip of that name is in the 2 shards") as caught:
        load(data, 4)
    assert caught.value.cause == "missing"
    entry = {"anno_path": str(anno), "shards": str(tmp_path / "{0,1}.tar"), "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "data.yaml").write_text(json.dumps({"datasets": {"clips": entry}}))
    asked_doctor = ["doctor", "--cfg-path", str(tmp_path / "data.yaml"), "--decode", "first", "--num-workers", "0"]
    assert main([*asked_doctor, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(fault["kind"], fault["subject"]) for fault in report["faults"]] == [("missing", "gone.mp4")]
    write_tar(tmp_path / "1.tar", [("b.mkv", other.read_bytes())])
    with pytest.raises(MediaError, match=r"b\.mkv: found it in .*0\.tar and in .*1\.tar, expected it once"):
        load(corpus(tmp_path, tmp_path / "{0,1}.tar", "instruction", anno_path=str(anno)), 1)
