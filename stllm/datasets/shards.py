"""Tar shards, local or remote: from names to shards, from a shard to a local file, from that to samples in any order.

Names may contain braces, globs and URLs. Names are counted before braces are expanded: a few characters can stand for
more names than fit in memory. Each URL scheme has a program that copies a remote shard to a file, within a time limit.
Only `pipe:` starts a shell, which runs the rest of the name as a command. Lists of shards may come from strangers,
so `pipe:` is refused unless the command line allows it; no key of a YAML can.

Training asks for samples in any order, and a sample must be the same in every process that reads it. A stream from the
network allows neither. So a remote shard is fetched once and is then a local file like any other. One scan of a tar's
headers, kept in a small file, makes every sample reachable. Members are grouped as in webdataset: neighbours whose
names are equal up to the first dot are one sample. A clip is read in place, whatever its size. An index is a
safetensors file, mapped into memory: opening one costs microseconds, so hundreds of shards can be open.

Letters: N samples in a shard, V clips in it.
"""

import glob
import hashlib
import os
import re
import select
import signal
import subprocess
import tarfile
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby, islice
from math import inf
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from stllm.common.distributed import is_main, rank, world_size
from stllm.common.errors import UserError
from stllm.common.files import replacing, user_path
from stllm.common.schema import DatasetSettings, texts
from stllm.datasets.annotations import AnnotationError, fields_beside, num_answers
from stllm.media.find import EXTENSIONS
from stllm.media.info import MediaError, Member, warn_once
from stllm.media.time_bound import now_reading, unbounded

MAX_SHARDS = 100_000  # the largest set of the published recipes has 10,489
FIRST_SECONDS = 15.0  # until the first byte arrives; without a network some programs try again for minutes
STALL_SECONDS = 60.0  # from one byte to the next
MAX_OPEN = 128  # files a process keeps open; systems commonly allow 1024
MAX_IMAGE_BYTES = 256 << 20
MAX_CAPTION_BYTES = 1 << 20  # of a txt or json; a model reads some thousand tokens
MAX_HEADER = 1 << 20  # bytes of a member's name and other fields, which tarfile reads whole
GIB = 2**30

PIPE = "pipe"
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_HUB = re.compile(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", re.IGNORECASE)
_FETCHED = re.compile(r"-[0-9a-f]{16}\.tar$")  # the name of a fetched shard; the folder may hold the user's own tars
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # what gzip, bzip2, xz and zstd files begin with

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
VIDEO_SUFFIXES = tuple(extension[1:] for extension in EXTENSIONS)
TEXT, JSON = "txt", "json"
BLOCK = tarfile.BLOCKSIZE  # of a header; a member's data follow its header at once
ABSENT = -1  # the offset of a member that is not there
FORMAT = "2"  # of the index; an index in another format is made anew

_allowed = False  # True: `pipe:` may run commands in this process


def allow_pipes(allowed: bool) -> None:
    """Let this process read `pipe:` shards from now on (`--allow-pipe`), or refuse them again, which is the default."""
    global _allowed
    _allowed = allowed


# ---- names -----------------------------------------------------------------------------------------------------------


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """The shards that names, URLs, braces (`{00000..01255}.tar`) and globs stand for, in order.

    Raises UserError for a glob that finds nothing, broken braces, more than `MAX_SHARDS` names, a shard that is named
    twice, a scheme that has no program here, and for `pipe:` where it is not allowed.
    """
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for name in _expanded(pattern):
            scheme = scheme_of(name)
            if name.startswith("file:"):
                name, scheme = url2pathname(urlparse(name).path), ""
            if scheme == PIPE and not _allowed:
                raise UserError(
                    f"shards: {name!r} would run a command of this list's author: found no --allow-pipe on the command "
                    "line; give it if you trust the list, or name the shard's file or URL"
                )
            if scheme not in ("", PIPE, *PROGRAMS):
                raise UserError(
                    f"shards: {name!r} has the scheme {scheme!r}, expected one of {', '.join((*PROGRAMS, PIPE))}; a "
                    "file whose name has a colon needs its folder, as ./a:b.tar"
                )
            if scheme:
                found.append(name)
                continue
            path = str(user_path(name))
            matching = sorted(glob.glob(path, recursive=True)) if glob.has_magic(name) else [path]
            if not matching:
                raise UserError(f"shards: nothing matches {name!r:.200}; check the folder and the pattern")
            # A file called pipe:CMD is a file.
            found += [os.path.join(os.curdir, one) if scheme_of(one) else one for one in matching]
    if len(found) > MAX_SHARDS:
        raise _too_many("the list", len(found))
    twice = next((name for name, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"shards: {twice!r} is named twice; name every shard once, and raise sample_ratio instead")
    if not found:
        raise UserError("shards: found none; name tar files, such as {00000..01255}.tar, a glob, or URLs")
    return found


def scheme_of(shard: str) -> str:
    """The scheme of a URL in lower case; "pipe" for `pipe:CMD`; "" for a path."""
    found = _SCHEME.match(shard)
    return found[1].lower() if found else ""


def _expanded(pattern: str) -> list[str]:
    """The names that `::`, `${NAME}` (of WDS_NAME) and braces stand for, as in webdataset."""
    from webdataset.shardlists import envsubst

    names: list[str] = []
    try:
        for part in map(envsubst, pattern.split("::")):
            if (count := _num_names(part)) > MAX_SHARDS:
                raise _too_many(f"{pattern!r:.200}", count)
            names += islice(braceexpand(part), MAX_SHARDS + 1)
    except UserError:
        raise
    except (AssertionError, RecursionError, ValueError) as error:  # an unset ${NAME}, braces without an end
        found = f"shards: {pattern!r:.200} cannot be expanded ({error!s:.200})"
        raise UserError(f"{found}; write {{000..123}}.tar") from error
    return names


def _num_names(pattern: str) -> float:
    """The number of names that the braces of a pattern stand for, counted without making them; see `braceexpand`."""
    # What is known where each brace opened: names of its group's earlier alternatives, names of the alternative so far,
    # the group's beginning.
    outer: list[tuple[float, float, int]] = []
    earlier, names, start = 0.0, 1.0, 0
    for found in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        if found[0] == "{":
            outer.append((earlier, names, start))
            earlier, names, start = 0.0, 1.0, found.end()
        elif found[0] == "," and outer:
            earlier, names = earlier + names, 1.0
        elif found[0] == "}" and outer:
            count = _range_size(pattern[start : found.start()]) or earlier + names
            earlier, names, start = outer.pop()
            names *= count
    return outer[0][1] if outer else names  # braces without an end are refused by `braceexpand`


def _range_size(group: str) -> float:
    """The number of names in `1..20`, `1..20..2` or `a..z`; 0 for anything else."""
    if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", group):
        if max(map(len, filter(None, numbers.groups()))) > 18:
            return inf
        first, last, step = (int(number or 1) for number in numbers.groups())
        return abs(last - first) // (step or 1) + 1
    letters = re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?", group)
    return len(list(braceexpand(f"{{{group}}}"))) if letters else 0


def _too_many(what: str, count: float) -> UserError:
    number = f"{count:,.0f}" if count < 1e15 else "more than 10^15"
    return UserError(
        f"shards: {what} stands for {number} shards, expected at most {MAX_SHARDS:,}: correct the braces, or divide "
        "the shards among several data sets"
    )


# ---- remote shards ---------------------------------------------------------------------------------------------------


def _fetch(shard: str, path: Path) -> None:
    """Copy a remote shard to `path`, whole or not at all. Raises MediaError when it cannot be fetched."""
    scheme, url = scheme_of(shard), shard.strip()
    command = ["sh", "-c", url.partition(":")[2]] if scheme == PIPE else PROGRAMS[scheme](url)
    advice = "check the URL and the network"
    with replacing(path) as partial, partial.open("wb") as file, tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
            )
        except FileNotFoundError as error:
            raise MediaError(f"{shard}: fetching it needs the program {error.filename!r}: install it") from error
        except (OSError, ValueError) as error:  # a URL of megabytes, or with a NUL
            raise MediaError(f"{shard[:200]}: the shard cannot be fetched ({error}); check the URL") from error
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError), process.stdin as entry:
                entry.write(_hub_header() if scheme == "hf" else b"")
            seconds = FIRST_SECONDS
            while scheme == PIPE or select.select([process.stdout], [], [], seconds)[0]:
                if not (data := os.read(process.stdout.fileno(), 1 << 20)):
                    break
                file.write(data)
                seconds = STALL_SECONDS
            else:
                what = f"nothing arrived for {seconds:g} s"
                raise MediaError(
                    f"{shard}: the shard cannot be fetched ({what}); {advice}, or copy the shard to a file here"
                )
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):  # also its children, and processes that it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        if code:
            said.seek(max(0, said.tell() - 4096))
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            reason = ", ".join([f"{scheme}: exit {code}", *(line[:200] for line in last)])
            raise MediaError(f"{shard}: the shard cannot be fetched ({reason}); {advice}")


def _curl(url: str) -> list[str]:
    return ["curl", "--connect-timeout", "10", "--retry", "3", "--globoff", "-f", "-s", "-S", "-L", "--url", url]


def _hub(url: str) -> list[str]:
    """curl's command for hf://datasets/OWNER/NAME[@REVISION]/FILE; it reads the token's header from its stdin."""
    from huggingface_hub import hf_hub_url

    found = _HUB.fullmatch(url)
    if found is None:
        raise MediaError(f"{url}: the shard cannot be fetched; expected hf://datasets/OWNER/NAME/FILE: correct the URL")
    kind, name, revision, file = found.groups()
    try:
        address = hf_hub_url(name, file, repo_type=kind and kind[:-1], revision=revision)
    except ValueError as error:  # characters that no owner's or set's name has
        raise MediaError(f"{url}: the shard cannot be fetched ({error}); correct the URL") from error
    return [*_curl(address), "-H", "@-"]


def _hub_header() -> bytes:
    from huggingface_hub import get_token

    token = get_token()
    return f"Authorization: Bearer {token}".encode() if token else b""


# The command that each scheme runs, without a shell. The programs hold the credentials.
PROGRAMS: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(("http", "https", "ftps", "sftp", "scp"), _curl),
    "hf": _hub,
    "gs": lambda url: ["gsutil", "cat", url],
    "s3": lambda url: ["aws", "s3", "cp", url, "-"],
    "ais": lambda url: ["ais", "get", url, "-"],
}


# ---- the index of a tar ----------------------------------------------------------------------------------------------


class SampleSpan(NamedTuple):
    """One sample of a shard: where the data of its members begin, and how many bytes they are.

    An offset is -1 when there is no such member. num_answers: of the texts beside a clip; 0 for an image.
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
        """The place of an image's caption: of its text, or else of its JSON."""
        return (self.json, self.json_bytes) if self.text == ABSENT else (self.text, self.text_bytes)


class ShardIndex(NamedTuple):
    """The samples of one shard.

    rows: (N, 9) int64, a `SampleSpan` each. clips: (V, 3) int64: the offset, the bytes and `digest` of the name of each
        video. Both are arrays, or slices of a mapped file.
    num_samples: N. size: bytes of the tar. fault: a sentence when the tar is damaged, else "".
    """

    rows: Any
    clips: Any
    num_samples: int
    size: int
    fault: str

    def entry(self, sample: int) -> SampleSpan:
        """The places of one sample."""
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
    """A number of 63 bits for a member's name; a leading ./ does not count."""
    data = os.fsencode(os.path.normpath(name))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def scan(tar: Path, name: str) -> tuple[np.ndarray, np.ndarray, str]:
    """`ShardIndex.rows` and `ShardIndex.clips` of a tar, and a sentence about its damage ("" when it is whole).

    name: of the shard, for messages. A tar that is damaged gives the samples before the damage, a file that is no tar
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
                files.setdefault(suffix, place)  # a second image or caption of one name could be another pair's
            image, video = (
                next((files[suffix] for suffix in suffixes if suffix in files), (ABSENT, 0))
                for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES)
            )
            text, data = files.get(TEXT, (ABSENT, 0)), files.get(JSON, (ABSENT, 0))
            count = 0 if video[0] == ABSENT else _count_answers(file, text, data)
            rows.append(SampleSpan(*image, *video, *text, *data, count))
    if not is_whole and rows and (rows[-1].caption[0] == ABSENT or rows[-1].image == rows[-1].video == ABSENT):
        rows.pop()  # its other half is behind the cut
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
    """The answers in the texts beside a clip, given their places; 0 where they cannot be read."""
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
    """A text that changes when the tar does."""
    status = tar.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


# ---- reading ---------------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """The parts of one sample in a shard; None for a missing part. name: of its first member.

    image: only where it was asked for; else video: a clip, read in place.
    """

    name: str
    image: bytes | None
    video: Member | None
    text: bytes | None
    json: bytes | None


class ShardReader:
    """The samples of tar shards by number. Usable after a fork and picklable; every process has its own files.

    cache_dir: for the shards' indexes, and for remote shards themselves (default: stllm/shards in the user's cache).
    cache_gb: the most GiB that fetched shards may take; the least recently used ones make room. None: no bound.
    """

    def __init__(self, *, cache_dir: str | Path | None = None, cache_gb: float | None = None) -> None:
        users = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        self.cache_dir = user_path(cache_dir) if cache_dir else users / "stllm" / "shards"
        self.cache_gb = cache_gb
        self._open: OrderedDict[str, tuple[int, ShardIndex]] = OrderedDict()

    def index(self, shard: str) -> ShardIndex:
        """The index of a shard. It is made if it does not exist yet, or the tar's size or time has changed since.

        A remote shard is fetched to be indexed; the index stays valid whether or not its tar is in the cache.
        Raises MediaError when the shard cannot be fetched, UserError when it is not there. See `scan` for damage.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.numpy import save_file

        path = self._cached(shard, ".index")
        tar = None if scheme_of(shard) else self._tar(shard)
        with suppress(FileNotFoundError, SafetensorError):  # an index of another program, or cut short, is made again
            file: Any = safe_open(path, "np")
            kept = file.metadata() or {}
            if kept.get("format") == FORMAT and (tar is None or kept["of"] == _stamp(tar)):
                rows = file.get_slice("samples")
                return ShardIndex(rows, file.get_slice("clips"), rows.get_shape()[0], int(kept["size"]), kept["fault"])
        tar = tar or self._tar(shard)
        stamp, size = _stamp(tar), tar.stat().st_size
        rows, clips, fault = scan(tar, shard)
        with replacing(path) as partial:
            texts = {"format": FORMAT, "of": stamp, "size": str(size), "fault": fault}
            save_file({"samples": rows, "clips": clips}, partial, metadata=texts)
        return ShardIndex(rows, clips, len(rows), size, fault)

    def read(self, shard: str, sample: int, kind: str = "image") -> Content:
        """Sample number `sample` of a shard, with its medium of that kind: "image" or "video".

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
        """A video in a shard, to be read in place. Raises MediaError as `read` does."""
        file, _ = self._opened(shard)
        name, _ = self._member(shard, file, offset, size, whole=False)
        return Member(f"{shard}/{name}", file, offset, size)

    def name(self, shard: str, sample: int) -> str:
        """The `name` that `read` would give for an image; only headers are read. Raises MediaError as `read` does."""
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
            index = self.index(shard)
            tar = self._tar(shard)
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
        """Name and data of a member, whose header must still match the index. whole: False to read the header alone."""
        num_bytes = BLOCK + size * whole
        data = os.pread(file, num_bytes, offset - BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.size != size or len(data) != num_bytes:
            index = self._cached(shard, ".index")
            raise MediaError(f"{shard}: the tar has changed since it was indexed: remove {index} and start again")
        return header.name, data[BLOCK:]

    def _tar(self, shard: str) -> Path:
        """The shard as a local file. Raises MediaError when it cannot be fetched."""
        from filelock import FileLock

        if not scheme_of(shard):
            path = Path(shard)
            if not path.is_file():
                raise UserError(f"{shard}: there is no such shard; expected a tar file: correct or shorten `shards`")
            return path
        path = self._cached(shard, ".tar")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # other processes wait for this one's copy
                if not path.exists():
                    _fetch(shard, path)
                    self._make_room(path)
        return path

    def _cached(self, shard: str, suffix: str) -> Path:
        """A file in the cache for a shard: its name for the reader, and a digest to distinguish equal names."""
        place = shard if scheme_of(shard) else os.path.abspath(shard)
        digest = hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()
        readable = re.sub(r"[^\w.-]+", "_", Path(place).name.removesuffix(".tar"))[-40:]
        return self.cache_dir / f"{readable}-{digest}{suffix}"

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used shards, but not the newest, until the cache is within its bound."""
        if self.cache_gb is None:
            return
        fetched = [(path.stat(), path) for path in self.cache_dir.glob("*.tar") if _FETCHED.search(path.name)]
        excess = sum(status.st_size for status, _ in fetched) - self.cache_gb * GIB
        for status, path in sorted(fetched, key=lambda pair: pair[0].st_mtime_ns):
            if excess > 0 and path != newest:
                path.unlink(missing_ok=True)
                excess -= status.st_size


def sample_key(shard: str, number: int, name: str, root: str | None) -> str:
    """The key of a sample's features, relative to that folder.

    Its number distinguishes equal names, and its name changes when a shard is made anew with other samples.
    """
    return f"{shard.removeprefix(os.path.join(root or '', ''))}/{number}/{name}"


class Shards:
    """The samples of many shards, numbered through.

    owner: the data set's name, for messages. names: see `expand_shards`. cache_dir, cache_gb: see `ShardReader`.
    columns: called with each shard's index; its results are kept in `kept`, in the order of the shards.

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
        self.reader = ShardReader(cache_dir=cache_dir, cache_gb=cache_gb)
        counts = [0] * len(self.names)
        self.kept: list[Any] = list(counts)
        remote_bytes = 0
        # Several processes begin at different shards, and find what the others have indexed.
        first = rank() * len(counts) // world_size()
        order = [*range(first, len(counts)), *range(first)]
        hidden = None if is_main() else True
        for position in tqdm(order, desc=f"{owner}: shards", unit="shard", disable=hidden, delay=1, leave=False):
            shard = self.names[position]
            index = self.reader.index(shard)
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
        """The shard that holds a sample, and its number there. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = int(np.searchsorted(self._ends, index, side="right"))
        return self.names[position], index - (int(self._ends[position - 1]) if position else 0)


class ShardClips:
    """Finds the clips of shards by their names. shards: with `ShardIndex.clips` in `kept`."""

    def __init__(self, shards: Shards) -> None:
        self.names, self.reader = shards.names, shards.reader
        clips = np.concatenate(shards.kept)
        shard = np.repeat(np.arange(len(shards.kept)), [len(rows) for rows in shards.kept])
        order = np.argsort(clips[:, 2], kind="stable")
        self._clips, self._shard = clips[order], shard[order]

    @classmethod
    def of(cls, owner: str, settings: DatasetSettings) -> "ShardClips":
        """The clips in the shards of an entry. owner: for messages."""
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
        """The clip of that name. Raises MediaError when there is none, or more than one."""
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
        shard = self.names[self._shard[places[0]]]
        now_reading(shard)
        return self.reader.clip(shard, offset, size)
