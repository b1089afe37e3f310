"""`stllm serve` on the command line."""

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
    path,
    whole,
)


def add_options(parser: Parser) -> None:
    add_checkpoint(parser, EMBEDDED)
    add_config(parser, "what the checkpoint says")
    add_address(parser, port=8000)
    parser.add_argument(
        "--media-root",
        type=path,
        metavar="DIR",
        help="folder of which clients may name files (default: none, clients send what they ask about)",
    )
    parser.add_argument(
        "--num-frames", type=whole(1), metavar="N", help="frames of a video (default: the checkpoint's own)"
    )
    add_context(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-media-mb", type=whole(1), default=100, metavar="MB", help="of a video or image (default: 100)"
    )
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
        "--max-new-tokens", type=whole(1), default=1024, metavar="N", help="of the longest answer (default: 1024)"
    )
    limits.add_argument(
        "--queue-size", type=whole(0), default=16, metavar="N", help="requests that may wait (default: 16)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command, which is in stllm.serving.command; returns its exit code."""
    from stllm.serving.command import run

    return run(args)


COMMAND = Command(
    help="serves OpenAI-compatible chat completions about videos and images",
    example="stllm serve --ckpt-path DIR --media-root videos",
    add_options=add_options,
    run=run,
    needs="stllm.serving.command",
)
