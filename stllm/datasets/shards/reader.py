"""The samples of tar shards in any order, and clips of shards by name. A clip is read in place, whatever its size."""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from stllm.common.distributed import is_main, rank, world_size
from stllm.common.schema import DatasetSettings, texts
from stllm.datasets.shards.index import ABSENT, BLOCK, MAX_CAPTION_BYTES, ShardIndex, digest, open_index
from stllm.datasets.shards.sources import GIB, ShardCache, expand_shards, scheme_of
from stllm.media.info import MediaError, Member, warn_once
from stllm.media.time_bound import now_reading, unbounded

MAX_OPEN = 128  # files a process keeps open; systems commonly allow 1024
MAX_IMAGE_BYTES = 256 << 20


class Content(NamedTuple):
    """The parts of one sample in a shard; None for a missing part. name: name of its first member.

    image: the image's bytes, if the kind "image" was requested. video: a clip that is read inside the tar, if the
    kind "video" was requested.
    """

    name: str
    image: bytes | None
    video: Member | None
    text: bytes | None
    json: bytes | None


class ShardReader:
    """Reads the samples of tar shards by number.

    Usable after a fork and picklable; each process opens the files itself.
    """

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self._open: OrderedDict[str, tuple[int, ShardIndex]] = OrderedDict()

    def read(self, shard: str, sample: int, kind: str = "image") -> Content:
        """Read sample number `sample` of a shard, with its medium of this kind: "image" or "video".

        Raises MediaError when the sample is not where the index says, and for a member that is too large to read.
        """
        file, index = self._opened(shard)
        entry = index.entry(sample)
        is_video, video = kind == "video", None
        # An image has one caption; beside a clip, a json may hold questions and a txt the caption.
        json_at = entry.json if is_video or entry.text == ABSENT else ABSENT
        members = (
            ("an image", ABSENT if is_video else entry.image, entry.image_bytes, MAX_IMAGE_BYTES),
            ("a caption", entry.text, entry.text_bytes, MAX_CAPTION_BYTES),
            ("a caption", json_at, entry.json_bytes, MAX_CAPTION_BYTES),
        )
        for what, offset, size, most in members:
            if offset != ABSENT and size > most:
                name = self._member(shard, file, offset, size, whole=False)[0]
                raise MediaError(
                    f"{shard}/{name}: found {what} of {size:,} bytes, expected at most {most:,}: leave the sample out"
                )
        parts = [
            None if offset == ABSENT else self._member(shard, file, offset, size) for _, offset, size, _ in members
        ]
        name = next((part[0] for part in parts if part), str(sample))
        if is_video and entry.video != ABSENT:
            video = self.clip(shard, entry.video, entry.video_bytes)
            name = video.name.removeprefix(f"{shard}/")
        image, text, data = (part and part[1] for part in parts)
        return Content(name, image, video, text, data)

    def clip(self, shard: str, offset: int, size: int) -> Member:
        """Return a video in a shard, which is read inside the tar. Raises MediaError as `read` does."""
        file, _ = self._opened(shard)
        name, _ = self._member(shard, file, offset, size, whole=False)
        return Member(f"{shard}/{name}", file, offset, size)

    def name(self, shard: str, sample: int) -> str:
        """Return the `name` that `read` would return for an image; only headers are read.

        Raises MediaError as `read` does.
        """
        file, index = self._opened(shard)
        entry = index.entry(sample)
        place = (entry.image, entry.image_bytes) if entry.image != ABSENT else entry.caption
        return str(sample) if place[0] == ABSENT else self._member(shard, file, *place, whole=False)[0]

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
            index = open_index(shard, self.cache)
            tar = self.cache.tar(shard)
        try:
            file = os.open(tar, os.O_RDONLY)
        except OSError as error:
            raise MediaError(f"{shard}: the shard cannot be opened ({error.strerror}); check {tar}") from error
        if scheme_of(shard):
            os.utime(tar)  # used just now, so others are removed first
        self._open[shard] = file, index
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        return file, index

    def _member(self, shard: str, file: int, offset: int, size: int, *, whole: bool = True) -> tuple[str, bytes]:
        """Return a member's name and data.

        Its header must still match the index. whole: False to read only the header.
        """
        num_bytes = BLOCK + size * whole
        data = os.pread(file, num_bytes, offset - BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.size != size or len(data) != num_bytes:
            index = self.cache.path(shard, ".index")
            raise MediaError(f"{shard}: the tar has changed since it was indexed: remove {index} and start again")
        return header.name, data[BLOCK:]


def sample_key(shard: str, number: int, name: str, root: str | None) -> str:
    """Return the key of a sample's features, relative to the folder `root`.

    The number in the key distinguishes samples of one name. The name in it differs if the shard is rewritten with other
    samples.
    """
    return f"{shard.removeprefix(os.path.join(root or '', ''))}/{number}/{name}"


class Shards:
    """The samples of many shards, with one numbering (0, 1, ...) over all shards.

    owner: the data set's name, used in error messages. names: see `expand_shards`. cache_dir, cache_gb: see
    `ShardCache`.
    columns: function that takes a shard's table of contents (`ShardIndex`) and returns what the caller needs of it. The
    attribute `kept` holds its results in the order of the shards.

    The first use of a shard reads its headers, which takes seconds. A damaged shard gives the samples before the
    damage, with a warning. Raises UserError when a shard is missing, MediaError when one cannot be fetched.
    """

    def __init__(
        self,
        owner: str,
        names: str | Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        cache_gb: float | None = None,
        columns: Callable[[ShardIndex], Any] = lambda index: None,
    ) -> None:
        self.names = expand_shards(names)
        self.reader = ShardReader(ShardCache(cache_dir, cache_gb))
        counts = [0] * len(self.names)
        self.kept: list[Any] = list(counts)
        remote_bytes = 0
        # Several processes begin at different shards, and find what the others have indexed.
        first = rank() * len(counts) // world_size()
        order = [*range(first, len(counts)), *range(first)]
        hidden = None if is_main() else True
        for position in tqdm(order, desc=f"{owner}: shards", unit="shard", disable=hidden, delay=1, leave=False):
            shard = self.names[position]
            index = open_index(shard, self.reader.cache)
            counts[position], self.kept[position] = index.num_samples, columns(index)
            remote_bytes += index.size if scheme_of(shard) else 0
            if index.fault and is_main():
                warn_once(shard, index.fault.removeprefix(f"{shard}: "))
        if cache_gb is not None and remote_bytes > cache_gb * GIB:
            what = f"its shards take {remote_bytes / GIB:.1f} GiB, the cache holds {cache_gb:g}"
            warn_once(owner, f"{what}: shards will be fetched again and again; raise cache_gb, or copy them here")
        self._ends = np.cumsum(counts)  # the sample after each shard's last

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, index: int) -> tuple[str, int]:
        """Return the shard that holds a sample, and the sample's number in this shard. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = int(np.searchsorted(self._ends, index, side="right"))
        return self.names[position], index - (int(self._ends[position - 1]) if position else 0)


class ShardClips:
    """Finds the clips of shards by their names. shards: shards whose `columns` returns `ShardIndex.clips`."""

    def __init__(self, shards: Shards) -> None:
        self.names, self.reader = shards.names, shards.reader
        clips = np.concatenate(shards.kept)
        shard = np.repeat(np.arange(len(shards.kept)), [len(rows) for rows in shards.kept])
        order = np.argsort(clips[:, 2], kind="stable")
        self._clips, self._shard = clips[order], shard[order]

    @classmethod
    def of(cls, owner: str, settings: DatasetSettings) -> "ShardClips":
        """Open the clips in the shards of a data set. owner: the data set's name, used in error messages."""
        return cls(
            Shards(
                owner,
                texts(settings.shards),
                cache_dir=settings.cache_dir,
                cache_gb=settings.cache_gb,
                columns=lambda index: index.clips[:],
            )
        )

    def __call__(self, name: str) -> Member:
        """Return the clip of this name. Raises MediaError if there is none, or more than one."""
        shard, offset, size = self.place(name)
        now_reading(shard)
        return self.reader.clip(shard, offset, size)

    def place(self, name: str) -> tuple[str, int, int]:
        """Return shard, offset and size of the clip of this name, the arguments of `ShardReader.clip`.

        Raises MediaError.
        """
        found = np.searchsorted(self._clips[:, 2], [digest(name), digest(name) + 1])
        places = range(*found.tolist())
        if not places:
            raise MediaError(
                f"{name}: no clip of that name is in the {len(self.names)} shards; expected the name as `tar -t` lists "
                "it: correct the record, or add the shard",
                cause="missing",
            )
        if len(places) > 1:
            first, second = (self.names[self._shard[place]] for place in places[:2])
            raise MediaError(f"{name}: found it in {first} and in {second}, expected it once: rename one")
        offset, size, _ = self._clips[places[0]].tolist()
        return self.names[self._shard[places[0]]], offset, size
