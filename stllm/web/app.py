"""The web page's application: gradio behind middleware that limits requests and blocks unused parts of gradio.

gradio alone would fetch web addresses that a client names as files, forward requests, convert recordings and store
copies of pages. With this middleware, neither the server nor the browser fetches anything from other hosts, and bodies
are limited.
"""

import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stllm.common.jsonl import loads
from stllm.conversation.chat import FOLDER, KNOWS, Chat, find_examples
from stllm.serving.limits import MEBIBYTE, ApiError, Bodies, PageLimits
from stllm.web.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

SHUT = re.compile(
    r"^(/gradio_api)?/(file=\s*[a-z]+:|proxy=|process_recording|deep_link|component_server|stream/|custom_component|"
    r"monitoring|vibe|undo-vibe|runs?-history|runs/?$|dev/|profiling)",
    re.IGNORECASE,
)
MAX_MESSAGE = MEBIBYTE  # bytes of a request that is not an upload
MESSAGES = 64  # number of such requests, of the largest size, that may arrive at once; our choice
FULL = "the server holds as many uploads as it may: try again later"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

HEADERS = {  # inline scripts and WebAssembly are allowed, because gradio's page uses them; other hosts are not
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def build_app(service: Service, *, local: bool, about: str = "") -> "FastAPI":
    """Build the application. local: accept only requests for localhost. about: description of the model to show."""
    os.environ.update(GRADIO_TEMP_DIR=str(service.folder), GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    import gradio
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from stllm.web.page import STYLE, build_page, theme

    middleware = [Middleware(Guard, limits=service.limits, folder=service.folder, examples=service.examples)]
    if local:  # prevents DNS rebinding: a web page whose own host name resolves to this machine
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))
    closed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    examples = find_examples()
    return gradio.mount_gradio_app(
        FastAPI(lifespan=service.jobs.lifespan, **closed),
        build_page(service, about, examples),
        "/",
        show_error=False,
        allowed_paths=[str(path) for path, _ in examples],
        max_file_size=service.limits.media_bytes,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=["api"],
        run_history=False,
        theme=theme(),
        css=STYLE.read_text(encoding="utf-8"),
        app_kwargs={**closed, "middleware": middleware},
    )


def describe(chat: Chat, checkpoint: Path) -> str:
    """Return a short description of the model."""
    millions = sum(parameter.numel() for parameter in chat.model.parameters()) / 1e6
    size = f"{millions / 1000:.1f} billion" if millions >= 1000 else f"{millions:.1f} million"
    where = f"{str(chat.model.dtype).removeprefix('torch.')} on {chat.model.device}"
    about = f"{checkpoint.name}: {size} parameters, {where}, {chat.num_frames} frames"
    return f"{about}; {KNOWS}." if checkpoint == FOLDER else f"{about}."


class Guard:
    """ASGI middleware in front of gradio's application.

    folder: folder of uploads. examples: other files clients may name.
    """

    def __init__(self, app: ASGIApp, limits: PageLimits, folder: Path, examples: Collection[Path] = ()) -> None:
        self.app = app
        self.limits = limits
        self.folder = folder
        self.open = {str(path) for path in examples}
        self._bodies = Bodies(MAX_MESSAGE, MESSAGES * MAX_MESSAGE, limits.body_seconds)
        self._num_uploads = 0  # uploads that are arriving
        self._held = 0  # bytes in `folder` at the last count, and bytes that have arrived since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to gradio, or refuse it with status 400, 403, 408, 411, 413, 503 or 507 and a sentence."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            if SHUT.search(scope["path"]):
                raise ApiError(403, "this is not offered here")
            if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_foreign(Headers(scope=scope)):
                raise ApiError(403, "a page of another site may not do this")
            if scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
                await self._take_upload(scope, receive, send_with_headers)
                return
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self._bodies.read(Request(scope, receive))
                self._check(body)
                receive = _replay(bytes(body or b""), receive)
        except ApiError as error:
            refusal = JSONResponse({"detail": str(error)}, status_code=error.status)
            await refusal(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass
        else:
            await self.app(scope, receive, send_with_headers)

    def _check(self, body: bytearray | None) -> None:
        """Raise ApiError if a request's body is too long (None), or names a file that clients may not read.

        Before gradio calls a handler, it copies every file that the request names to the uploads. Without this check it
        would copy any file of this machine, and read devices without end.
        """
        if body is None:
            raise ApiError(413, f"the request is too long: at most {MAX_MESSAGE // 1024} kB are taken")
        try:
            named = list(_paths(loads(bytes(body)))) if body else []
        except (ValueError, RecursionError):
            raise ApiError(400, "the request is no JSON") from None
        if any(ADDRESS.match(path.strip()) for path in named):
            raise ApiError(400, "a web address is not fetched here: upload the file")
        inside = os.path.join(self.folder, "")
        if not all(path in self.open or os.path.abspath(path).startswith(inside) for path in named):
            raise ApiError(400, "only uploaded files and the examples can be read here: upload the video or image")

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload to gradio within the limits, and remove leftover files. Raises ApiError.

        gradio limits the size of each file. It writes each file of a form into `folder`, and moves those of the field
        `files` into subfolders. It leaves behind files of other fields and of interrupted uploads.
        """
        announced = Headers(scope=scope).get("content-length", "")
        if not announced.isdigit():
            raise ApiError(411, "an upload must say how long it is")
        if int(announced) > self.limits.media_bytes + MAX_MESSAGE:
            raise ApiError(413, f"the file is too large: at most {self.limits.media_bytes // MEBIBYTE} MB are taken")
        sizes = []  # of files and of subfolders; gradio puts each file into a subfolder
        for path in self.folder.rglob("*"):
            with suppress(OSError):  # removed in the meantime
                sizes.append(path.stat().st_size)
        self._held = sum(sizes)  # without bytes of other uploads that have not arrived yet
        room = self.limits.folder_bytes
        if self._held + int(announced) > room or len(sizes) > 2 * self.limits.folder_files:
            raise ApiError(507, FULL)
        end, whole = anyio.current_time() + self.limits.upload_seconds, False

        async def receive_in_time() -> Message:
            """Pass on the body; report a disconnection if it is late or larger than the room for uploads."""
            nonlocal whole
            message: Message = {"type": "http.disconnect"}
            with anyio.CancelScope(deadline=float("inf") if whole else end):
                message = await receive()
            whole = whole or not message.get("more_body", False)
            self._held += len(message.get("body", b""))
            return {"type": "http.disconnect"} if self._held > room else message

        self._num_uploads += 1
        try:
            await self.app(scope, receive_in_time, send)
        except ClientDisconnect:
            refusal = ApiError(507, FULL) if self._held > room else ApiError(408, "the upload did not arrive whole")
            raise refusal from None
        finally:
            self._num_uploads -= 1
            # Remove files directly in `folder`; while other uploads arrive, only files too old to belong to them.
            oldest = time.time() - self.limits.upload_seconds if self._num_uploads else float("inf")
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    with suppress(OSError):  # moved in the meantime
                        if entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                            os.unlink(entry)


def _is_foreign(headers: Headers) -> bool:
    """Check whether a browser sends the request for a page of another origin. Other programs do not send the headers.

    Sec-Fetch-Site, or else X-Forwarded-Host, is also correct behind a proxy that changes the Host header.
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


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` function that first returns the body, which was already read, and then further messages."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _paths(value: Any) -> Iterator[str]:
    """Yield the files that a request names, which are gradio's {"path": ...} at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
