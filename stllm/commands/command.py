"""What a subcommand is to the command line, and options that several of them take."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from stllm.common.arguments import host, number, path, whole
from stllm.common.schema import MEDIA_SECONDS
from stllm.conversation.context import CONTEXTS, PUBLISHED

Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, where its `run(args) -> int` lives, its options, what argparse cannot check."""

    help: str
    target: str  # "module:function", imported when the command runs
    add_options: Callable[[Parser], None]
    example: str
    check: Callable[[argparse.Namespace], str | None] = lambda _: None  # what is wrong with the usage, if anything


EMBEDDED = ", else the tiny model that comes with the package"


def add_checkpoint(parser: Parser, otherwise: str = "") -> None:
    """`--ckpt-path`; otherwise: in words, what is taken when --cfg-path names none, either."""
    parser.add_argument(
        "--ckpt-path",
        type=path,
        metavar="DIR",
        help=f"weights: a folder, file or hub name of any known layout (default: model.ckpt of --cfg-path{otherwise})",
    )


def add_allow_pipe(parser: Parser) -> None:
    """`--allow-pipe`, of commands that open shards."""
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="let shards named pipe:CMD run the shell command CMD: only for lists that you trust",
    )


def add_context(parser: argparse._ActionsContainer, default: str = PUBLISHED) -> None:
    """`--context`. default: the rule without it, as text for the help."""
    parser.add_argument(
        "--context",
        choices=CONTEXTS,
        help="published: a long prompt, video included, keeps its last 2,000 tokens less --max-new-tokens; all: "
        f"everything, also beyond the positions the model was trained for (default: {default})",
    )


def add_media_seconds(parser: argparse._ActionsContainer, default: str = f"{MEDIA_SECONDS:g}") -> None:
    """`--media-seconds`. default: the limit without it, as text for the help."""
    parser.add_argument(
        "--media-seconds",
        type=number(0),
        metavar="SECONDS",
        help=f"the longest that one medium is read before it counts as unreadable; 0: no limit (default: {default})",
    )


def add_address(parser: Parser, *, port: int) -> None:
    """`--host` and `--port` of a command that listens."""
    parser.add_argument(
        "--host",
        type=host,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at (default: 127.0.0.1, this machine alone)",
    )
    parser.add_argument(
        "--port", type=whole(0, 65535), default=port, metavar="N", help=f"0: any that is free (default: {port})"
    )


def add_config(parser: Parser, default: str) -> None:
    """`--cfg-path`; default: in words, what holds without it."""
    parser.add_argument("--cfg-path", type=path, metavar="YAML", help=f"the model's configuration (default: {default})")
