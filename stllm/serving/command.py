"""`stllm serve`: takes its address, loads the model, answers until it is ended."""

import argparse
import socket
import sys
from pathlib import Path

import uvicorn

from stllm.common.errors import UserError
from stllm.conversation.chat import load_chat
from stllm.conversation.embedded import chosen_checkpoint
from stllm.serving.app import Server, build_app
from stllm.serving.limits import MEBIBYTE, Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHUTDOWN_SECONDS = 5


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C. Raises UserError."""
    checkpoint = chosen_checkpoint(args)
    root = None if args.media_root is None else Path(args.media_root).expanduser().resolve()
    if root is not None and not root.is_dir():
        raise UserError(f"--media-root {args.media_root} is no folder: name one that holds videos")
    limits = Limits(
        media_bytes=args.max_media_mb * MEBIBYTE,
        media_seconds=args.max_seconds,
        new_tokens=args.max_new_tokens,
        waiting=args.queue_size,
    )
    with _bound(args.host, args.port) as listener:
        chat = load_chat(
            checkpoint,
            cfg_path=args.cfg_path,
            options=args.options,
            device=args.device,
            dtype=args.dtype,
            num_frames=args.num_frames,
            context=args.context,
        )
        server = Server(chat=chat, name=Path(checkpoint).name or "stllm", media_root=root, limits=limits)
        app = build_app(server, [*LOOPBACK, "[::1]"] if args.host in LOOPBACK else None)
        print(f"{server.name} answers at {_address(args.host, listener)}/v1 (Ctrl-C ends it)", flush=True)
        if args.host not in LOOPBACK:
            print(f"warning: whoever reaches {args.host} can ask, without a password", file=sys.stderr)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


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
