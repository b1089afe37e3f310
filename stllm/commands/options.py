"""Options that several commands share, and value types for argparse.

To keep `--help` fast, nothing heavy is imported here. The error of a type says what was found and what was expected.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stllm.common.device import DEVICE_PATTERN
from stllm.common.schema import CONTEXTS, MAX_BEAMS, MEDIA_SECONDS, PUBLISHED, QUANTIZATIONS

Parser = argparse.ArgumentParser
Container = argparse._ActionsContainer  # a parser, or an argument group of a parser


@dataclass(frozen=True)
class Command:
    """A subcommand of `stllm`.

    help, example: for --help. add_options: function that adds its options. run: returns the exit code. needs: heavy
    module that `run` imports; it is imported beforehand, while a spinner is shown. check: returns a sentence if the
    options contradict each other, else None.
    """

    help: str
    example: str
    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    needs: str
    check: Callable[[argparse.Namespace], str | None] = lambda _: None


def path(text: str) -> str:
    """Check that a path is not empty."""
    if not text:  # probably an unset variable in a script; "" would mean the working directory
        raise argparse.ArgumentTypeError("found nothing, expected a path")
    return text


def host(text: str) -> str:
    """Check that an address or host name is not empty, since "" would mean all addresses of the machine."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found nothing, expected an address such as 127.0.0.1 (0.0.0.0: all of them)")
    return text.strip()


def names(text: str) -> list[str]:
    """Split a list of names at commas. There must be at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected names between commas")
    return found


def whole(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from `low` to `high` (default: the largest possible seed)."""

    def parse(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) < 20
        if not is_number or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from {low} to {high}")
        return int(text)

    return parse


def number(low: float) -> Callable[[str], float]:
    """Return an argparse type for finite numbers of at least `low`."""

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
    """Check the form of a device's name. Whether the device exists is checked later."""
    if not DEVICE_PATTERN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected auto, cpu, cuda, cuda:N or mps")
    return text


def gpu_number(text: str) -> str:
    """Return the device name cuda:N for N, the value of the published option --gpu-id."""
    return f"cuda:{whole(0)(text)}"


# ---- options that several commands share ----------------------------------------------------------------------------


def add_checkpoint(parser: Parser, otherwise: str = "") -> None:
    """Add `--ckpt-path`. otherwise: help text that names the default if --cfg-path names no checkpoint either."""
    words = f"weights: a folder, file or hub name, in any known format (default: model.ckpt of --cfg-path{otherwise})"
    parser.add_argument("--ckpt-path", type=path, metavar="DIR", help=words)


def add_config(parser: Parser, default: str = "inferred from the checkpoint") -> None:
    """Add `--cfg-path`. default: help text that describes the configuration without this option."""
    parser.add_argument("--cfg-path", type=path, metavar="YAML", help=f"the model's configuration (default: {default})")


def add_beams(parser: Container, default: str) -> None:
    """Add `--num-beams`. default: its default, in words."""
    words = f"number of beams in beam search, at most {MAX_BEAMS} (a limit chosen here); 1: greedy decoding{default}"
    parser.add_argument("--num-beams", type=whole(1, MAX_BEAMS), metavar="N", help=words)


def add_context(parser: Container, default: str = PUBLISHED) -> None:
    """Add `--context`. default: help text that names the rule without this option."""
    parser.add_argument(
        "--context",
        choices=CONTEXTS,
        help="rule for long prompts. published: the prompt (visual tokens included) and --max-new-tokens add up to at "
        "most 2,000 tokens; a longer prompt loses its first tokens. "
        f"all: keep all tokens, even if they exceed the model's trained positions (default: {default})",
    )


def add_engine(parser: Container) -> None:
    """Add `--engine` to a command that answers questions."""
    words = (
        "URL of a vLLM server (or another that accepts prompt embeddings) that runs the checkpoint's language model. "
        "This process encodes the videos; the server generates the answers, without beam search (default: no server)"
    )
    parser.add_argument("--engine", metavar="URL", help=words)


def add_quantization(parser: Container) -> None:
    """Add `--quantization` to a command that loads a language model."""
    words = (
        "4bit or 8bit quantization of the language model with bitsandbytes, to save memory; the same as --options "
        "model.quantization=4bit (default: as in --cfg-path, else none)"
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, metavar="BITS", help=words)


def add_model(parser: Parser) -> None:
    """Add the options of a command that answers questions: checkpoint, number of frames, context rule and engine."""
    add_checkpoint(parser, ", else the tiny model in the package")
    add_config(parser)
    words = "number of frames sampled from a video (default: the checkpoint's)"
    parser.add_argument("--num-frames", type=whole(1), metavar="N", help=words)
    add_context(parser)
    add_engine(parser)
    add_quantization(parser)


def add_address(parser: Parser, *, port: int) -> None:
    """Add `--host` and `--port` to a command that serves. port: the default."""
    words = "address to listen on (default: 127.0.0.1, reachable only from this machine)"
    parser.add_argument("--host", type=host, default="127.0.0.1", metavar="ADDRESS", help=words)
    words = f"port to listen on; 0: any free port (default: {port})"
    parser.add_argument("--port", type=whole(0, 65535), default=port, metavar="N", help=words)


def add_reading_limits(limits: Container, *, shortest: int, waiting: int) -> None:
    """Add limits for media and the queue to a command that serves.

    shortest: smallest value of --max-seconds. waiting: default of --queue-size.
    """
    numbers: dict[str, Any] = {"default": 1800.0, "metavar": "SECONDS"}
    words = "longest duration of a video (default: 1800)"
    limits.add_argument("--max-seconds", type=number(shortest), help=words, **numbers)
    numbers["default"] = 60.0
    words = "time limit for decoding a video or image (default: 60)"
    limits.add_argument("--max-read-seconds", type=number(1), help=words, **numbers)
    words = f"maximum number of waiting requests; 0: a second request is refused (default: {waiting})"
    limits.add_argument("--queue-size", type=whole(0), default=waiting, metavar="N", help=words)


def add_allow_pipe(parser: Parser) -> None:
    """Add `--allow-pipe` to a command that opens shards."""
    words = "allow shards named pipe:CMD, which run the shell command CMD; use it only if you trust the list of shards"
    parser.add_argument("--allow-pipe", action="store_true", help=words)


def add_workers(
    parser: Container, words: str = "number of processes that decode media (default: one per core, at most 8)"
) -> None:
    """Add `--num-workers`, a number of processes. words: the help text."""
    parser.add_argument("--num-workers", type=whole(0), metavar="N", help=words)


def add_media_seconds(parser: Container, default: str = f"{MEDIA_SECONDS:g}") -> None:
    """Add `--media-seconds`. default: help text that names the limit without this option."""
    words = "time limit for reading one video or image; beyond it, the file counts as unreadable; 0: no limit"
    parser.add_argument("--media-seconds", type=number(0), metavar="SECONDS", help=f"{words} (default: {default})")
