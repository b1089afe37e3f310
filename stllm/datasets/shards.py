"""Tar shards, local or remote, read at any place: remote ones fetched whole, members by offset.

Training asks for samples in any order, and a sample must be the same whichever process reads it; a stream from the
network gives neither. So a remote shard is fetched once (fetching.py), and then is a local file like another.
"""

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.datasets.fetching import fetch, scheme_of
from stllm.datasets.image_text_index import ABSENT, BLOCK, Member, ShardIndex, build_index, load_index
from stllm.media.info import MediaError
from stllm.media.time_bound import unbounded

MAX_OPEN = 128  # files a process keeps open; systems commonly allow 1024
GIB = 2**30
FETCHED = re.compile(r"-[0-9a-f]{16}\.tar$")  # the name of a fetched shard; the folder may hold the user's own tars
MAX_IMAGE_BYTES = 256 << 20
MAX_CAPTION_BYTES = 1 << 20  # of a txt or json; a model reads some thousand tokens


class Content(NamedTuple):
    """What a shard holds of one sample; None for a part that is not there. name: of its first member."""

    name: str
    image: bytes | None
    caption: bytes | None
    is_json: bool


def is_remote(shard: str) -> bool:
    """Whether it is a URL or a `pipe:` rather than a file here."""
    return scheme_of(shard) != ""


def default_cache() -> Path:
    """Where indexes and fetched shards are kept unless a data set names its own `cache_dir`."""
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
        """The index of a shard, made if need be, for which a remote shard is fetched.

        Raises MediaError when it cannot be fetched, UserError when it is not there. See `build_index` for damage.
        """
        path = self._cached(shard, ".index")
        kept = load_index(path, None if is_remote(shard) else self._tar(shard))
        return kept or build_index(path, self._tar(shard), shard)

    def read(self, shard: str, sample: int) -> Content:
        """Sample number `sample` of a shard.

        Raises MediaError when it cannot be read where the index says, and for a member that is too large to be read.
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
        """The name in what `read` gives, with the headers alone read. Raises MediaError as it does."""
        file, index = self._opened(shard)
        entry = index[sample]
        member = entry.caption if entry.image.offset == ABSENT else entry.image
        return str(sample) if member.offset == ABSENT else self._header(shard, file, member)[0].name

    def close(self) -> None:
        """Closes the files; they are opened again when they are needed."""
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
            os.utime(tar)  # used now: others make room first
        self._open[shard] = file, index
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        return file, index

    def _member(self, shard: str, file: int, member: Member) -> tuple[str, bytes] | None:
        """Name and data of a member, whose header must still be what the index saw."""
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
        """The shard as a file here. Raises MediaError when it cannot be fetched."""
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
        """A file in the cache for a shard: its name for the reader, a digest to tell equal names apart."""
        place = shard if is_remote(shard) else os.path.abspath(shard)
        digest = hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()
        readable = re.sub(r"[^\w.-]+", "_", Path(place).name.removesuffix(".tar"))[-40:]
        return self.cache_dir / f"{readable}-{digest}{suffix}"

    def _make_room(self, newest: Path) -> None:
        """Removes the least recently used shards until the cache is within its bound, but not the newest."""
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
