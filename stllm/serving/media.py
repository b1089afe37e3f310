"""The video or image of a request: written from its data URL, or found under the one folder that is open to clients."""

import binascii
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stllm.common.jsonl import loads
from stllm.serving.errors import ApiError
from stllm.serving.limits import Limits

CUT_OUT = "data:cut-out"  # in place of a large data URL, so that the JSON parser never copies it
PIECE = 4 << 20  # characters of base64 decoded at once, a multiple of 4; others run in between


def split_medium(body: bytearray, limits: Limits) -> tuple[bytes, memoryview | None]:
    """(the request without its large data URL, that URL), or the whole request and None when it holds none.

    Nothing is parsed: parsing 130 MiB of tiny messages would take gigabytes and hold up all other requests.
    Raises ApiError when all but the data URL is too large.
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
    """The file that a URL of a request means. medium: the URL itself, where `split_medium` has cut it out.

    folder: where a data URL's content is written. root: what `file:` URLs and relative paths may name; None: nothing.
    Raises ApiError, MediaError for one that is too large.
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
    path = Path(unquote(urlsplit(url).path)) if scheme == "file" and _is_local(url) else Path(url)
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
    path = folder / "medium"  # what it is, its content tells
    with path.open("wb") as file:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            try:
                content = binascii.a2b_base64(piece, strict_mode=True)
            except binascii.Error:
                content = b""
            is_last = start + PIECE >= len(data)
            if not content or (len(content) < PIECE // 4 * 3 and not is_last):  # padding in the middle
                raise ApiError(400, "what follows base64, in the data URL is no base64", code="invalid_data_url")
            file.write(content)
    return path


def _is_local(url: str) -> bool:
    try:
        return urlsplit(url).netloc in ("", "localhost")
    except ValueError:
        return False


def _find(path: Path, root: Path) -> Path:
    """A file under the root, links followed. All else gets one answer, so that what lies elsewhere does not show."""
    try:
        found = (root / path).resolve()
        if found.is_relative_to(root.resolve()) and found.is_file():
            return found
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a zero byte, links in a circle
        pass
    raise ApiError(404, "there is no such file under this server's media folder", code="file_not_found")
