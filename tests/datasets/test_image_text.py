"""Image-text shards: pairs, random access, damaged files, indexes, remote shards and the limit of the cache."""

import io
import json
import logging
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from stllm.common.errors import UserError
from stllm.common.registry import datasets
from stllm.common.schema import DatasetSettings
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.features import FeatureStore, FeatureWriter
from stllm.datasets.image_text import ImageTextCorpus
from stllm.datasets.mixture import Mixture, MixturePart
from stllm.datasets.samples import SampleKey, Stream, keyed_numpy
from stllm.datasets.shards import reader as shard_reader
from stllm.datasets.shards.index import SampleSpan, scan
from stllm.datasets.shards.sources import allow_pipes, expand_shards
from stllm.media import info as media_info
from stllm.media.info import MediaError
from stllm.processors.templates import Turn
from stllm.processors.transforms import EvalTransform, TrainTransform

SIZE = 16


@pytest.fixture
def pipes() -> Iterator[None]:
    """Allow pipes, as --allow-pipe does."""
    allow_pipes(True)
    yield
    allow_pipes(False)


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    media_info.warn_once.cache_clear()


def picture(number: int, suffix: str = "png") -> bytes:
    """Return an image whose grey level encodes its number."""
    data = io.BytesIO()
    Image.new("RGB", (24, 18), (number * 4,) * 3).save(data, {"jpg": "jpeg"}.get(suffix, suffix))
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first: int, count: int, suffix: str = "png") -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + count):
        members += [
            (f"{number:05d}.{suffix}", picture(number, suffix)),
            (f"{number:05d}.txt", b"caption %d\n" % number),
        ]
    return members


@pytest.fixture
def shards(tmp_path) -> str:
    """Write three shards of 5, 1 and 4 pairs. Pairs are numbered from 0 to 9."""
    for shard, (first, count) in enumerate([(0, 5), (5, 1), (6, 4)]):
        write_tar(tmp_path / "data" / f"{shard:05d}.tar", pairs(first, count))
    return str(tmp_path / "data" / "{00000..00002}.tar")


def corpus(tmp_path: Path, shards, **changed) -> ImageTextCorpus:
    given = {"name": "pairs", "shards": shards, "transform": EvalTransform(SIZE), "cache_dir": tmp_path / "cache"}
    return ImageTextCorpus(**{**given, **changed})


def load(data: ImageTextCorpus, index: int, epoch: int = 0):
    return data.load(SampleKey(epoch, 0, 0, index), keyed_numpy(0, Stream.SAMPLE, epoch, 0, index))


def grey(sample) -> int:
    """Return the number that the image of a sample encodes."""
    return round(float(sample.pixel_values.float().mean()) / 4)


def test_every_pair_is_reached_in_any_order(tmp_path, shards) -> None:
    data = datasets.get("image_text")(
        name="pairs", shards=shards, transform=EvalTransform(SIZE), cache_dir=tmp_path / "cache"
    )
    assert len(data) == 10
    for index in (9, 0, 5, 4, 6, 0):
        sample = load(data, index)
        assert sample.pixel_values.shape == (1, 3, SIZE, SIZE) and sample.pixel_values.dtype == torch.uint8
        assert (sample.media, grey(sample), sample.turns[0].answer) == ("image", index, f"caption {index}")
        assert (sample.turns[0].question, sample.turns[0].instruction, sample.key.index) == ("", "", index)
        assert sample.name.endswith(f".tar/{index:05d}.png")
    with pytest.raises(IndexError):
        load(data, 10)


def test_features_in_place_of_images(tmp_path, shards) -> None:
    data = corpus(tmp_path, shards, root=str(tmp_path / "data"))
    keys = [data.key_of(index) for index in range(10)]
    assert keys[0] == "00000.tar/0/00000.png" and keys[9] == "00002.tar/3/00009.png" and len(set(keys)) == 10
    writer = FeatureWriter(tmp_path / "features", stage="qformer", settings={})
    for index in range(9):
        writer.add(keys[index], torch.full((1, 2, 3), float(index)))
    writer.finish()
    stored = corpus(tmp_path, shards, root=str(tmp_path / "data"), max_samples=10)
    stored.features = FeatureStore(tmp_path / "features")
    sample = load(stored, 7)
    assert sample.pixel_values is None and sample.query_features.equal(torch.full((1, 2, 3), 7.0))
    assert sample.turns == load(data, 7).turns
    with pytest.raises(MediaError, match=r"found no features of 00002\.tar/3/00009\.png"):
        load(stored, 9)


def test_formats_names_and_neighbours(tmp_path) -> None:
    long = "folder/" + "x" * 150
    members = [
        *pairs(1, 1, "jpg"),
        ("b.WEBP", picture(2, "webp")),
        ("b.json", json.dumps({"caption": "from json \ud83d"}).encode()),
        ("c.json", b'{"caption": "not this"}'),
        ("c.txt", b"text goes first"),
        ("c.seg.png", picture(60)),  # webdataset: another field of c
        ("c.jpeg", picture(3, "jpeg")),
        (f"{long}.png", picture(4)),
        (f"{long}.txt", "é — long name".encode()),
        ("README", b"no sample"),
        ("d.cls", b"7"),
        ("e.png", picture(5)),
        ("e.png", picture(61)),
        ("e.txt", b"the first"),
        ("e.txt", b"the second"),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        data = corpus(tmp_path, str(write_tar(tmp_path / f"{form}.tar", members, form)))
        found = [(grey(sample), sample.turns[0].answer) for sample in (load(data, index) for index in range(len(data)))]
        expected = ["caption 1", "from json ?", "text goes first", "é — long name", "the first"]
        assert found == list(zip([1, 2, 3, 4, 5], expected, strict=True))


def test_the_instruction_and_the_crop_are_drawn_by_the_generator(tmp_path, shards) -> None:
    write_tar(tmp_path / "noise.tar", [("a.png", noise()), ("a.txt", b"noise")])
    texts = [f"Describe it, {number}." for number in range(4)]
    data = corpus(tmp_path, str(tmp_path / "noise.tar"), transform=TrainTransform(SIZE), instruction=texts)
    first, again = load(data, 0, epoch=1), load(data, 0, epoch=1)
    assert first.turns == again.turns and torch.equal(first.pixel_values, again.pixel_values)
    epochs = [load(data, 0, epoch) for epoch in range(20)]
    assert {sample.turns[0].instruction for sample in epochs} == set(texts)
    assert len({sample.pixel_values.numpy().tobytes() for sample in epochs}) == 20


def test_a_configuration_entry_makes_an_image_text_corpus(tmp_path, shards) -> None:
    entry = DatasetSettings(shards=shards, instruction="Look.", max_samples=7, cache_dir=str(tmp_path / "cache"))
    data = datasets.get("image_text").from_settings("pairs", entry, transform=EvalTransform(SIZE))
    assert (len(data), data.media, data.name) == (7, "image", "pairs")
    assert load(data, 6).turns == (Turn("", "caption 6", "Look."),)
    with pytest.raises(IndexError):
        load(data, 7)
    with pytest.raises(UserError, match="data set pairs: no shards are given"):
        ImageTextCorpus.from_settings("pairs", DatasetSettings(), transform=EvalTransform(SIZE))


def noise() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(data, "png")
    return data.getvalue()


class AsDataset(Dataset):
    """A corpus as a torch data set for data workers. It is read once before the workers start."""

    def __init__(self, data: ImageTextCorpus) -> None:
        self.data = data
        load(data, 0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        sample = load(self.data, index)
        return sample.turns[0].instruction, sample.turns[0].answer, sample.pixel_values


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_worker_gives_the_same_samples(tmp_path, shards, num_workers) -> None:
    data = corpus(tmp_path, shards, transform=TrainTransform(SIZE), instruction=["a", "b", "c"])
    order = [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]
    loaded = DataLoader(AsDataset(data), batch_size=None, sampler=order, num_workers=num_workers)
    for index, (instruction, answer, pixels) in zip(order, loaded, strict=True):
        here = load(data, index)
        assert (instruction, answer) == (here.turns[0].instruction, here.turns[0].answer)
        assert torch.equal(pixels, here.pixel_values)


def test_a_corpus_can_be_sent_to_another_process_and_keeps_few_files_open(tmp_path, shards, monkeypatch) -> None:
    monkeypatch.setattr(shard_reader, "MAX_OPEN", 1)
    data = corpus(tmp_path, shards)
    assert [grey(load(data, index)) for index in (0, 9, 1)] == [0, 9, 1]
    assert len(data.reader._open) == 1
    assert grey(load(pickle.loads(pickle.dumps(data)), 7)) == 7


BAD = [
    ([("a.png", b"\x89PNG\r\n\x1a\n broken"), ("a.txt", b"text")], MediaError, "damaged or cut image", "unreadable"),
    ([("a.txt", b"text")], MediaError, "no image beside it", "missing"),
    ([("a.png", picture(1))], AnnotationError, "no caption beside it", "annotation"),
    ([("a.png", picture(1)), ("a.txt", b" \n")], AnnotationError, "found the caption", "annotation"),
    ([("a.png", picture(1)), ("a.txt", b"\xff\xfe")], AnnotationError, "expected UTF-8 text", "annotation"),
    ([("a.png", picture(1)), ("a.json", b"[1]")], AnnotationError, "a JSON object", "annotation"),
    ([("a.png", picture(1)), ("a.json", b"{")], AnnotationError, "a JSON object", "annotation"),
    ([("a.png", picture(1)), ("a.json", b'{"text": "x"}')], AnnotationError, "found the caption None", "annotation"),
    ([("a.png", b""), ("a.txt", b"text")], MediaError, r"damaged or cut image \(no picture.s format\)", "unreadable"),
]


@pytest.mark.parametrize(("members", "error", "words", "cause"), BAD)
def test_a_bad_pair_is_reported_and_the_next_one_is_read(tmp_path, members, error, words, cause) -> None:
    data = corpus(tmp_path, str(write_tar(tmp_path / "x.tar", [*members, *pairs(7, 1)])))
    assert len(data) == 2
    with pytest.raises(error, match=words) as caught:
        load(data, 0)
    assert str(caught.value).startswith(f"{tmp_path / 'x.tar'}/a.") and caught.value.cause == cause
    assert grey(load(data, 1)) == 7


def test_a_bad_pair_is_replaced_as_a_whole(tmp_path) -> None:
    members = [member for number, (bad, *_) in enumerate(BAD) for member in [*pairs(number, 1), *bad]]
    data = corpus(tmp_path, str(write_tar(tmp_path / "x.tar", members)))
    assert len(data) == 2 * len(BAD)
    for index in range(len(data)):
        sample = Mixture([MixturePart(data)], seed=0, max_tries=50)[SampleKey(0, 0, 0, index)]
        assert sample.turns[0].answer == f"caption {grey(sample)}" and sample.key.index == 2 * grey(sample)
        assert bool(sample.failures) == bool(index % 2)
        assert all(failure.subject.startswith(f"{tmp_path / 'x.tar'}/a.") for failure in sample.failures)


@pytest.mark.parametrize("missing", [1, 300, 1000, 3000, 20 * 512])
def test_an_incomplete_tar_gives_its_complete_samples_and_one_warning(tmp_path, caplog, missing) -> None:
    path = write_tar(tmp_path / "cut.tar", pairs(0, 10, "jpg"))
    with path.open("r+b") as file:
        whole = file.seek(0, os.SEEK_END) // 1024 * 1024
        end = SampleSpan(*scan(path, "x")[0][-1].tolist())
        file.truncate(min(whole, (sum(end.caption) + 511) // 512 * 512 + 512) - missing)
    with caplog.at_level(logging.WARNING):
        data, again = corpus(tmp_path, str(path)), corpus(tmp_path, str(path))
    assert len(caplog.records) == 1 and "the tar is damaged or cut" in caplog.text
    assert len(data) == len(again) and 3 <= len(data) <= 10
    assert [grey(load(data, index)) for index in range(len(data))] == list(range(len(data)))


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path, caplog) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(0, 5))
    rows = scan(path, "x")[0]
    with path.open("r+b") as file:
        file.seek(int(rows[3][0]) - 512)
        file.write(b"garbage" * 20)
    assert len(corpus(tmp_path, str(path))) == 3
    assert "the 3 samples before that are used" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<html>404</html>" * 99, "no tar"),
        (b"\x1f\x8b\x08" + bytes(99), "decompress it"),
    ],
)
def test_a_file_that_is_no_tar_is_a_warning_among_others_and_an_error_alone(tmp_path, caplog, content, words) -> None:
    bad = tmp_path / "bad.tar"
    bad.write_bytes(content)
    good = write_tar(tmp_path / "good.tar", pairs(0, 2))
    assert len(corpus(tmp_path, [str(bad), str(good)])) == 2
    assert words in caplog.text
    with pytest.raises(UserError, match="found no image or caption in 1 shards"):
        corpus(tmp_path, str(bad))


def test_a_missing_shard_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match="there is no such shard"):
        corpus(tmp_path, str(tmp_path / "{0..1}.tar"))


def test_the_index_is_kept_and_made_again_when_the_tar_changes(tmp_path, monkeypatch) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(0, 3))
    scans: list[Path] = []

    def counted(tar: Path, name: str):
        scans.append(tar)
        return scan(tar, name)

    monkeypatch.setattr("stllm.datasets.shards.index.scan", counted)
    assert [len(corpus(tmp_path, str(path))) for _ in range(3)] == [3, 3, 3]
    assert scans == [path]
    write_tar(path, pairs(10, 4))
    assert (len(corpus(tmp_path, str(path))), len(scans)) == (4, 2)
    os.utime(path, ns=(1, 1))
    assert (len(corpus(tmp_path, str(path))), len(scans)) == (4, 3)
    (index,) = (tmp_path / "cache").glob("*.index")
    index.write_bytes(index.read_bytes()[:20])
    assert (len(corpus(tmp_path, str(path))), len(scans)) == (4, 4)


def test_equal_names_in_two_folders_do_not_share_an_index(tmp_path) -> None:
    first = write_tar(tmp_path / "a" / "0.tar", pairs(0, 2))
    second = write_tar(tmp_path / "b" / "0.tar", pairs(20, 3))
    data = corpus(tmp_path, [str(first), str(second)])
    assert [grey(load(data, index)) for index in range(5)] == [0, 1, 20, 21, 22]


def test_a_tar_that_changes_during_a_run_never_gives_a_wrong_pair(tmp_path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(0, 3))
    data = corpus(tmp_path, str(path))
    load(data, 0)
    path.write_bytes(bytes(512) + path.read_bytes())
    with pytest.raises(MediaError, match="has changed since it was indexed"):
        load(data, 1)


def test_names_are_expanded(tmp_path, pipes) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.tar").touch()
    a, b, c = (str(tmp_path / f"{name}.tar") for name in "abc")
    assert expand_shards(str(tmp_path / "*.tar")) == [a, b, c]
    assert expand_shards([c, str(tmp_path / "{b,a}.tar")]) == [c, b, a]
    assert expand_shards(f"file://{a}") == [a]
    assert expand_shards("s3://bucket/{000..002}.tar") == [f"s3://bucket/00{number}.tar" for number in range(3)]
    assert expand_shards("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    for wrong, words in [
        (str(tmp_path / "*.zip"), "nothing matches"),
        ([a, a], "named twice"),
        ([], "found none"),
        ("{1..", "cannot be expanded"),
        ("${UNSET_NAME}/x.tar", "cannot be expanded"),
        ("gopher://x/0.tar", "has the scheme 'gopher', expected one of http, "),
    ]:
        with pytest.raises(UserError, match=words):
            expand_shards(wrong)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and records the requests."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Return the URL of a local http server for `tmp_path / "data"`, and the list of its requests."""
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    asked: list[str] = []
    handler = type("Handler", (Quiet,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "data")))
    thread = threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_remote_shards_are_fetched_once(tmp_path, shards, server) -> None:
    url, asked = server
    data = corpus(tmp_path, f"{url}/{{00000..00002}}.tar")
    assert [grey(load(data, index)) for index in (9, 0, 5)] == [9, 0, 5]
    assert [grey(load(corpus(tmp_path, data.shards), index)) for index in (8, 1)] == [8, 1]
    assert sorted(asked) == [f"/0000{number}.tar" for number in range(3)]


def test_the_cache_stays_below_its_limit(tmp_path, shards, server, caplog) -> None:
    url, asked = server
    total = sum(path.stat().st_size for path in (tmp_path / "data").glob("*.tar"))
    data = corpus(tmp_path, f"{url}/{{00000..00002}}.tar", cache_gb=(total - 1) / 2**30)
    assert "fetched again and again" in caplog.text
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert [grey(load(data, index)) for index in (0, 5, 9, 1)] == [0, 5, 9, 1]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert 3 < len(asked) < 9


def test_the_cache_never_deletes_local_tars(tmp_path, shards, server) -> None:
    url, _ = server
    names = [f"{url}/00000.tar", f"{url}/00001.tar", str(tmp_path / "data" / "00002.tar")]
    data = corpus(tmp_path, names, cache_dir=tmp_path / "data", cache_gb=1e-9)
    assert [grey(load(data, index)) for index in (0, 5, 9)] == [0, 5, 9]
    assert {"00000.tar", "00001.tar", "00002.tar"} < {path.name for path in (tmp_path / "data").glob("*.tar")}


def test_a_name_in_another_encoding_is_read(tmp_path, shards) -> None:
    os.rename(tmp_path / "data" / "00001.tar", os.fsencode(tmp_path / "data") + b"/l\xe9.tar")
    assert len(corpus(tmp_path, str(tmp_path / "data" / "*.tar"))) == 10


def test_a_pipe_and_an_object_store_are_read(tmp_path, shards, pipes, monkeypatch) -> None:
    path = tmp_path / "data" / "00002.tar"
    assert grey(load(corpus(tmp_path, f"pipe:cat {path}"), 1)) == 7
    tool = tmp_path / "bin" / "aws"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\ntest "$*" = "s3 cp s3://bucket/it\'s.tar -" && cat {path}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert grey(load(corpus(tmp_path, "s3://bucket/it's.tar"), 0)) == 6


@pytest.mark.parametrize(
    "shard", ["{url}/no.tar", "pipe:printf half; exit 3", "pipe:no-program", "hf://datasets/../../x.tar"]
)
def test_a_failed_download_gives_one_sentence_and_leaves_no_file(tmp_path, shards, server, pipes, shard) -> None:
    with pytest.raises(MediaError, match="the shard cannot be fetched") as caught:
        corpus(tmp_path, shard.replace("{url}", server[0]))
    assert "curl'" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.tar")) and not list((tmp_path / "cache").glob(".*partial"))


def test_a_missing_program_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MediaError, match=r"needs the program 'curl'|exit 127"):  # as webdataset has it
        corpus(tmp_path, "http://127.0.0.1:9/0.tar")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([".png", ".txt", ".json", ".cls"]), max_size=8), st.integers(0, 9))
def test_image_and_text_of_different_pairs_are_never_mixed(tmp_path_factory, suffixes, split) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    members: list[tuple[str, bytes]] = []
    for number, suffix in enumerate(suffixes):
        sample = number // (split + 1)
        data = {".png": picture(sample), ".json": b'{"caption": "%d"}' % sample}.get(suffix, b"%d" % sample)
        members.append((f"{sample}{suffix}", data))
    rows, _, fault = scan(write_tar(folder / "x.tar", members), "x")
    assert fault == "" if members else True
    content = (folder / "x.tar").read_bytes()
    for row in rows.tolist():
        (image, image_size), (caption, caption_size) = row[:2], SampleSpan(*row).caption
        if image >= 0 and caption >= 0:
            number = int("".join(filter(str.isdigit, content[caption : caption + caption_size].decode())))
            assert content[image : image + image_size] == picture(number)
