"""`python demo_gradio.py`: loads the model and serves the page, on this machine alone unless told otherwise."""

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat, load_chat
from stllm.conversation.embedded import FOLDER, KNOWS, chosen_checkpoint, find_examples
from stllm.datasets.media_info import limited_pixels
from stllm.serving.ending import own_folder
from stllm.serving.limits import MEDIA_PIXELS
from stllm.web.limits import Limits

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted. Raises UserError."""
    checkpoint = chosen_checkpoint(args)
    limits = Limits(file_megabytes=args.max_file_mb, video_seconds=args.max_seconds, queue=args.queue_size)
    chat = load_chat(
        checkpoint,
        cfg_path=args.cfg_path,
        options=args.options,
        device=args.device,
        dtype=args.dtype,
        num_frames=args.num_frames,
        context=args.context,
    )
    if args.host not in LOOPBACK:
        logger.warning("serving on %s: whoever reaches this machine can use the demo, there is no password", args.host)
    with own_folder("stllm-demo-") as folder, limited_pixels(MEDIA_PIXELS):
        about = describe(chat, Path(checkpoint))
        page = open_page(chat, limits, folder, host=args.host, port=args.port or None, about=about)
        print(f"The demo is at {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return 0


def open_page(
    chat: Chat, limits: Limits, folder: Path, *, host: str, port: int | None, about: str = ""
) -> "gradio.Blocks":
    """Builds the page and serves it in threads of its own.

    folder: for uploads, which the caller removes at the end. port: None for any free one.
    Raises UserError for a port that is taken.
    """
    os.environ.update(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from stllm.web.guard import Guard
    from stllm.web.page import STYLE, build_page, theme
    from stllm.web.service import Service

    examples = find_examples()
    page = build_page(Service(chat, limits, folder, [path for path, _ in examples]), "ST-LLM", about, examples)
    middleware = [Middleware(Guard, limits=limits, folder=folder)]
    if host in LOOPBACK:  # a page elsewhere that lets its own name point here is turned away
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[str(path) for path, _ in examples],
            max_file_size=limits.file_megabytes << 20,
            state_session_capacity=1000,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            footer_links=["api"],
            theme=theme(),
            css=STYLE.read_text(encoding="utf-8"),
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    except OSError:
        raise UserError(f"port {port} of {host} cannot be opened, it may be taken: name another with --port") from None
    return page


def describe(chat: Chat, checkpoint: Path) -> str:
    """Which model answers, in a few words."""
    millions = sum(parameter.numel() for parameter in chat.model.parameters()) / 1e6
    size = f"{millions / 1000:.1f} billion" if millions >= 1000 else f"{millions:.1f} million"
    where = f"{str(chat.model.dtype).removeprefix('torch.')} on {chat.model.device}"
    about = f"{checkpoint.name}: {size} parameters, {where}, {chat.num_frames} frames"
    return f"{about}; {KNOWS}." if checkpoint == FOLDER else f"{about}."
