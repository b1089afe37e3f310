"""`stllm demo` on the command line."""

import argparse

from stllm.commands.options import Command, Parser, add_address, add_model, add_reading_limits, whole


def add_options(parser: Parser) -> None:
    add_model(parser)
    add_address(parser, port=7860)
    limits = parser.add_argument_group("limits of one user")
    limits.add_argument("--max-file-mb", type=whole(1), default=256, metavar="MB", help="of an upload (default: 256)")
    add_reading_limits(limits, shortest=1, waiting=32, fewest=1)


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
