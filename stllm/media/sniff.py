"""Recognise a file by its first bytes and not by its name, and find out whether it was cut short.

Sources: ISO/IEC 14496-12 (boxes of mp4 and mov), RFC 8794 and 9559 (EBML, Matroska, WebM), the RIFF chunks of avi and
webp. A cut download still opens and decodes up to the cut, so a reader has to ask how long the file should have been.
"""

import os
from pathlib import Path

from stllm.common.files import LFS_POINTER, LFS_SENTENCE, check_regular
from stllm.media.info import MediaError

HEAD_BYTES = 4096
BMP_HEADERS = (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")  # their sizes; two letters prove little
SIGNATURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"8BPS", b"qoif", b"icns"),
    *(b"DDS ", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\0\0\1\0"),  # JPEG 2000 and its codestream, ICO
)
HEIF = tuple(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split())  # ftyp's major brands
AVIF = (b"avif", b"avis")
FIRST_BOXES = tuple(b"ftyp moov mdat wide free skip".split())  # with which an mp4 or mov may begin
OTHER_BOXES = tuple(b"moof mfra sidx ssix styp emsg prft meta uuid udta pdin pnot".split())
EBML = b"\x1a\x45\xdf\xa3"  # with which mkv and webm begin
SEGMENT = b"\x18\x53\x80\x67"
EXPECTED = (
    "a video (mp4, webm, avi, mov, mkv), a gif, an image (png, jpg, webp, bmp, tiff) or a folder of numbered frames"
)


def read_head(path: Path) -> bytes:
    """The file's first bytes. Raises MediaError when it is missing, a folder, empty or may not be read."""
    check_regular(path, EXPECTED, MediaError)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise MediaError(
            f"{path}: there is no such file; expected {EXPECTED}: {_where(path)}", cause="missing"
        ) from None
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
    """One of picture (an image or an animated picture), text, or container (anything else: the decoder decides)."""
    if head.startswith(SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "picture"
    if (head[:2] == b"BM" and head[14:18] in BMP_HEADERS) or (head[4:8] == b"ftyp" and head[8:12] in HEIF + AVIF):
        return "picture"
    if head[:1] == b"P" and head[1:2] in b"1234567fF" and head[2:3].isspace():
        return "picture"  # PPM and its relatives
    return "text" if _is_text(head) and not head.startswith(b"YUV4MPEG2 ") else "container"


def explain_unreadable(path: Path, head: bytes) -> str:
    """The reason why no decoder opened a file as a video, for a message: what was found."""
    if head[4:8] in FIRST_BOXES and not {name for name, _ in _sections(path, head)} & {b"moov", b"moof"}:
        return "an mp4 without its index (no moov box): the recording or download ended early"
    if is_cut(path, head):
        return f"a file cut short ({path.stat().st_size} of at least {promised_bytes(path, head)} bytes)"
    if head[4:8] in FIRST_BOXES:
        return "an mp4 whose index is damaged"
    if head.startswith((EBML, b"RIFF")):
        return "a damaged mkv, webm or avi file"
    return f"neither video nor image (it begins with the bytes {head[:8].hex(' ')})"


def promised_bytes(path: Path, head: bytes) -> int:
    """The size of the file according to the container's headers; 0 when they do not state it."""
    if head.startswith(EBML):  # the Segment, which holds everything, follows this element
        size, start = _vint(head, 4)
        at = start + size
        size, start = _vint(head, at + 4)
        return start + size if size and head[at : at + 4] == SEGMENT else 0  # 0: a live recording
    try:
        return max((end for _, end in _sections(path, head)), default=0)
    except OSError:
        return 0


def is_cut(path: Path, head: bytes) -> bool:
    """Check whether the file is shorter than its headers say."""
    return promised_bytes(path, head) > path.stat().st_size


def first_words(head: bytes) -> str:
    """The beginning of a text file, for a message."""
    return " ".join(head[:200].decode("utf-8", "replace").split())[:40]


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and len(head) == HEAD_BYTES  # a character cut by our own reading
    return True


def _sections(path: Path, head: bytes) -> list[tuple[bytes, int]]:
    """Top-level boxes of an mp4 or mov, or chunks of an avi (several when it is long), as (name, where it should end).

    Other files have none. A box of another name lies behind the mp4, and players do not read it either.
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
                break  # a RIFF chunk of no length: a recorder never came back to fill it in
            found.append((name, start + length))
            start += length + padding
    return found


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """An EBML number and where it ends; 0 for the reserved "unknown" (all ones)."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length() if first else 8
    mask = (1 << 7 * length) - 1
    value = int.from_bytes(data[at : at + length], "big") & mask
    return (0 if value == mask else value), at + length


def _where(path: Path) -> str:
    """Advice about a missing file: the last part of its path that exists."""
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}, which is missing"
    parent = path.absolute().parent
    if parent.is_dir():
        return f"the folder {parent} exists, so check the file's name and extension"
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    return f"the path is right up to {parent}, so check the media root"
