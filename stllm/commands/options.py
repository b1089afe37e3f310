"""Options that several commands share, and types of option values for argparse.

Everything that `--help` imports uses the standard library only. A type's error says what was found and what was
expected.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from stllm.common.device import DEVICE_PATTERN
from stllm.common.schema import MEDIA_SECONDS
from stllm.conversation.context import CONTEXTS, PUBLISHED

Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Command:
    """A subcommand; its module has its options and its `run`."""

    help: str
    example: str
    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]  # returns the exit code
    needs: str  # the heavy module that `run` imports; it is imported first, under a spinner
    check: Callable[[argparse.Namespace], str | None] = lambda _: None  # what is wrong with the usage, if anything


def path(text: str) -> str:
    """A path, unchanged. An empty one is refused."""
    if not text:  # an unset variable in a script; "" would mean this folder
        raise argparse.ArgumentTypeError("found nothing, expected a path")
    return text


def host(text: str) -> str:
    """An address or a host name. An empty one (an unset variable) would open every address of the machine."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found nothing, expected an address such as 127.0.0.1 (0.0.0.0: all of them)")
    return text.strip()


def names(text: str) -> list[str]:
    """Names between commas, at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected names between commas")
    return found


def whole(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """A whole number from `low` to `high`: by default one that is not too large for a seed or a size."""

    def parse(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) < 20
        if not is_number or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from {low} to {high}")
        return int(text)

    return parse


def number(low: float) -> Callable[[str], float]:
    """A finite number of at least `low`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of at least {low}")
        return value

    return parse


def device_name(text: str) -> str:
    """Check the form of a device's name. The command itself checks that the device exists."""
    if not DEVICE_PATTERN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected auto, cpu, cuda, cuda:N or mps")
    return text


def gpu_number(text: str) -> str:
    """The published --gpu-id: N is the device cuda:N."""
    return f"cuda:{whole(0)(text)}"


EMBEDDED = ", else the tiny model that comes with the package"


def add_checkpoint(parser: Parser, otherwise: str = "") -> None:
    """Add `--ckpt-path`. otherwise: in words, what is used when --cfg-path names no checkpoint either."""
    parser.add_argument(
        "--ckpt-path",
        type=path,
        metavar="DIR",
        help=f"weights: a folder, file or hub name of any known layout (default: model.ckpt of --cfg-path{otherwise})",
    )


def add_allow_pipe(parser: Parser) -> None:
    """Add `--allow-pipe` to a command that opens shards."""
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="let shards named pipe:CMD run the shell command CMD: only for lists that you trust",
    )


def add_context(parser: argparse._ActionsContainer, default: str = PUBLISHED) -> None:
    """Add `--context`. default: the rule that holds without it, as help text."""
    parser.add_argument(
        "--context",
        choices=CONTEXTS,
        help="published: a long prompt, video included, keeps its last 2,000 tokens less --max-new-tokens; all: "
        f"everything, also beyond the positions the model was trained for (default: {default})",
    )


def add_media_seconds(parser: argparse._ActionsContainer, default: str = f"{MEDIA_SECONDS:g}") -> None:
    """Add `--media-seconds`. default: the limit that holds without it, as help text."""
    parser.add_argument(
        "--media-seconds",
        type=number(0),
        metavar="SECONDS",
        help=f"the longest that one medium is read before it counts as unreadable; 0: no limit (default: {default})",
    )


def add_address(parser: Parser, *, port: int) -> None:
    """Add `--host` and `--port` to a command that listens."""
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
    """Add `--cfg-path`. default: in words, what holds without it."""
    parser.add_argument("--cfg-path", type=path, metavar="YAML", help=f"the model's configuration (default: {default})")
