"""`stllm serve`: takes its address, loads the model, answers until it is ended."""

import argparse
import sys
from pathlib import Path
from threading import Thread

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.conversation.chat import load_chat
from stllm.conversation.embedded import chosen_checkpoint
from stllm.media.reading import ReadingPool
from stllm.serving.app import Server, build_app
from stllm.serving.ending import own_folder
from stllm.serving.limits import MEBIBYTE, Limits
from stllm.serving.listening import LOOPBACK, address, bound, listen

SHUTDOWN_SECONDS = 5  # for answers that are being written


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
        read_seconds=args.max_read_seconds,
    )
    with bound(args.host, args.port) as listener, own_folder("stllm-serve-") as folder:
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
        server = Server(chat, Path(checkpoint).name or "stllm", root, limits, folder, reading)
        app = build_app(server, [*LOOPBACK, "[::1]"] if args.host in LOOPBACK else None)
        listener.listen()  # who reads the address may come at once
        print(f"{server.name} answers at {address(args.host, listener)}/v1 (Ctrl-C ends it)", flush=True)
        if args.host not in LOOPBACK:
            print(f"warning: whoever reaches {args.host} can ask, without a password", file=sys.stderr)
        listen(app, listener, folder, server.jobs, patience=SHUTDOWN_SECONDS)
    return 0
