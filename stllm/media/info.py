"""`Reader`, the interface of all readers of media, and the detection of a file's kind and of incomplete files.

A file's kind is recognised by its first bytes, not by its name. An incomplete download can be decoded up to the point
where it ends, so readers compare the size of the file with the size in its header. Sources: ISO/IEC 14496-12 (boxes of
mp4 and mov), RFC 8794 and 9559 (EBML, Matroska, WebM), the RIFF chunks of avi and webp.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import SEEK_CUR, SEEK_END, SEEK_SET, RawIOBase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import numpy as np

from stllm.common.errors import UserError
from stllm.common.files import LFS_POINTER, LFS_SENTENCE, check_regular

logger = logging.getLogger(__name__)

HEAD_BYTES = 4096
BMP_HEADERS = (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")  # sizes: "BM" alone proves little
SIGNATURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"8BPS", b"qoif", b"icns"),
    *(b"DDS ", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\0\0\1\0"),  # JPEG 2000 and its codestream, ICO
)
HEIF = tuple(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split())  # major brands in the box ftyp
AVIF = (b"avif", b"avis")
FIRST_BOXES = tuple(b"ftyp moov mdat wide free skip".split())  # boxes that an mp4 or mov may begin with
OTHER_BOXES = tuple(b"moof mfra sidx ssix styp emsg prft meta uuid udta pdin pnot".split())
EBML = b"\x1a\x45\xdf\xa3"  # the first bytes of mkv and webm
SEGMENT = b"\x18\x53\x80\x67"
EXPECTED = (
    "a video (mp4, webm, avi, mov, mkv), a gif, an image (png, jpg, webp, bmp, tiff) or a folder of numbered frames"
)

Frame = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3) RGB


class MediaError(UserError):
    """A file that cannot be read as requested. The message starts with the path.

    cause: "missing", "unreadable" or "bounds" (the requested part lies outside the medium).
    """

    def __init__(self, message: str, *, cause: str = "unreadable") -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class MediaInfo:
    """Description of a medium.

    kind: "video" (a container file), "gif" (any animated picture), "frames" (a folder of pictures) or "image".
    num_frames: the number of frames according to the file. If the file is incomplete, not all of them can be read.
    fps: average frames a second (1 for an image).
    width, height: size of the first frame in pixels, after rotation.
    first_index: the index of the first frame: 1 for frame folders, whose indices are the numbers in the file names, and
        0 for all others. Indices run from first_index to first_index + num_frames - 1.
    """

    kind: str
    num_frames: int
    fps: float
    width: int
    height: int
    first_index: int = 0

    @property
    def duration(self) -> float:
        """The duration in seconds, num_frames / fps."""
        return self.num_frames / self.fps


class Member:
    """A file inside another one, such as a clip in a tar. Readers take it in place of a path; nothing is copied.

    name: the name in error messages, such as "00000.tar/a.mp4". descriptor: descriptor of the outer file, which may be
    closed or removed later.
    start: offset of its first byte in the outer file. size: its number of bytes.
    """

    def __init__(self, name: str, descriptor: int, start: int, size: int) -> None:
        self.name, self.start, self.size = name, start, size
        self._descriptor = os.dup(descriptor)

    def __str__(self) -> str:
        return self.name

    def __del__(self) -> None:
        os.close(self._descriptor)

    def absolute(self) -> "Member":
        """Return this member unchanged, so that code for a `Path` also works for a member."""
        return self

    def open(self, mode: str = "rb") -> RawIOBase:
        """Return a readable file object with the member's bytes."""
        return _MemberFile(self)

    def stat(self) -> SimpleNamespace:
        """Return the size (st_size), and values that together identify the content (st_ino, st_mtime_ns)."""
        return SimpleNamespace(st_size=self.size, st_ino=self.start, st_mtime_ns=os.fstat(self._descriptor).st_mtime_ns)

    def read(self, size: int, at: int) -> bytes:
        """Return at most `size` bytes from this offset on."""
        return os.pread(self._descriptor, max(0, min(size, self.size - at)), self.start + at)


class _MemberFile(RawIOBase):
    def __init__(self, member: Member) -> None:
        self.member, self.at = member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self.at = {SEEK_SET: 0, SEEK_CUR: self.at, SEEK_END: self.member.size}[whence] + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self.member.read(len(buffer), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


Place = Path | Member  # where a medium's bytes are


def place_of(path: str | Path | Member) -> Place:
    """Convert a text to a `Path`. A `Path` or a `Member` is returned unchanged."""
    return path if isinstance(path, Member) else Path(path)


_decoder_options: dict[str, str] = {}  # passed to FFmpeg's decoders for every video


@contextmanager
def limited_pixels(most: int) -> Iterator[None]:
    """Refuse pictures and video frames of more than `most` pixels within this block, before they are decoded.

    It is meant for servers, which read strangers' files, and applies to the whole process. Pillow has a global setting
    for it, FFmpeg the decoder option `max_pixels`. Both check the size in the header and the size of each later frame.
    """
    from PIL import Image

    before, options_before = Image.MAX_IMAGE_PIXELS, decoder_options()
    Image.MAX_IMAGE_PIXELS = most // 2  # Pillow warns above this, and refuses above twice as much
    _decoder_options["max_pixels"] = str(most)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
        _decoder_options.clear()
        _decoder_options.update(options_before)


def decoder_options() -> dict[str, str]:
    """Return the options to open FFmpeg's decoders with."""
    return dict(_decoder_options)


@lru_cache(maxsize=4096)
def warn_once(path: str, what: str) -> None:
    """Log a warning about a file. The same warning is logged only once, even if the file is read again."""
    logger.warning("%s: %s", path, what)


ReaderT = TypeVar("ReaderT", bound="Reader")


class Reader(Protocol):
    """Reads frames of one medium. Use it as a context manager, or call `close`.

    seconds: (num_frames,), the time from the first frame to each frame. In an incomplete file the times of missing
    frames are evenly spaced.
    """

    path: Place
    info: MediaInfo
    seconds: "np.ndarray[Any, np.dtype[np.float64]]"

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield the frames of these indices one at a time, (H, W, 3) uint8 RGB, in the order of the indices.

        An index may be repeated. Ascending indices are fastest. Raises MediaError for an index outside the medium, and
        for a frame that cannot be decoded.
        """
        ...

    def times(self, indices: Sequence[int]) -> list[float]:
        """Return the seconds from the first frame to each of these frames.

        Raises MediaError for an index out of range.
        """
        self.check(indices)
        return [float(self.seconds[index - self.info.first_index]) for index in indices]

    def check(self, indices: Sequence[int]) -> None:
        """Raise MediaError if an index lies outside the medium."""
        first, last = self.info.first_index, self.info.first_index + self.info.num_frames - 1
        for index in indices:
            if not first <= index <= last:
                raise MediaError(
                    f"{self.path}: frame {index} was asked for, but the {self.info.kind} has frames {first} to {last}; "
                    "sample indices by the reader's own info"
                )

    def close(self) -> None:
        """Close the file and the decoder, if the reader keeps them open. May be called twice."""
        return

    def __enter__(self: ReaderT) -> ReaderT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_head(path: Place) -> bytes:
    """Return the first bytes of a file. Raises MediaError if it is missing, a folder, empty or not readable."""
    if isinstance(path, Path):
        check_regular(path, EXPECTED, MediaError)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        assert isinstance(path, Path)
        exists = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
        advice = f"the path is right up to {exists}, so check the media root"
        if path.is_symlink():
            advice = f"it is a link to {os.readlink(path)}, which is missing"
        elif exists == path.absolute().parent:
            advice = f"the folder {exists} exists, so check the file's name and extension"
        message = f"{path}: there is no such file; expected {EXPECTED}: {advice}"
        raise MediaError(message, cause="missing") from None
    except IsADirectoryError:
        raise MediaError(f"{path}: found a folder, expected one file: name a file in it") from None
    except PermissionError:
        raise MediaError(f"{path}: permission to read it is denied; expected a readable file: run chmod +r") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: the file cannot be read ({reason}); expected {EXPECTED}: check disk") from None
    if not head:
        raise MediaError(f"{path}: the file is empty (0 bytes); expected {EXPECTED}: copy or download it again")
    if head.startswith(LFS_POINTER):
        raise MediaError(f"{path}: {LFS_SENTENCE}")
    return head


def kind_of(head: bytes) -> str:
    """Guess the kind of a file from its first bytes.

    The kind is "picture" (a still or animated picture), "text", or for anything else "container" (a video container).
    """
    if (
        head.startswith(SIGNATURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[14:18] in BMP_HEADERS)
        or (head[4:8] == b"ftyp" and head[8:12] in HEIF + AVIF)
        or (head[:1] == b"P" and head[1:2] in b"1234567fF" and head[2:3].isspace())  # PPM and its relatives
    ):
        return "picture"
    if b"\0" in head or head.startswith(b"YUV4MPEG2 "):
        return "container"
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        cut_by_us = error.start >= len(head) - 3 and len(head) == HEAD_BYTES  # the last character was not read whole
        return "text" if cut_by_us else "container"
    return "text"


def explain_unreadable(path: Place, head: bytes) -> str:
    """Describe, for an error message, a file that no decoder could open as a video. head: its first bytes."""
    if head[4:8] in FIRST_BOXES and not {name for name, _ in _sections(path, head)} & {b"moov", b"moof"}:
        return "an mp4 without its index (no moov box): the recording or download ended early"
    size, promised = path.stat().st_size, promised_bytes(path, head)
    if promised > size:
        return f"a file cut short ({size} of at least {promised} bytes)"
    if head[4:8] in FIRST_BOXES:
        return "an mp4 whose index is damaged"
    if head.startswith((EBML, b"RIFF")):
        return "a damaged mkv, webm or avi file"
    return f"neither video nor image (it begins with the bytes {head[:8].hex(' ')})"


def promised_bytes(path: Place, head: bytes) -> int:
    """Return the size of the file in bytes according to its headers, or 0 if they do not contain it."""
    if head.startswith(EBML):  # the Segment, which holds everything, follows this element
        size, start = _vint(head, 4)
        at = start + size
        size, start = _vint(head, at + 4)
        return start + size if size and head[at : at + 4] == SEGMENT else 0  # 0: a live recording
    try:
        return max((end for _, end in _sections(path, head)), default=0)
    except OSError:
        return 0


def _sections(path: Place, head: bytes) -> list[tuple[bytes, int]]:
    """Return the top-level boxes of an mp4 or mov, or the RIFF chunks of an avi, as (name, offset where it should end).

    Other files give an empty list. A box of an unknown name ends the mp4: what follows is not part of it.
    """
    found: list[tuple[bytes, int]] = []
    start, size, is_mp4 = 0, path.stat().st_size, head[4:8] in FIRST_BOXES
    with path.open("rb") as file:
        while start + 8 <= size:
            file.seek(start)
            header = file.read(16)
            if is_mp4:
                name, length = header[4:8], int.from_bytes(header[:4], "big")
                length = int.from_bytes(header[8:], "big") if length == 1 else length
                length = size - start if length < 8 else length  # 0: "until the end of the file"; 1 to 7: damaged
                padding = 0
            else:
                name, length = header[:4], 8 + int.from_bytes(header[4:8], "little")
                padding = length % 2
            if name not in (FIRST_BOXES + OTHER_BOXES if is_mp4 else (b"RIFF",)) or (length == 8 and not is_mp4):
                break  # a RIFF chunk of length 0: the recording was interrupted
            found.append((name, start + length))
            start += length + padding
    return found


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """Return an EBML number and the offset after it. The reserved number "unknown" (all ones) is returned as 0."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length() if first else 8
    mask = (1 << 7 * length) - 1
    value = int.from_bytes(data[at : at + length], "big") & mask
    return (0 if value == mask else value), at + length
