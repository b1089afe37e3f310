"""The video or image of a request: written from its data URL, or found under the one folder that is open to clients."""

import base64
import binascii
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stllm.serving.errors import ApiError
from stllm.serving.limits import Limits


def fetch_medium(url: str, *, folder: Path, root: Path | None, limits: Limits) -> Path:
    """The file that a URL of a request means.

    folder: where a data URL's content is written. root: what `file:` URLs and relative paths may name; None: nothing.
    Raises ApiError, MediaError for one that is too large.
    """
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "data":
        return _write(rest, folder, limits)
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


def _write(rest: str, folder: Path, limits: Limits) -> Path:
    header, comma, data = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ApiError(400, "the data URL is not of the form data:video/mp4;base64,...", code="invalid_data_url")
    limits.check_size(len(data) * 3 // 4 - data[-2:].count("="))
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "what follows base64, in the data URL is no base64", code="invalid_data_url") from None
    path = folder / "medium"  # what it is, its content tells
    path.write_bytes(content)
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
