"""The index of a tar: one scan of its headers, kept in a small file, makes every sample reachable.

Members are grouped as in webdataset: neighbours whose names are equal up to the first dot are one sample. An index is a
safetensors file, mapped into memory: opening one costs microseconds, so hundreds of shards can be open.

Letters in shapes: N samples in a shard, V clips in it.
"""

import hashlib
import os
import tarfile
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from stllm.common.errors import UserError
from stllm.common.files import replacing
from stllm.datasets.annotations import AnnotationError, fields_beside, num_answers
from stllm.datasets.shards.sources import ShardCache, scheme_of
from stllm.media.find import EXTENSIONS

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
VIDEO_SUFFIXES = tuple(extension[1:] for extension in EXTENSIONS)
TEXT, JSON = "txt", "json"
MAX_CAPTION_BYTES = 1 << 20  # limit for a txt or json; a model reads only some thousand tokens
MAX_HEADER = 1 << 20  # limit in bytes for a member's name and other fields, because tarfile reads them whole
BLOCK = tarfile.BLOCKSIZE  # bytes of a header; a member's data follow it directly
ABSENT = -1  # the offset if a sample has no such member
FORMAT = "2"  # version of the index's format; an index of another version is built again
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # first bytes of gzip, bzip2, xz, zstd files


class SampleSpan(NamedTuple):
    """One sample of a shard: where the data of its members begin, and how many bytes they are.

    An offset is -1 when there is no such member. num_answers: number of answers in the texts beside a clip; 0 for an
    image.
    """

    image: int
    image_bytes: int
    video: int
    video_bytes: int
    text: int
    text_bytes: int
    json: int
    json_bytes: int
    num_answers: int

    @property
    def caption(self) -> tuple[int, int]:
        """The offset and the size of an image's caption: those of its text file, or else of its JSON file."""
        return (self.json, self.json_bytes) if self.text == ABSENT else (self.text, self.text_bytes)


class ShardIndex(NamedTuple):
    """The samples of one shard.

    rows: (N, 9) int64, one `SampleSpan` per sample. clips: (V, 3) int64: for each video, the offset and the size of its
    data in bytes, and the `digest` of its name. Both are arrays, or slices of a mapped file.
    num_samples: N. size: bytes of the tar. fault: a sentence when the tar is damaged, else "".
    """

    rows: Any
    clips: Any
    num_samples: int
    size: int
    fault: str

    def entry(self, sample: int) -> SampleSpan:
        """Return the offsets and sizes of the members of one sample."""
        return SampleSpan(*map(int, self.rows[sample : sample + 1][0]))


class _Header(tarfile.TarInfo):
    """A member's header. It is refused when its size is negative or one of its extensions is larger than MAX_HEADER."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        extends = header.type in b"xgXLK"  # pax, Solaris, GNU's long names
        if header.size < 0 or (extends and header.size > MAX_HEADER):
            raise tarfile.HeaderError(f"a header of {header.size} bytes")
        return header


def digest(name: str) -> int:
    """Hash a member's name to an integer of 63 bits; a leading ./ is ignored."""
    data = os.fsencode(os.path.normpath(name))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def open_index(shard: str, cache: ShardCache) -> ShardIndex:
    """Return the index of a shard. It is built if it does not exist, or if the tar's size or time has changed since.

    A remote shard is fetched to be indexed; the index stays valid whether or not its tar is in the cache.
    Raises MediaError when the shard cannot be fetched, UserError when it is not there. See `scan` for damage.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    path = cache.path(shard, ".index")
    tar = None if scheme_of(shard) else cache.tar(shard)
    with suppress(FileNotFoundError, SafetensorError):  # an index of another program, or cut short, is made again
        file: Any = safe_open(path, "np")
        kept = file.metadata() or {}
        if kept.get("format") == FORMAT and (tar is None or kept["of"] == _stamp(tar)):
            rows = file.get_slice("samples")
            return ShardIndex(rows, file.get_slice("clips"), rows.get_shape()[0], int(kept["size"]), kept["fault"])
    tar = tar or cache.tar(shard)
    stamp, size = _stamp(tar), tar.stat().st_size
    rows, clips, fault = scan(tar, shard)
    with replacing(path) as partial:
        texts = {"format": FORMAT, "of": stamp, "size": str(size), "fault": fault}
        save_file({"samples": rows, "clips": clips}, partial, metadata=texts)
    return ShardIndex(rows, clips, len(rows), size, fault)


def scan(tar: Path, name: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Return `ShardIndex.rows` and `ShardIndex.clips` of a tar, and a sentence about its damage ("" if it is intact).

    name: the shard's name in error messages. A damaged tar gives the samples before the damage, a file that is no tar
    gives none. Raises UserError when the tar may not be read.
    """
    from webdataset.tariterators import base_plus_ext

    # key, suffix, (offset, bytes) of each image, video and text
    members: list[tuple[str, str, tuple[int, int]]] = []
    clips: list[tuple[int, int, int]] = []
    is_whole, size = False, tar.stat().st_size
    try:
        archive: Any  # its `members` are missing in the standard library's stubs
        with tarfile.open(tar, "r:", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None and member.offset_data + member.size <= size:
                archive.members = []  # otherwise it keeps every header that it has read
                key, suffix = base_plus_ext(member.name)
                if not member.isreg():
                    continue
                if key is not None and suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, TEXT, JSON):
                    members.append((key, suffix.lower(), (member.offset_data, member.size)))
                if member.name.lower().endswith(EXTENSIONS):
                    clips.append((member.offset_data, member.size, digest(member.name)))
            with tar.open("rb") as file:  # tarfile also takes a damaged header for the end
                file.seek(archive.offset)
                is_whole = member is None and file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):  # headers that are no numbers, or chained
        pass
    except OSError as error:
        raise UserError(f"{name}: the shard cannot be read ({error.strerror}), expected a tar: check it") from error
    rows = []
    with tar.open("rb") as file:
        for _, neighbours in groupby(members, key=lambda member: member[0]):
            files: dict[str, tuple[int, int]] = {}
            for _, suffix, place in neighbours:
                files.setdefault(suffix, place)  # the first file counts: a second one may belong to another sample
            image, video = (
                next((files[suffix] for suffix in suffixes if suffix in files), (ABSENT, 0))
                for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES)
            )
            text, data = files.get(TEXT, (ABSENT, 0)), files.get(JSON, (ABSENT, 0))
            count = 0 if video[0] == ABSENT else _count_answers(file, text, data)
            rows.append(SampleSpan(*image, *video, *text, *data, count))
    if not is_whole and rows and (rows[-1].caption[0] == ABSENT or rows[-1].image == rows[-1].video == ABSENT):
        rows.pop()  # the rest of this sample is missing
    samples, videos = np.array(rows, np.int64).reshape(-1, 9), np.array(clips, np.int64).reshape(-1, 3)
    if is_whole:
        return samples, videos, ""
    with tar.open("rb") as file:
        head = file.read(BLOCK)
    if rows:
        found = f"the tar is damaged or cut; the {len(rows)} samples before that are used: copy it again"
    elif not head:
        found = "the file is empty (0 bytes), expected a tar: copy it again"
    elif head.startswith(_COMPRESSED):
        found = "found a compressed file, expected a plain tar, whose members can be reached: decompress it"
    else:
        found = f"found no tar with whole samples in it (it begins with {head[:8].hex(' ')}): copy it again"
    return samples, videos, f"{name}: {found}"


def _count_answers(file: BinaryIO, text: tuple[int, int], data: tuple[int, int]) -> int:
    """Count the answers in the texts beside a clip, given the places of the texts; 0 if they cannot be read."""
    content: bytes | None = None
    if data[0] != ABSENT:
        if data[1] > MAX_CAPTION_BYTES:
            return 0
        file.seek(data[0])
        content = file.read(data[1])
    try:
        return num_answers(fields_beside(None if text[0] == ABSENT else b"a caption", content, ""))
    except AnnotationError:
        return 0


def _stamp(tar: Path) -> str:
    """Return a text that changes when the tar changes."""
    status = tar.stat()
    return f"{status.st_size} {status.st_mtime_ns}"
