"""`stllm serve`: takes its address, loads the model, answers until it is ended."""

import argparse
import asyncio
import logging
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.conversation.chat import load_chat
from stllm.conversation.embedded import chosen_checkpoint
from stllm.serving.app import Server, build_app
from stllm.serving.ending import end_at_once, own_folder
from stllm.serving.limits import MEBIBYTE, Limits
from stllm.serving.protocol import TimedProtocol

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHUTDOWN_SECONDS = 5
CONNECTIONS = 500  # fewer than the files that a process may open by default


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C. Raises UserError."""
    checkpoint = chosen_checkpoint(args)
    root = None if args.media_root is None else user_path(args.media_root).resolve()
    if root is not None and not root.is_dir():
        raise UserError(f"--media-root {args.media_root} is no folder: name one that holds videos")
    limits = Limits(
        media_bytes=args.max_media_mb * MEBIBYTE,
        media_seconds=args.max_seconds,
        new_tokens=args.max_new_tokens,
        waiting=args.queue_size,
    )
    with _bound(args.host, args.port) as listener, own_folder("stllm-serve-") as folder:
        chat = load_chat(
            checkpoint,
            cfg_path=args.cfg_path,
            options=args.options,
            device=args.device,
            dtype=args.dtype,
            num_frames=args.num_frames,
            context=args.context,
        )
        server = Server(chat=chat, name=Path(checkpoint).name or "stllm", media_root=root, limits=limits, folder=folder)
        app = build_app(server, [*LOOPBACK, "[::1]"] if args.host in LOOPBACK else None)
        print(f"{server.name} answers at {_address(args.host, listener)}/v1 (Ctrl-C ends it)", flush=True)
        if args.host not in LOOPBACK:
            print(f"warning: whoever reaches {args.host} can ask, without a password", file=sys.stderr)
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            limit_concurrency=CONNECTIONS,
            log_level="warning",
            access_log=False,
            server_header=False,
            use_colors=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        _Server(config, folder).run(sockets=[listener])
    return 0


class _Server(uvicorn.Server):
    """uvicorn's server, but a second signal ends the process at once. folder: of uploads, removed then."""

    def __init__(self, config: uvicorn.Config, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the shutdown, or ends the process when it has begun."""
        if self.should_exit:
            end_at_once(self.folder)
        super().handle_exit(sig, frame)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether to log it: requests that the shutdown cancels are no failures, and each would print a traceback."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def _bound(host: str, port: int) -> socket.socket:
    """The address, taken before the model is loaded. Raises UserError when it is not to be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"{host}:{port} cannot be taken ({error.strerror or error}): name another --port, or a --host of this "
            "machine"
        ) from None
    return listener


def _address(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
