"""Where the samples of a tar shard lie: one scan of its headers, kept in a small file, makes every sample reachable.

Members are grouped as webdataset does: neighbours whose names are equal up to the first dot are one sample. An index
is a safetensors file, mapped into memory: opening one costs microseconds, so hundreds of shards can be at hand.

Letters: N samples in a shard.
"""

import tarfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stllm.common.errors import UserError
from stllm.common.files import replacing

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT, JSON = "txt", "json"
SUFFIXES = (*IMAGE_SUFFIXES, TEXT, JSON)
BLOCK = tarfile.BLOCKSIZE  # of a header; a member's data follow its header at once
ABSENT = -1
MAX_HEADER = 1 << 20  # bytes of a member's name and other fields, which tarfile reads whole
FORMAT = "1"  # of the index; another one is made anew


class Member(NamedTuple):
    """A file of a tar: where its data begin, and how many bytes they are. offset is -1 when there is none."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One sample of a shard: its image, its caption, and whether that is JSON."""

    image: Member
    caption: Member
    is_json: bool


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard.

    rows: (N, 5) int64: offset and size of the image, offset and size of the caption, 1 for JSON; an array, or a slice
        of a mapped file. num_samples: N. size: bytes of the tar. fault: a sentence when the tar is damaged, else "".
    """

    rows: Any
    num_samples: int
    size: int
    fault: str

    def __getitem__(self, sample: int) -> Entry:
        row = [int(value) for value in self.rows[sample : sample + 1][0]]
        return Entry(Member(row[0], row[1]), Member(row[2], row[3]), bool(row[4]))


def load_index(path: Path, tar: Path | None) -> ShardIndex | None:
    """The index kept in `path`; None when there is none, or the tar has another size or time than it had then.

    tar: None for a remote shard, whose index stays true whether its tar is in the cache or not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, "np")
        kept = file.metadata() or {}
        rows = file.get_slice("samples")
    except (FileNotFoundError, SafetensorError):  # of another program, or cut: it is made again
        return None
    if kept.get("format") != FORMAT or (tar is not None and kept["of"] != _stamp(tar)):
        return None
    return ShardIndex(rows, rows.get_shape()[0], int(kept["size"]), kept["fault"])


def build_index(path: Path, tar: Path, name: str) -> ShardIndex:
    """Scans the tar and keeps the index in `path`. name: of the shard, for messages.

    A tar that is damaged, or no tar at all, gives the samples before the damage and says so in `fault`.
    Raises UserError when the tar is not there or may not be read.
    """
    from safetensors.numpy import save_file

    stamp = _stamp(tar)
    rows, fault = scan(tar, name)
    size = tar.stat().st_size
    kept = {"format": FORMAT, "of": stamp, "size": str(size), "fault": fault}
    with replacing(path) as partial:
        save_file({"samples": rows}, partial, metadata=kept)
    return ShardIndex(rows, len(rows), size, fault)


def scan(tar: Path, name: str) -> tuple[np.ndarray, str]:
    """The samples of a tar, (N, 5) int64, and what is wrong with it ("" when nothing is); see `build_index`."""
    members, is_whole = _members(tar, name)
    rows = []
    for _, neighbours in groupby(members, key=lambda member: member[0]):
        files: dict[str, Member] = {}
        for _, suffix, member in neighbours:
            files.setdefault(suffix, member)  # a second image or caption of one name could be another pair's
        rows.append(_row(files))
    if not is_whole and rows and ABSENT in rows[-1]:
        rows.pop()  # its other half lies behind the cut
    fault = "" if is_whole else _fault(tar, name, len(rows))
    return np.array(rows, np.int64).reshape(-1, 5), fault


def _row(files: dict[str, Member]) -> list[int]:
    nothing = Member(ABSENT, 0)
    image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), nothing)
    caption = files.get(TEXT, files.get(JSON, nothing))
    return [*image, *caption, int(TEXT not in files and JSON in files)]


class _Header(tarfile.TarInfo):
    """A member's header, refused where its size is negative, or that of a header's extension exceeds MAX_HEADER."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        extends = header.type in b"xgXLK"  # pax, Solaris, GNU's long names
        if header.size < 0 or (extends and header.size > MAX_HEADER):
            raise tarfile.HeaderError(f"a header of {header.size} bytes")
        return header


def _members(tar: Path, name: str) -> tuple[list[tuple[str, str, Member]], bool]:
    """(key, suffix, place) of each image and caption of a tar in order, and whether it came to its proper end."""
    from webdataset.tariterators import base_plus_ext

    found: list[tuple[str, str, Member]] = []
    size = tar.stat().st_size
    try:
        archive: Any  # its `members` are missing in the standard library's stubs
        with tarfile.open(tar, "r:", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # else it keeps every header it has seen
                key, suffix = base_plus_ext(member.name)
                if member.offset_data + member.size > size:
                    return found, False
                if key is not None and suffix.lower() in SUFFIXES and member.isreg():
                    found.append((key, suffix.lower(), Member(member.offset_data, member.size)))
            with tar.open("rb") as file:  # tarfile takes a damaged header, too, for the end
                file.seek(archive.offset)
                return found, file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):  # headers that are no numbers, or chained
        return found, False
    except OSError as error:
        raise UserError(f"{name}: the shard cannot be read ({error.strerror}), expected a tar: check it") from error


def _fault(tar: Path, name: str, num_samples: int) -> str:
    with tar.open("rb") as file:
        head = file.read(BLOCK)
    if num_samples:
        return f"{name}: the tar is damaged or cut; the {num_samples} samples before that are used: copy it again"
    if not head:
        return f"{name}: the file is empty (0 bytes), expected a tar: copy it again"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return f"{name}: found a compressed file, expected a plain tar, whose members can be reached: decompress it"
    return f"{name}: found no tar with whole samples in it (it begins with {head[:8].hex(' ')}): copy it again"


def _stamp(tar: Path) -> str:
    """What changes when a tar does."""
    status = tar.stat()
    return f"{status.st_size} {status.st_mtime_ns}"
