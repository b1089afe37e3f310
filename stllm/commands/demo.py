"""`stllm demo` on the command line."""

import argparse

from stllm.commands.options import (
    EMBEDDED,
    Command,
    Parser,
    add_address,
    add_checkpoint,
    add_config,
    add_context,
    number,
    whole,
)


def add_options(parser: Parser) -> None:
    add_checkpoint(parser, EMBEDDED)
    add_config(parser, "what the checkpoint says")
    add_address(parser, port=7860)
    parser.add_argument(
        "--num-frames", type=whole(1), metavar="N", help="frames of a video at first (default: the checkpoint's own)"
    )
    add_context(parser)
    limits = parser.add_argument_group("limits of one user")
    limits.add_argument("--max-file-mb", type=whole(1), default=256, metavar="MB", help="of an upload (default: 256)")
    limits.add_argument(
        "--max-seconds", type=number(1), default=1800.0, metavar="SECONDS", help="of a video (default: 1800)"
    )
    limits.add_argument(
        "--max-read-seconds",
        type=number(1),
        default=60.0,
        metavar="SECONDS",
        help="for decoding a video or image (default: 60)",
    )
    limits.add_argument(
        "--queue-size", type=whole(1), default=32, metavar="N", help="requests that may wait (default: 32)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command, which is in stllm.web.command; returns its exit code."""
    from stllm.web.command import run

    return run(args)


COMMAND = Command(
    help="serves a page in which to talk with videos",
    example="stllm demo --ckpt-path DIR --port 7860",
    add_options=add_options,
    run=run,
    needs="stllm.web.command",
)
