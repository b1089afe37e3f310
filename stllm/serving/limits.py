"""Limits of requests to the server or the page, for receiving them and for reading their videos and images.

A body is limited in size and time; the memory for all arriving bodies is limited, too. A request's medium comes from a
data URL, which is written to a file, or from the folder that clients may read. Processes that read media import this
file, so it imports no model.
"""

import base64
import binascii
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from stllm.common.jsonl import loads
from stllm.media.info import EXPECTED, MediaError, kind_of, limited_pixels, read_head
from stllm.media.open import open_media

if TYPE_CHECKING:
    from starlette.requests import Request

    from stllm.conversation.requests import ClipReader, Media
    from stllm.media.clip import Clip

MEBIBYTE = 1 << 20
# A body up to so many times the limit (at least so many MiB) is read and dropped, so that the client gets the refusal.
DISCARDED = 8
CUT_OUT = "data:cut-out"  # placeholder for a large data URL, so that the JSON parser does not copy it
PIECE = 4 << 20  # base64 characters decoded at once, a multiple of 4; other threads can run in between


class ApiError(Exception):
    """An error for the client. status: HTTP status. code: OpenAI's error code. param: the invalid field, if any."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    media_bytes, media_seconds: size and duration of a video or image. media_pixels: pixels of a frame. text_characters:
    length of all messages together. frames, new_tokens: the most that a request may ask for. waiting: requests in the
    queue beside the one being answered. body_seconds: time for receiving the request. read_seconds: time for decoding
    its video or image.
    """

    media_bytes: int = 100 * MEBIBYTE
    media_seconds: float = 1800.0
    media_pixels: int = 36_000_000  # enough for 8K videos and photos of phones
    text_characters: int = 100_000
    frames: int = 128
    new_tokens: int = 1024
    waiting: int = 16
    body_seconds: float = 60.0
    read_seconds: float = 60.0  # more than half an hour of full HD takes

    @property
    def words_bytes(self) -> int:
        """Return the size limit in bytes for a request without its medium: escaped text and JSON."""
        return 8 * self.text_characters + MEBIBYTE

    @property
    def body_bytes(self) -> int:
        """Return the size limit in bytes for a request: the medium in base64 and the rest."""
        return self.media_bytes * 4 // 3 + self.words_bytes

    def check_size(self, num_bytes: int) -> None:
        """Raise MediaError if a file of this size is too large."""
        if num_bytes > self.media_bytes:
            raise MediaError(
                f"the video or image has {num_bytes / MEBIBYTE:.1f} MiB, at most {self.media_bytes / MEBIBYTE:.1f} are "
                "taken: cut or compress it"
            )

    def check_file(self, path: Path) -> None:
        """Check a file without decoding it. Raises MediaError if it is not a medium or is too large."""
        self.check_size(path.stat().st_size)
        if kind_of(read_head(path)) == "text":  # the message does not quote the text, which the client may not see
            raise MediaError(f"{path}: found text, expected {EXPECTED}")
        with open_media(path) as medium:
            info = medium.info
        if info.kind != "image" and info.duration > self.media_seconds:
            raise MediaError(
                f"the video lasts {info.duration:.1f} s, at most {self.media_seconds:.1f} s are taken: cut the part "
                "that you ask about"
            )
        if info.width * info.height > self.media_pixels:
            raise MediaError(
                f"the picture has {info.width} x {info.height} pixels, at most {self.media_pixels} in all are taken: "
                "make it smaller"
            )

    def read(self, reader: "ClipReader", media: "Media") -> "Clip":
        """Check a file and read it. Reading processes call this (media/reading.py). Raises MediaError."""
        with limited_pixels(self.media_pixels):
            self.check_file(Path(media.path))
            return reader(media)


@dataclass(frozen=True)
class PageLimits(Limits):
    """Limits of the web page. Those of Limits apply to one question.

    folder_bytes, folder_files: size and number of all uploads together. keep_seconds: time from the last question about
    an upload to its deletion. upload_seconds: time for receiving an upload.
    """

    media_bytes: int = 256 * MEBIBYTE
    text_characters: int = 4000
    frames: int = 64
    new_tokens: int = 512
    waiting: int = 32
    beams: int = 8
    folder_bytes: int = 4096 * MEBIBYTE
    folder_files: int = 1000
    keep_seconds: int = 3600
    upload_seconds: float = 600.0


class Bodies:
    """Reader of request bodies. most: bytes of one body. most_together: bytes of all. seconds: time limit for one."""

    def __init__(self, most: int, most_together: int, seconds: float) -> None:
        self.most = most
        self.most_together = most_together
        self.seconds = seconds
        self.num_bytes = 0

    async def read(self, request: "Request", *, keep: bool = True) -> bytearray | None:
        """Return the body. keep: False to read the body and drop it.

        Returns None if the body was dropped or is too large; up to DISCARDED times the limit is then read and dropped.
        Raises ApiError if the body does not arrive in time, or if all bodies together are too large. Raises starlette's
        ClientDisconnect if the client has disconnected.
        """
        import anyio

        kept, num_bytes, crowded = bytearray(), 0, False
        try:
            with anyio.fail_after(self.seconds):
                async for piece in request.stream():
                    num_bytes += len(piece)
                    crowded = crowded or (keep and self.num_bytes + len(piece) > self.most_together)
                    if keep and not crowded and num_bytes <= self.most:
                        kept += piece
                        self.num_bytes += len(piece)
                    elif kept:
                        self.num_bytes -= len(kept)
                        kept = bytearray()
                    if num_bytes > DISCARDED * max(self.most, MEBIBYTE):
                        break
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self.seconds:.0f} s") from None
        finally:
            self.num_bytes -= len(kept)
        if num_bytes > self.most or not keep:
            return None
        if crowded:
            raise ApiError(503, "too many large requests arrive: try again in a moment", code="server_overloaded")
        return kept


def split_medium(body: bytearray, limits: Limits) -> tuple[bytes, memoryview | None]:
    """Split a request into the JSON without the large data URL, and that URL; None if there is no large data URL.

    The request is not parsed here, because parsing 130 MiB of tiny messages would take gigabytes of memory and block
    all other requests. Raises ApiError if the JSON without the URL is too large.
    """
    most = limits.words_bytes
    start, end = 0, 0
    while (start := body.find(b'"data:', end, most + 6)) >= 0:
        end = body.find(b'"', start + 1)
        if end < 0 or end - start > most:
            break
        end += 1
    found = start >= 0 and end > 0 and end - start > most
    if len(body) - (end - start if found else 0) > most:
        raise ApiError(
            413,
            f"the request is too large: beside the data URL of one video or image, at most {most} bytes are taken",
            code="request_too_large",
        )
    if not found:
        return bytes(body), None
    words = bytes(body[: start + 1]) + CUT_OUT.encode() + bytes(body[end:])
    if body.find(b"\\", start, end) >= 0:  # some clients escape slashes, such as PHP
        try:
            return words, memoryview(loads(bytes(body[start : end + 1])).encode())
        except ValueError:
            raise ApiError(400, "the request is no JSON") from None
    return words, memoryview(body)[start + 1 : end]


def fetch_medium(url: str, medium: memoryview | None, *, folder: Path, root: Path | None, limits: Limits) -> Path:
    """Return the file of a request's medium. url: the URL in the request. medium: the data URL from `split_medium`, if
    any.

    folder: folder for the content of a data URL. root: folder that `file:` URLs and paths may refer to; None: they are
    refused. Raises ApiError, and MediaError for a file that is too large.
    """
    if medium is not None and url != CUT_OUT:
        raise ApiError(413, "the request is too large: only a video or image may be", code="request_too_large")
    scheme, colon, _ = url.partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "data":
        return _write(memoryview(url.encode()) if medium is None else medium, folder / "medium", limits)
    if scheme in ("http", "https", "ftp"):
        message = "this server fetches nothing from the network: send the video or image as a data URL "
        raise ApiError(400, f"{message}(data:video/mp4;base64,...)", code="unsupported_url")
    if root is None:
        message = "this server opens no files of its own: send the video or image as a data URL"
        raise ApiError(403, message, code="no_media_root")
    try:  # the path must be a file inside root after links are resolved
        is_file_url = scheme == "file" and urlsplit(url).netloc in ("", "localhost")
        found = (root / (unquote(urlsplit(url).path) if is_file_url else url)).resolve()
        if found.is_relative_to(root.resolve()) and found.is_file():
            return found
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a zero byte, circular links
        pass
    # the same error for all other paths, so that it reveals nothing about them
    raise ApiError(404, "there is no such file under this server's media folder", code="file_not_found")


def _write(url: memoryview, path: Path, limits: Limits) -> Path:
    """Write the content of a data URL to `path`. The path needs no extension: readers detect the type."""
    header, comma, _ = bytes(url[:200]).partition(b",")
    if not comma or not header.lower().endswith(b";base64"):
        raise ApiError(400, "the data URL is not of the form data:video/mp4;base64,...", code="invalid_data_url")
    data = url[len(header) + 1 :]
    limits.check_size(len(data) * 3 // 4 - bytes(data[-2:]).count(b"="))
    with path.open("wb") as file:
        for start in range(0, len(data), PIECE):
            content = b""
            with suppress(binascii.Error):
                content = base64.b64decode(data[start : start + PIECE], validate=True)
            is_last = start + PIECE >= len(data)
            if not content or (len(content) < PIECE // 4 * 3 and not is_last):  # padding in the middle of the data
                raise ApiError(400, "what follows base64, in the data URL is no base64", code="invalid_data_url")
            file.write(content)
    return path
