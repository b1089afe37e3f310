"""`stllm <command>`: parses, imports the command's own module, and turns its failure into one sentence.

Standard library only up to the moment a command runs, so that `--help` answers at once. Exit codes: 0 success,
1 failure, 2 wrong usage, 130 interrupted.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from stllm import __version__
from stllm.common.device import DEVICE_PATTERN, DTYPE_ALIASES, DTYPES, out_of_memory, seed_everything
from stllm.common.errors import UserError

Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, where its `run(args) -> int` lives, its options, what argparse cannot check."""

    help: str
    target: str  # "module:function", imported when the command runs
    add_options: Callable[[Parser], None]
    example: str
    check: Callable[[argparse.Namespace], str | None] = lambda _: None  # what is wrong with the usage, if anything


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Raises only under `--debug`."""
    parser = build_parser()
    try:
        args = parser.parse_args(_hyphenated(sys.argv[1:] if argv is None else argv))
        fault = COMMANDS[args.command].check(args)
        if fault:
            parser.exit(2, f"stllm {args.command}: error: {fault}\n")
    except SystemExit as stop:  # argparse has printed its help or its complaint
        return int(stop.code or 0)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from stllm.common.logging import setup_logging

    setup_logging(debug=args.debug)
    module, function = COMMANDS[args.command].target.split(":")
    run = getattr(import_module(module), function)
    seed_everything(args.seed)
    code = int(run(args))
    sys.stdout.flush()  # a closed pipe shows here, not at the interpreter's exit
    return code


def _sentence(error: Exception) -> str:
    """What to print for an exception: what was found and what to do, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if out_of_memory(error):
        where = "on the GPU" if any(name in text for name in ("CUDA", "CUBLAS", "HIP", "MPS")) else "on this machine"
        return (
            f"not enough memory {where}: use fewer frames (--num-frames), a smaller type (--dtype bfloat16), "
            "--options model.vit_chunk_size=1, or another --device"
        )
    name = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:  # torch and safetensors say it so
        return f"no space left on the disk{name}: free some, or write to another folder, then run again"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{name}: give this user access, or name another path"
    return f"unexpected {type(error).__name__}: {text}; run again with --debug for the traceback"


def _hyphenated(argv: Sequence[str]) -> list[str]:
    """Option names with hyphens for underscores, as in the published command lines: --ckpt_path is --ckpt-path."""
    result: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return [*result, *argv[position:]]
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return result


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="stllm", description="ST-LLM: questions about videos, answered.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"stllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(sub)
        _add_common(sub)
    return parser


def _add_common(parser: Parser) -> None:
    group = parser.add_argument_group("common options")
    device = group.add_mutually_exclusive_group()
    device.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    device.add_argument(
        "--gpu-id", dest="device", type=_gpu, metavar="N", default=argparse.SUPPRESS, help="the same as --device cuda:N"
    )
    group.add_argument(
        "--dtype", choices=(*DTYPES, *DTYPE_ALIASES), default="auto", metavar="TYPE", help=f"{', '.join(DTYPES)}"
    )
    group.add_argument("--seed", type=_whole(0), default=0, help="seed of everything random (default: 0)")
    group.add_argument(
        "--options",
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings over those of the YAML, e.g. model.video_input=mean",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_config(parser: Parser, default: str) -> None:
    parser.add_argument("--cfg-path", metavar="YAML", help=f"the model's configuration (default: {default})")


def _chat_options(parser: Parser) -> None:
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--video", metavar="PATH", help="a video, a gif, or a folder of frames")
    media.add_argument("--image", metavar="PATH", help="an image")
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="repeat it for several questions in one conversation; without it: an interactive prompt",
    )
    parser.add_argument("--ckpt-path", metavar="DIR", help="weights: a folder or file of any known layout")
    _add_config(parser, "what the checkpoint says")
    parser.add_argument("--reader", metavar="NAME", help="what decodes the video (default: by its type)")
    parser.add_argument("--start", type=_number(0), metavar="SECONDS", help="use the video from here on")
    parser.add_argument("--end", type=_number(0), metavar="SECONDS", help="use the video up to here")
    parser.add_argument("--num-frames", type=_whole(1), metavar="N", help="frames taken from the video")
    parser.add_argument("--num-beams", type=_whole(1), metavar="N", help="beams of the search; 1: greedy")
    parser.add_argument("--max-new-tokens", type=_whole(1), metavar="N", help="the longest answer")
    parser.add_argument("--temperature", type=_number(0), metavar="T", help="sample at this temperature; 0: do not")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the answer as it is made")
    output.add_argument("--json", action="store_true", help="print one JSON line an answer")


def _chat_fault(args: argparse.Namespace) -> str | None:
    if args.question and args.video is None and args.image is None:
        return "a --question needs a --video or an --image to look at"
    if args.start is not None and args.end is not None and args.start >= args.end:
        return f"--start {args.start} must be before --end {args.end}"
    return None


def _convert_options(parser: Parser) -> None:
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="weights in any known layout; later ones go on top")
    parser.add_argument("--to", required=True, metavar="DIR", help="the folder to write")
    _add_config(parser, "what the sources say")
    parser.add_argument(
        "--format", choices=("stllm", "released"), default="stllm", help="the layout to write (default: stllm)"
    )


def _inspect_options(parser: Parser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="a checkpoint: a file or folder of any known layout")
    _add_config(parser, "what the checkpoint says")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _inspect_fault(args: argparse.Namespace) -> str | None:
    named = args.path or args.cfg_path or args.options
    return None if named else "name a PATH, a --cfg-path, or --options model.model_type=..."


def _verify_options(parser: Parser) -> None:
    parser.add_argument("dir", nargs="+", metavar="DIR", help="a folder with weights and expected.safetensors")
    parser.add_argument(
        "--atol", type=_number(0), default=1e-4, help="largest absolute difference of a tensor (default: 1e-4)"
    )
    parser.add_argument(
        "--rtol", type=_number(0), default=1e-3, help="largest relative difference of a gradient (default: 1e-3)"
    )


def _whole(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least {low}")
        return int(text)

    return parse


def _number(low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of at least {low}")
        return value

    return parse


def _device(text: str) -> str:
    if not DEVICE_PATTERN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected auto, cpu, cuda, cuda:N or mps")
    return text


def _gpu(text: str) -> str:
    return f"cuda:{_whole(0)(text)}"


COMMANDS = {
    "chat": Command(
        help="answers questions about a video or an image",
        target="stllm.conversation.command:run",
        add_options=_chat_options,
        example='stllm chat --ckpt-path DIR --video clip.mp4 --question "What happens?"',
        check=_chat_fault,
    ),
    "convert": Command(
        help="writes weights of any known layout as ours, or ours in the released layout",
        target="stllm.models.checkpoints.convert:run",
        add_options=_convert_options,
        example="stllm convert released/ --to ours/ --cfg-path model.yaml",
    ),
    "inspect": Command(
        help="tells what a checkpoint is: format, family, sizes, memory, and whether a configuration fits it",
        target="stllm.models.checkpoints.inspect:run",
        add_options=_inspect_options,
        example="stllm inspect DIR --cfg-path model.yaml",
        check=_inspect_fault,
    ),
    "verify": Command(
        help="recomputes a folder of golden tensors and prints the largest difference of each",
        target="stllm.models.checkpoints.verify:run",
        add_options=_verify_options,
        example="stllm verify golden/instructblip_residual_mvm",
    ),
}
