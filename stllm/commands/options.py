"""Options that several commands share, and types of option values for argparse.

Everything that `--help` imports uses the standard library only. A type's error says what was found and what was
expected.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stllm.common.device import DEVICE_PATTERN
from stllm.common.schema import CONTEXTS, MEDIA_SECONDS, PUBLISHED, QUANTIZATIONS

Parser = argparse.ArgumentParser
Container = argparse._ActionsContainer  # a parser or a group of it


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
    """Check a path, which may not be empty."""
    if not text:  # an unset variable in a script; "" would mean this folder
        raise argparse.ArgumentTypeError("found nothing, expected a path")
    return text


def host(text: str) -> str:
    """Check an address or a host name. An empty one (an unset variable) would open every address of the machine."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found nothing, expected an address such as 127.0.0.1 (0.0.0.0: all of them)")
    return text.strip()


def names(text: str) -> list[str]:
    """Split names between commas, at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected names between commas")
    return found


def whole(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """Return the type of a whole number from `low` to `high`, by default one that is a possible seed."""

    def parse(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) < 20
        if not is_number or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from {low} to {high}")
        return int(text)

    return parse


def number(low: float) -> Callable[[str], float]:
    """Return the type of a finite number of at least `low`."""

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
    """Return the device cuda:N for the N of the published --gpu-id."""
    return f"cuda:{whole(0)(text)}"


# ---- options that several commands share ----------------------------------------------------------------------------


def add_checkpoint(parser: Parser, otherwise: str = "") -> None:
    """Add `--ckpt-path`. otherwise: in words, what is used when --cfg-path names no checkpoint either."""
    words = f"weights: a folder, file or hub name of any known layout (default: model.ckpt of --cfg-path{otherwise})"
    parser.add_argument("--ckpt-path", type=path, metavar="DIR", help=words)


def add_config(parser: Parser, default: str = "what the checkpoint says") -> None:
    """Add `--cfg-path`. default: in words, what holds without it."""
    parser.add_argument("--cfg-path", type=path, metavar="YAML", help=f"the model's configuration (default: {default})")


def add_context(parser: Container, default: str = PUBLISHED) -> None:
    """Add `--context`. default: the rule that holds without it, as help text."""
    parser.add_argument(
        "--context",
        choices=CONTEXTS,
        help="published: a long prompt, video included, keeps its last 2,000 tokens less --max-new-tokens; all: "
        f"everything, also beyond the positions the model was trained for (default: {default})",
    )


def add_engine(parser: Container) -> None:
    """Add `--engine` to a command that answers questions."""
    words = (
        "address of vLLM, or another server that takes prompt embeddings, with this language model: it decodes, with "
        "one beam, and only reading and encoding happen here (default: decode here)"
    )
    parser.add_argument("--engine", metavar="URL", help=words)


def add_quantization(parser: Container) -> None:
    """Add `--quantization` to a command that holds a language model."""
    words = (
        "4bit or 8bit: less memory for the language model (bitsandbytes, on CUDA and on CPUs), as "
        "--options model.quantization=4bit (default: what --cfg-path says, else none)"
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, metavar="BITS", help=words)


def add_model(parser: Parser) -> None:
    """Add the options of a command that answers questions: its model, the frames that it sees, the context rule."""
    add_checkpoint(parser, ", else the tiny model that comes with the package")
    add_config(parser)
    words = "frames taken from a video (default: the checkpoint's own)"
    parser.add_argument("--num-frames", type=whole(1), metavar="N", help=words)
    add_context(parser)
    add_engine(parser)
    add_quantization(parser)


def add_address(parser: Parser, *, port: int) -> None:
    """Add `--host` and `--port` to a command that listens."""
    words = "address to listen at (default: 127.0.0.1, this machine alone)"
    parser.add_argument("--host", type=host, default="127.0.0.1", metavar="ADDRESS", help=words)
    words = f"0: any that is free (default: {port})"
    parser.add_argument("--port", type=whole(0, 65535), default=port, metavar="N", help=words)


def add_reading_limits(limits: Container, *, shortest: int, waiting: int) -> None:
    """Add the limits of reading and waiting to a command that listens. shortest: the smallest --max-seconds."""
    numbers: dict[str, Any] = {"default": 1800.0, "metavar": "SECONDS"}
    limits.add_argument("--max-seconds", type=number(shortest), help="of a video (default: 1800)", **numbers)
    numbers["default"] = 60.0
    words = "for decoding a video or image (default: 60)"
    limits.add_argument("--max-read-seconds", type=number(1), help=words, **numbers)
    words = f"requests that may wait; 0: one request at a time (default: {waiting})"
    limits.add_argument("--queue-size", type=whole(0), default=waiting, metavar="N", help=words)


def add_allow_pipe(parser: Parser) -> None:
    """Add `--allow-pipe` to a command that opens shards."""
    words = "let shards named pipe:CMD run the shell command CMD: only for lists that you trust"
    parser.add_argument("--allow-pipe", action="store_true", help=words)


def add_workers(parser: Container, words: str = "processes that decode (default: one a core, up to 8)") -> None:
    """Add `--num-workers`, a number of processes."""
    parser.add_argument("--num-workers", type=whole(0), metavar="N", help=words)


def add_media_seconds(parser: Container, default: str = f"{MEDIA_SECONDS:g}") -> None:
    """Add `--media-seconds`. default: the limit that holds without it, as help text."""
    words = "the longest that one medium is read before it counts as unreadable; 0: no limit"
    parser.add_argument("--media-seconds", type=number(0), metavar="SECONDS", help=f"{words} (default: {default})")
