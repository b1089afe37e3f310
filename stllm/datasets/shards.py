"""Tar shards, local or remote. Their samples are indexed once, and then read by offset in any order.

Training asks for samples in any order, and a sample must be the same in every process that reads it. A stream from the
network allows neither. So a remote shard is fetched once (fetching.py) and is then a local file like any other. One
scan of a tar's headers, kept in a small file, makes every sample reachable. Members are grouped as in webdataset:
neighbours whose names are equal up to the first dot are one sample. An index is a safetensors file, mapped into memory:
opening one costs microseconds, so hundreds of shards can be open.

Letters: N samples in a shard.
"""

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stllm.common.errors import UserError
from stllm.common.files import replacing, user_path
from stllm.datasets.fetching import fetch, scheme_of
from stllm.media.info import MediaError
from stllm.media.time_bound import unbounded

MAX_OPEN = 128  # files a process keeps open; systems commonly allow 1024
GIB = 2**30
FETCHED = re.compile(r"-[0-9a-f]{16}\.tar$")  # the name of a fetched shard; the folder may hold the user's own tars
MAX_IMAGE_BYTES = 256 << 20
MAX_CAPTION_BYTES = 1 << 20  # of a txt or json; a model reads some thousand tokens
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT, JSON = "txt", "json"
SUFFIXES = (*IMAGE_SUFFIXES, TEXT, JSON)
BLOCK = tarfile.BLOCKSIZE  # of a header; a member's data follow its header at once
ABSENT = -1
MAX_HEADER = 1 << 20  # bytes of a member's name and other fields, which tarfile reads whole
FORMAT = "1"  # of the index; an index in another format is made anew


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
    """The index kept in `path`; None when there is none, or when the tar's size or time has changed since it was made.

    tar: None for a remote shard, whose index stays valid whether or not its tar is in the cache.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, "np")
        kept = file.metadata() or {}
        rows = file.get_slice("samples")
    except (FileNotFoundError, SafetensorError):  # from another program, or cut short: it is made again
        return None
    if kept.get("format") != FORMAT or (tar is not None and kept["of"] != _stamp(tar)):
        return None
    return ShardIndex(rows, rows.get_shape()[0], int(kept["size"]), kept["fault"])


def build_index(path: Path, tar: Path, name: str) -> ShardIndex:
    """Scan the tar and keep the index in `path`. name: of the shard, for messages.

    For a tar that is damaged, or a file that is no tar, the index holds the samples before the damage and `fault`
    describes it.
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
        rows.pop()  # its other half is behind the cut
    fault = "" if is_whole else _fault(tar, name, len(rows))
    return np.array(rows, np.int64).reshape(-1, 5), fault


def _row(files: dict[str, Member]) -> list[int]:
    nothing = Member(ABSENT, 0)
    image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), nothing)
    caption = files.get(TEXT, files.get(JSON, nothing))
    return [*image, *caption, int(TEXT not in files and JSON in files)]


class _Header(tarfile.TarInfo):
    """A member's header. It is refused when its size is negative or one of its extensions is larger than MAX_HEADER."""

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
                archive.members = []  # otherwise it keeps every header that it has read
                key, suffix = base_plus_ext(member.name)
                if member.offset_data + member.size > size:
                    return found, False
                if key is not None and suffix.lower() in SUFFIXES and member.isreg():
                    found.append((key, suffix.lower(), Member(member.offset_data, member.size)))
            with tar.open("rb") as file:  # tarfile also takes a damaged header for the end
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
    """A text that changes when the tar does."""
    status = tar.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


# ---- reading ---------------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """The parts of one sample in a shard; None for a missing part. name: of its first member."""

    name: str
    image: bytes | None
    caption: bytes | None
    is_json: bool


def is_remote(shard: str) -> bool:
    """Check whether it is a URL or a `pipe:` rather than a file here."""
    return scheme_of(shard) != ""


def default_cache() -> Path:
    """The folder of indexes and fetched shards unless a data set names its own `cache_dir`."""
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "stllm" / "shards"


class ShardReader:
    """The samples of tar shards by number. Usable after a fork and picklable; every process has its own files.

    cache_dir: for the shards' indexes, and for remote shards themselves (default: `default_cache`).
    cache_gb: the most GiB that fetched shards may take; the least recently used ones make room. None: no bound.
    """

    def __init__(self, *, cache_dir: str | Path | None = None, cache_gb: float | None = None) -> None:
        self.cache_dir = user_path(cache_dir) if cache_dir else default_cache()
        self.cache_gb = cache_gb
        self._open: OrderedDict[str, tuple[int, ShardIndex]] = OrderedDict()

    def index(self, shard: str) -> ShardIndex:
        """The index of a shard. It is made if it does not exist yet; a remote shard is then fetched.

        Raises MediaError when the shard cannot be fetched, UserError when it is not there. See `build_index` for
        damage.
        """
        path = self._cached(shard, ".index")
        kept = load_index(path, None if is_remote(shard) else self._tar(shard))
        return kept or build_index(path, self._tar(shard), shard)

    def read(self, shard: str, sample: int) -> Content:
        """Sample number `sample` of a shard.

        Raises MediaError when the sample is not where the index says, and for a member that is too large to read.
        """
        file, index = self._opened(shard)
        entry = index[sample]
        bounds = (("an image", entry.image, MAX_IMAGE_BYTES), ("a caption", entry.caption, MAX_CAPTION_BYTES))
        for what, member, most in bounds:
            if member.size > most:
                name = self._header(shard, file, member)[0].name
                raise MediaError(
                    f"{shard}/{name}: found {what} of {member.size:,} bytes, expected at most {most:,}: leave the "
                    "sample out"
                )
        image, caption = (self._member(shard, file, member) for member in (entry.image, entry.caption))
        name = image[0] if image else caption[0] if caption else str(sample)
        return Content(name, image and image[1], caption and caption[1], entry.is_json)

    def name(self, shard: str, sample: int) -> str:
        """The `name` that `read` would give; only headers are read. Raises MediaError as `read` does."""
        file, index = self._opened(shard)
        entry = index[sample]
        member = entry.caption if entry.image.offset == ABSENT else entry.image
        return str(sample) if member.offset == ABSENT else self._header(shard, file, member)[0].name

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def _opened(self, shard: str) -> tuple[int, ShardIndex]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        with unbounded():  # a whole shard may be fetched or indexed, here or by another process
            index = self.index(shard)
            tar = self._tar(shard)
        try:
            file = os.open(tar, os.O_RDONLY)
        except OSError as error:
            raise MediaError(f"{shard}: the shard cannot be opened ({error.strerror}); check {tar}") from error
        if is_remote(shard):
            os.utime(tar)  # used just now, so others are removed first
        self._open[shard] = file, index
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        return file, index

    def _member(self, shard: str, file: int, member: Member) -> tuple[str, bytes] | None:
        """Name and data of a member, whose header must still match the index."""
        if member.offset == ABSENT:
            return None
        header, data = self._header(shard, file, member, member.size)
        return header.name, data

    def _header(self, shard: str, file: int, member: Member, size: int = 0) -> tuple[tarfile.TarInfo, bytes]:
        """A member's header, and the first `size` bytes of its data."""
        data = os.pread(file, BLOCK + size, member.offset - BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.size != member.size or len(data) != BLOCK + size:
            index = self._cached(shard, ".index")
            raise MediaError(f"{shard}: the tar has changed since it was indexed: remove {index} and start again")
        return header, data[BLOCK:]

    def _tar(self, shard: str) -> Path:
        """The shard as a local file. Raises MediaError when it cannot be fetched."""
        from filelock import FileLock

        if not is_remote(shard):
            path = Path(shard)
            if not path.is_file():
                raise UserError(f"{shard}: there is no such shard; expected a tar file: correct or shorten `shards`")
            return path
        path = self._cached(shard, ".tar")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # other processes wait for this one's copy
                if not path.exists():
                    fetch(shard, path)
                    self._make_room(path)
        return path

    def _cached(self, shard: str, suffix: str) -> Path:
        """A file in the cache for a shard: its name for the reader, and a digest to distinguish equal names."""
        place = shard if is_remote(shard) else os.path.abspath(shard)
        digest = hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()
        readable = re.sub(r"[^\w.-]+", "_", Path(place).name.removesuffix(".tar"))[-40:]
        return self.cache_dir / f"{readable}-{digest}{suffix}"

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used shards, but not the newest, until the cache is within its bound."""
        if self.cache_gb is None:
            return
        fetched = (path for path in self.cache_dir.glob("*.tar") if FETCHED.search(path.name))
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in fetched)
        excess = sum(size for _, size, _ in files) - self.cache_gb * GIB
        for _, size, path in files:
            if excess <= 0:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                excess -= size
