"""What can be wrong with image-text shards and with folders of precomputed features."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stllm.common.errors import UserError
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.faults import Fault
from stllm.datasets.features import FeatureStore
from stllm.datasets.image_text import caption_of
from stllm.datasets.shards import ABSENT, Content, Entry, ShardReader
from stllm.doctor.media import SECONDS_OPTION
from stllm.media.images import decode_image
from stllm.media.info import MediaError
from stllm.media.time_bound import read_within


def check_shard(
    shard: str,
    *,
    decode: str,
    cache_dir: str | Path | None = None,
    cache_gb: float | None = None,
    media_seconds: float = 0,
) -> list[Fault]:
    """What is wrong with one shard. decode: "none" of its samples (its headers alone), the "first" one, or "all".

    media_seconds: the limit on reading a sample; 0: none.
    """
    reader = ShardReader(cache_dir=cache_dir, cache_gb=cache_gb)
    try:
        index = reader.index(shard)
    except UserError as error:
        return [Fault("missing", shard, shard, str(error).removeprefix(f"{shard}: "))]
    faults = [Fault("unreadable", shard, shard, index.fault.removeprefix(f"{shard}: "))] if index.fault else []
    if not index.num_samples and not index.fault:
        sentence = "found no image or caption in it; expected jpg, png or webp with txt or json of the same name"
        faults.append(Fault("incomplete", shard, shard, sentence))
    num_read = {"none": 0, "first": min(1, index.num_samples), "all": index.num_samples}[decode]
    for sample in range(index.num_samples):
        faults += _half(shard, sample, index.entry(sample))
        if sample < num_read:
            faults += _read(reader, shard, sample, media_seconds)
    reader.close()
    return faults


def _half(shard: str, sample: int, entry: Entry) -> Iterator[Fault]:
    """What the index alone tells of a sample."""
    where = f"{shard}, sample {sample + 1}"
    if entry.image == ABSENT:
        yield Fault("incomplete", where, "image", "the caption has no image beside it; add it, or leave the sample out")
    if entry.caption == ABSENT:
        yield Fault("incomplete", where, "caption", "the image has no txt or json beside it; add it, or leave it out")
    elif entry.caption_bytes == 0:
        yield Fault("empty answer", where, "caption", "the caption holds 0 bytes; write one, or leave the sample out")


def _read(reader: ShardReader, shard: str, sample: int, media_seconds: float) -> Iterator[Fault]:
    where = f"{shard}, sample {sample + 1}"

    def read() -> Content:
        content = reader.read(shard, sample)
        if content.image is not None:
            decode_image(content.image, content.name)
        return content

    try:
        content = read_within(media_seconds, read, medium=where, setting=SECONDS_OPTION)
    except MediaError as error:
        yield Fault("unreadable", where, "image", str(error))
        return
    try:
        if content.caption:
            caption_of(content, content.name)
    except AnnotationError as error:
        yield Fault("empty answer", where, content.name, str(error).removeprefix(f"{content.name}: "))


def check_features(folder: str, keys: list[tuple[str, str]], *, decode: str, media_seconds: float = 0) -> list[Fault]:
    """What is wrong with a folder of features. keys: the clip's key and its record, of each clip that must be there.

    decode: "none" of them, or the tensors of all (they are small). media_seconds: the limit on reading one; 0: none.
    """
    try:
        store = FeatureStore(folder)
    except UserError as error:
        return [Fault("missing", folder, folder, str(error).removeprefix(f"{folder}: "))]
    wanted = keys if decode != "none" else []
    return [fault for key, where in wanted for fault in _stored(store, key, where, media_seconds)]


def _stored(store: FeatureStore, key: str, where: str, media_seconds: float) -> list[Fault]:
    try:
        read_within(media_seconds, partial(store.load, key), medium=key, setting=SECONDS_OPTION)
    except MediaError as error:
        return [Fault("missing" if error.cause == "missing" else "unreadable", where, key, str(error))]
    return []
