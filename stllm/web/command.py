"""`python demo_gradio.py`: loads the model and serves the page, on this machine alone unless told otherwise."""

import argparse
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from stllm.conversation.chat import Chat, load_chat
from stllm.conversation.embedded import FOLDER, KNOWS, chosen_checkpoint, find_examples
from stllm.media.reading import ReadingPool
from stllm.serving.ending import own_folder
from stllm.serving.listening import LOOPBACK, address, bound, listen
from stllm.web.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from stllm.web.service import Service

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 1  # open pages keep a connection for ever


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted. Raises UserError."""
    checkpoint = chosen_checkpoint(args)
    limits = Limits(
        file_megabytes=args.max_file_mb,
        video_seconds=args.max_seconds,
        queue=args.queue_size,
        read_seconds=args.max_read_seconds,
    )
    with bound(args.host, args.port) as listener, own_folder("stllm-demo-") as folder:
        reading = ReadingPool(seconds=limits.read_seconds)
        started = Thread(target=reading.start, daemon=True)  # while the model is loaded
        started.start()
        chat = load_chat(
            checkpoint,
            cfg_path=args.cfg_path,
            options=args.options,
            device=args.device,
            dtype=args.dtype,
            num_frames=args.num_frames,
            context=args.context,
        )
        started.join()
        if args.host not in LOOPBACK:
            logger.warning(
                "serving on %s: whoever reaches this machine can use the demo, there is no password", args.host
            )
        from stllm.web.service import Service

        service = Service(chat, limits, folder, [path for path, _ in find_examples()], reading)
        app = build_app(service, local=args.host in LOOPBACK, about=describe(chat, Path(checkpoint)))
        listener.listen()  # who reads the address may come at once
        print(f"The demo is at {address(args.host, listener)}/ (Ctrl-C ends it)", flush=True)
        listen(app, listener, folder, service.jobs, patience=SHUTDOWN_SECONDS)
    return 0


def build_app(service: "Service", *, local: bool, about: str = "") -> "FastAPI":
    """The page as an application. local: whether only names of this machine are answered to."""
    os.environ.update(GRADIO_TEMP_DIR=str(service.folder), GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    import anyio
    import gradio
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from stllm.web.guard import Guard
    from stllm.web.page import STYLE, build_page, theme

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.jobs.close)

    middleware = [Middleware(Guard, limits=service.limits, folder=service.folder, examples=service.examples)]
    if local:  # a page elsewhere that lets its own name point here is turned away
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))
    closed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    examples = find_examples()
    return gradio.mount_gradio_app(
        FastAPI(lifespan=lifespan, **closed),
        build_page(service, "ST-LLM", about, examples),
        "/",
        show_error=False,
        allowed_paths=[str(path) for path, _ in examples],
        max_file_size=service.limits.file_megabytes << 20,
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
    """Which model answers, in a few words."""
    millions = sum(parameter.numel() for parameter in chat.model.parameters()) / 1e6
    size = f"{millions / 1000:.1f} billion" if millions >= 1000 else f"{millions:.1f} million"
    where = f"{str(chat.model.dtype).removeprefix('torch.')} on {chat.model.device}"
    about = f"{checkpoint.name}: {size} parameters, {where}, {chat.num_frames} frames"
    return f"{about}; {KNOWS}." if checkpoint == FOLDER else f"{about}."
