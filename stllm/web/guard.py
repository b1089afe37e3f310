"""Middleware that closes the parts of gradio's server that the page does not need, and limits each request.

By itself, gradio fetches web addresses that a client names as files, forwards requests, converts recordings and keeps
copies of pages. With this middleware neither the server nor the browser fetches anything, and bodies have a limit.
"""

import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stllm.common.jsonl import loads
from stllm.serving.limits import MEBIBYTE, PageLimits
from stllm.serving.media import Bodies
from stllm.serving.replies import ApiError

SHUT = re.compile(
    r"^(/gradio_api)?/(file=\s*[a-z]+:|proxy=|process_recording|deep_link|component_server|stream/|custom_component|"
    r"monitoring|vibe|undo-vibe|runs?-history|runs/?$|dev/|profiling)",
    re.IGNORECASE,
)
MAX_MESSAGE = MEBIBYTE  # bytes of a request that is no upload
MESSAGES = 64  # of that size that may arrive at once, chosen here
FULL = 507, "the server holds as many uploads as it may: try again later"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

HEADERS = {  # gradio's page has scripts and styles inside, and its trimming of videos is WebAssembly; all is its own
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """ASGI middleware in front of gradio's application. folder: the uploads. examples: files that may also be read."""

    def __init__(self, app: ASGIApp, limits: PageLimits, folder: Path, examples: Collection[Path] = ()) -> None:
        self.app = app
        self.limits = limits
        self.folder = folder
        self.open = {str(path) for path in examples}
        self._bodies = Bodies(MAX_MESSAGE, MESSAGES * MAX_MESSAGE, limits.body_seconds)
        self._num_uploads = 0  # that arrive now
        self._held = 0  # bytes in `folder`, as far as is known without looking

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 403, 400, 408, 411, 413, 503 or 507 and a sentence, or let the request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_headers(send)
        refusal: tuple[int, str] | None = None
        upload = scope["path"].rstrip("/").endswith("/upload")
        if SHUT.search(scope["path"]):
            refusal = 403, "this is not offered here"
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_foreign(Headers(scope=scope)):
            refusal = 403, "a page of another site may not do this"
        elif scope["method"] == "POST" and upload:
            refusal = self._no_room(scope)
            if refusal is None:
                await self._take_upload(scope, receive, send)
                return
        elif scope["method"] in ("POST", "PUT", "PATCH"):
            body = None
            try:
                body = await self._bodies.read(Request(scope, receive))
                refusal = self._fault(body)
            except ApiError as error:
                refusal = error.status, str(error)
            except ClientDisconnect:
                return
            receive = _replay(bytes(body or b""), receive)
        if refusal is not None:
            await JSONResponse({"detail": refusal[1]}, status_code=refusal[0])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _fault(self, body: bytearray | None) -> tuple[int, str] | None:
        """Return the reason why a request is refused.

        gradio copies every file that a request names to the uploads before it calls a handler. It would copy any file
        of this machine, and would read devices without end.
        """
        if body is None:
            return 413, f"the request is too long: at most {MAX_MESSAGE // 1024} kB are taken"
        try:
            named = list(_paths(loads(bytes(body)))) if body else []
        except (ValueError, RecursionError):
            return 400, "the request is no JSON"
        if any(ADDRESS.match(path.strip()) for path in named):
            return 400, "a web address is not fetched here: upload the file"
        inside = os.path.join(self.folder, "")
        if not all(path in self.open or os.path.abspath(path).startswith(inside) for path in named):
            return 400, "only uploaded files and the examples can be read here: upload the video or image"
        return None

    def _no_room(self, scope: Scope) -> tuple[int, str] | None:
        """Return the reason why an upload is refused before it is read. gradio itself counts the bytes that arrive."""
        announced = Request(scope).headers.get("content-length", "")
        if not announced.isdigit():
            return 411, "an upload must say how long it is"
        if int(announced) > self.limits.media_bytes + MAX_MESSAGE:
            return 413, f"the file is too large: at most {self.limits.media_bytes // MEBIBYTE} MB are taken"
        sizes = list(_sizes(self.folder))
        self._held = sum(sizes)  # bytes that others have announced but not sent take no room
        if self._is_full(int(announced)) or len(sizes) > 2 * self.limits.folder_files:
            return FULL
        return None

    def _is_full(self, more: int = 0) -> bool:
        return self._held + more > self.limits.folder_bytes

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let gradio store the upload, which must arrive in time, and remove leftover files.

        gradio writes each file of a form into `folder` and moves those of the field `files` into folders within it.
        Files of other fields and of interrupted uploads stay.
        """
        self._num_uploads += 1
        in_time = _in_time(receive, self.limits.upload_seconds)

        async def receive_with_room() -> Message:
            message = await in_time()
            self._held += len(message.get("body", b""))
            return {"type": "http.disconnect"} if self._is_full() else message

        try:
            await self.app(scope, receive_with_room, send)
        except ClientDisconnect:
            status, why = FULL if self._is_full() else (408, "the upload did not arrive whole")
            await JSONResponse({"detail": why}, status_code=status)(scope, receive, send)
        finally:
            self._num_uploads -= 1
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove files directly in `folder`; while other uploads arrive, only files too old to belong to them."""
        oldest = time.time() - self.limits.upload_seconds if self._num_uploads else float("inf")
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # moved in the meantime
                    if entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                        os.unlink(entry)


def _is_foreign(headers: Headers) -> bool:
    """Check whether a browser sends the request for a page of another origin. Programs send neither header.

    Behind a proxy that changes the Host header, Sec-Fetch-Site or X-Forwarded-Host says what the browser asked for.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc not in (headers.get("host"), headers.get("x-forwarded-host"))
    except ValueError:
        return True


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Pass on the parts of a body; after that many seconds without its end, the client counts as gone."""
    end = anyio.current_time() + seconds
    whole = False

    async def receive_in_time() -> Message:
        nonlocal whole
        message: Message = {"type": "http.disconnect"}
        with anyio.CancelScope(deadline=float("inf") if whole else end):
            message = await receive()
        whole = whole or not message.get("more_body", False)
        return message

    return receive_in_time


def _with_headers(send: Send) -> Send:
    """Add `HEADERS` to the reply."""

    async def more(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return more


def _sizes(folder: Path) -> Iterator[int]:
    """Yield the sizes of the files and of the folders; gradio puts each file into a folder."""
    for path in folder.rglob("*"):
        with suppress(OSError):  # removed in the meantime
            yield path.stat().st_size


def _replay(body: bytes, receive: Receive) -> Receive:
    """Pass on the body that was read, then further messages."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _paths(value: Any) -> Iterator[str]:
    """Yield the files that a request names: gradio's {"path": ...}, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
