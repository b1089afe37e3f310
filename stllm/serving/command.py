"""`stllm serve`: the server's limits and address from the command line."""

import argparse
import sys

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.serving.app import Server, build_app
from stllm.serving.limits import MEBIBYTE, Limits
from stllm.serving.listening import LOOPBACK, hosting

SHUTDOWN_SECONDS = 5  # for answers that are being written


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises UserError."""
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
    with hosting(args, "stllm-serve-", read_seconds=limits.read_seconds) as host:
        server = Server(host.chat, host.checkpoint.name or "stllm", root, limits, host.folder, host.reading)
        print(f"{server.name} answers at {host.url}/v1 (Ctrl-C ends it)", flush=True)
        if not host.local:
            print(f"warning: whoever reaches {args.host} can ask, without a password", file=sys.stderr)
        app = build_app(server, [*LOOPBACK, "[::1]"] if host.local else None)
        host.listen(app, server.jobs, patience=SHUTDOWN_SECONDS)
    return 0
