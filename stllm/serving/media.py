"""A request's body, and the video or image in it.

A body is limited in bytes, in time, and in the memory that all arriving bodies take together. The medium is
written to a file from its data URL, or found under the one folder that clients may read.
"""

import binascii
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import anyio
from starlette.requests import Request

from stllm.common.jsonl import loads
from stllm.serving.limits import MEBIBYTE, Limits
from stllm.serving.replies import ApiError

DISCARDED = 8  # times the limit, or this many MiB: read and dropped, so that the client gets to read the refusal
CUT_OUT = "data:cut-out"  # in place of a large data URL, so that the JSON parser never copies it
PIECE = 4 << 20  # characters of base64 decoded at once, a multiple of 4; others run in between


class Bodies:
    """The bodies that are arriving. most, most_together: bytes of one and of all. seconds: for one to arrive whole."""

    def __init__(self, most: int, most_together: int, seconds: float) -> None:
        self.most = most
        self.most_together = most_together
        self.seconds = seconds
        self.num_bytes = 0

    async def read(self, request: Request, *, keep: bool = True) -> bytearray | None:
        """Return the body; None when it is too large or was not kept. It is then still read, within limits.

        Raises ApiError when the body does not arrive in time or all bodies together are too large. Raises starlette's
        ClientDisconnect when the client has gone.
        """
        kept = bytearray()
        num_bytes = 0
        crowded = False
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
    """Split a request into its text without the large data URL, and that URL. Without one: the whole request and None.

    Nothing is parsed: parsing 130 MiB of tiny messages would take gigabytes and block all other requests.
    Raises ApiError when the rest of the request is too large.
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
    if body.find(b"\\", start, end) >= 0:  # PHP, for one, escapes every slash
        try:
            return words, memoryview(loads(bytes(body[start : end + 1])).encode())
        except ValueError:
            raise ApiError(400, "the request is no JSON") from None
    return words, memoryview(body)[start + 1 : end]


def fetch_medium(url: str, medium: memoryview | None, *, folder: Path, root: Path | None, limits: Limits) -> Path:
    """Return the file that a URL of a request names. medium: the URL that `split_medium` has cut out, if it has.

    folder: where a data URL's content is written. root: the folder that `file:` URLs and paths may name, or None.
    Raises ApiError, and MediaError for a file that is too large.
    """
    if medium is not None and url != CUT_OUT:
        raise ApiError(413, "the request is too large: only a video or image may be", code="request_too_large")
    scheme, colon, _ = url.partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "data":
        return _write(memoryview(url.encode()) if medium is None else medium, folder, limits)
    if scheme in ("http", "https", "ftp"):
        raise ApiError(
            400,
            "this server fetches nothing from the network: send the video or image as a data URL "
            "(data:video/mp4;base64,...)",
            code="unsupported_url",
        )
    path = Path(url)
    with suppress(ValueError):
        if scheme == "file" and urlsplit(url).netloc in ("", "localhost"):
            path = Path(unquote(urlsplit(url).path))
    if root is None:
        raise ApiError(
            403, "this server opens no files of its own: send the video or image as a data URL", code="no_media_root"
        )
    return _find(path, root)


def _write(url: memoryview, folder: Path, limits: Limits) -> Path:
    header, comma, _ = bytes(url[:200]).partition(b",")
    if not comma or not header.lower().endswith(b";base64"):
        raise ApiError(400, "the data URL is not of the form data:video/mp4;base64,...", code="invalid_data_url")
    data = url[len(header) + 1 :]
    limits.check_size(len(data) * 3 // 4 - bytes(data[-2:]).count(b"="))
    path = folder / "medium"  # the content tells its type
    with path.open("wb") as file:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            try:
                content = binascii.a2b_base64(piece, strict_mode=True)
            except binascii.Error:
                content = b""
            is_last = start + PIECE >= len(data)
            if not content or (len(content) < PIECE // 4 * 3 and not is_last):  # padding in the middle of the data
                raise ApiError(400, "what follows base64, in the data URL is no base64", code="invalid_data_url")
            file.write(content)
    return path


def _find(path: Path, root: Path) -> Path:
    """Find a file under the root, following links. All other paths get one error, which reveals nothing about them."""
    try:
        found = (root / path).resolve()
        if found.is_relative_to(root.resolve()) and found.is_file():
            return found
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a zero byte, links in a circle
        pass
    raise ApiError(404, "there is no such file under this server's media folder", code="file_not_found")
