"""`python demo_gradio.py`, `stllm demo`: the page as an application."""

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllm.conversation.chat import FOLDER, KNOWS, Chat, find_examples
from stllm.serving.limits import MEBIBYTE, PageLimits
from stllm.serving.listening import hosting

if TYPE_CHECKING:
    from fastapi import FastAPI

    from stllm.web.service import Service

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 1  # open pages keep a connection for ever


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted. Raises UserError."""
    limits = PageLimits(
        media_bytes=args.max_file_mb * MEBIBYTE,
        media_seconds=args.max_seconds,
        waiting=args.queue_size,
        read_seconds=args.max_read_seconds,
    )
    with hosting(args, "stllm-demo-", read_seconds=limits.read_seconds) as host:
        if not host.local:
            logger.warning(
                "serving on %s: whoever reaches this machine can use the demo, there is no password", args.host
            )
        from stllm.web.service import Service

        service = Service(host.chat, limits, host.folder, [path for path, _ in find_examples()], host.reading)
        app = build_app(service, local=host.local, about=describe(host.chat, host.checkpoint))
        print(f"The demo is at {host.url}/ (Ctrl-C ends it)", flush=True)
        host.listen(app, service.jobs, patience=SHUTDOWN_SECONDS)
    return 0


def build_app(service: "Service", *, local: bool, about: str = "") -> "FastAPI":
    """The page as an application. local: whether to answer only to names of this machine."""
    os.environ.update(GRADIO_TEMP_DIR=str(service.folder), GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    import gradio
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from stllm.web.guard import Guard
    from stllm.web.page import STYLE, build_page, theme

    middleware = [Middleware(Guard, limits=service.limits, folder=service.folder, examples=service.examples)]
    if local:  # a page elsewhere that lets its own name point here is turned away
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))
    closed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    examples = find_examples()
    return gradio.mount_gradio_app(
        FastAPI(lifespan=service.jobs.lifespan, **closed),
        build_page(service, "ST-LLM", about, examples),
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
    """A short description of the model."""
    millions = sum(parameter.numel() for parameter in chat.model.parameters()) / 1e6
    size = f"{millions / 1000:.1f} billion" if millions >= 1000 else f"{millions:.1f} million"
    where = f"{str(chat.model.dtype).removeprefix('torch.')} on {chat.model.device}"
    about = f"{checkpoint.name}: {size} parameters, {where}, {chat.num_frames} frames"
    return f"{about}; {KNOWS}." if checkpoint == FOLDER else f"{about}."
