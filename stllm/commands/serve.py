"""`stllm serve`: OpenAI-compatible chat completions about videos and images."""

import argparse
from typing import TYPE_CHECKING, Any

from stllm.commands.options import Command, Parser, add_address, add_model, add_reading_limits, path, whole
from stllm.common.errors import UserError
from stllm.common.files import user_path

if TYPE_CHECKING:
    from stllm.serving.listening import Host


def add_options(parser: Parser) -> None:
    add_model(parser)
    add_address(parser, port=8000)
    words = "folder whose files clients may name in requests (default: none; clients must send their files)"
    parser.add_argument("--media-root", type=path, metavar="DIR", help=words)
    limits = parser.add_argument_group("limits")
    words = "largest video or image in MB (default: 100)"
    limits.add_argument("--max-media-mb", type=whole(1), default=100, metavar="MB", help=words)
    words = "maximum length of an answer in tokens (default: 1024)"
    limits.add_argument("--max-new-tokens", type=whole(1), default=1024, metavar="N", help=words)
    add_reading_limits(limits, shortest=0, waiting=16)


def run(args: argparse.Namespace) -> int:
    """Serve requests until Ctrl-C. Raises UserError."""
    from stllm.serving.app import Server, build_app
    from stllm.serving.limits import MEBIBYTE, Limits
    from stllm.serving.listening import LOOPBACK, serve

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

    def build(host: "Host") -> tuple[Any, str]:
        server = Server(host.chat, host.checkpoint.name or "stllm", root, limits, host.folder, host.jobs)
        app = build_app(server, [*LOOPBACK, "[::1]"] if host.local else None)
        return app, f"{server.name} answers at {host.url}/v1"

    return serve(args, limits, build, prefix="stllm-serve-", patience=5)


COMMAND = Command(
    help="serves OpenAI-compatible chat completions about videos and images",
    example="stllm serve --ckpt-path DIR --media-root videos",
    add_options=add_options,
    run=run,
    needs="stllm.serving.app",
)
