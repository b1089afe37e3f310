"""`stllm serve` on the command line."""

import argparse

from stllm.commands.options import Command, Parser, add_address, add_model, add_reading_limits, path, whole


def add_options(parser: Parser) -> None:
    add_model(parser)
    add_address(parser, port=8000)
    words = "folder of which clients may name files (default: none, clients send what they ask about)"
    parser.add_argument("--media-root", type=path, metavar="DIR", help=words)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-media-mb", type=whole(1), default=100, metavar="MB", help="of a video or image (default: 100)"
    )
    limits.add_argument(
        "--max-new-tokens", type=whole(1), default=1024, metavar="N", help="of the longest answer (default: 1024)"
    )
    add_reading_limits(limits, shortest=0, waiting=16, fewest=0)


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
