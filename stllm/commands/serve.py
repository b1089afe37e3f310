"""`stllm serve`: OpenAI-compatible chat completions about videos and images."""

import argparse
from typing import TYPE_CHECKING, Any

from stllm.commands.options import (
    EMBEDDED,
    Command,
    Parser,
    add_address,
    add_checkpoint,
    add_config,
    add_context,
    number,
    path,
    whole,
)
from stllm.common.errors import UserError
from stllm.common.files import user_path

if TYPE_CHECKING:
    from stllm.serving.listening import Host


def add_options(parser: Parser) -> None:
    group = add_serving(parser, port=8000, waiting=16, whose="")
    group.add_argument(
        "--max-media-mb", type=whole(1), default=100, metavar="MB", help="of a video or image (default: 100)"
    )
    group.add_argument(
        "--max-new-tokens", type=whole(1), default=1024, metavar="N", help="of the longest answer (default: 1024)"
    )
    parser.add_argument(
        "--media-root",
        type=path,
        metavar="DIR",
        help="folder of which clients may name files (default: none, clients send what they ask about)",
    )


def add_serving(parser: Parser, *, port: int, waiting: int, whose: str) -> argparse._ArgumentGroup:
    """Add the options that the server and the page share. whose: end of the limits' title. Return their group."""
    add_checkpoint(parser, EMBEDDED)
    add_config(parser, "what the checkpoint says")
    add_address(parser, port=port)
    parser.add_argument(
        "--num-frames",
        type=whole(1),
        metavar="N",
        help="frames of a video, unless a request sets them (default: the checkpoint's own)",
    )
    add_context(parser)
    limits = parser.add_argument_group(f"limits{whose}")
    limits.add_argument(
        "--max-seconds", type=number(0), default=1800.0, metavar="SECONDS", help="of a video (default: 1800)"
    )
    limits.add_argument(
        "--max-read-seconds",
        type=number(1),
        default=60.0,
        metavar="SECONDS",
        help="for decoding a video or image (default: 60)",
    )
    limits.add_argument(
        "--queue-size", type=whole(0), default=waiting, metavar="N", help=f"requests that may wait (default: {waiting})"
    )
    return limits


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises UserError."""
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
