"""`stllm demo` and `python demo_gradio.py`: a web page for chatting about videos."""

import argparse
from typing import TYPE_CHECKING, Any

from stllm.commands.options import Command, Parser, add_address, add_model, add_reading_limits, whole

if TYPE_CHECKING:
    from stllm.serving.listening import Host


def add_options(parser: Parser) -> None:
    add_model(parser)
    add_address(parser, port=7860)
    limits = parser.add_argument_group("limits")
    words = "largest upload in MB (default: 256)"
    limits.add_argument("--max-file-mb", type=whole(1), default=256, metavar="MB", help=words)
    add_reading_limits(limits, shortest=1, waiting=32)


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. Raises UserError."""
    from stllm.conversation.chat import find_examples
    from stllm.serving.limits import MEBIBYTE, PageLimits
    from stllm.serving.listening import serve

    limits = PageLimits(
        media_bytes=args.max_file_mb * MEBIBYTE,
        media_seconds=args.max_seconds,
        waiting=args.queue_size,
        read_seconds=args.max_read_seconds,
    )

    def build(host: "Host") -> tuple[Any, str]:
        from stllm.web.app import build_app, describe  # gradio alone takes seconds to import
        from stllm.web.service import Service

        service = Service(host.chat, limits, host.folder, [path for path, _ in find_examples()], host.jobs)
        app = build_app(service, local=host.local, about=describe(host.chat, host.checkpoint))
        return app, f"The demo is at {host.url}/"

    # A short patience, because every open page keeps a connection.
    return serve(args, limits, build, prefix="stllm-demo-", patience=1)


COMMAND = Command(
    help="serves a web page for chatting about videos",
    example="stllm demo --ckpt-path DIR --port 7860",
    add_options=add_options,
    run=run,
    needs="stllm.serving.listening",
)
