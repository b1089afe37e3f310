"""`stllm <command>`: parse the command line, run the command, and print a failure as one sentence.

Heavy modules are imported only when a command runs, so that `--help` is fast. Exit codes: 0 success, 1 failure, 2 wrong
usage, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from stllm import __version__
from stllm.commands.options import Command, Parser, device_name, gpu_number, whole
from stllm.common.device import DTYPE_ALIASES, DTYPES, resolve_device, seed_everything
from stllm.common.errors import did_you_mean, sentence
from stllm.common.logging import escape_traceback, escaped_output, setup_logging, working

COMMANDS = (  # modules of stllm.commands, in the order of --help
    *("chat", "demo", "serve", "train", "extract", "convert", "inspect", "verify", "doctor", "toy"),
    *("evaluate", "table", "judge"),
)


def command_of(name: str) -> Command:
    """Import the module of a command, and return the command."""
    command: Command = import_module(f"stllm.commands.{name}").COMMAND
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: sys.argv), and return its exit code. Exceptions are raised only with `--debug`."""
    with escaped_output():
        words = _hyphenated(sys.argv[1:] if argv is None else argv)
        parser = build_parser(words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS)
        try:
            args, unknown = parser.parse_known_args(words)
            command = command_of(args.command)
            fault = _unknown(unknown, args, command.example) or _quantized(args) or command.check(args)
            if fault:
                parser.exit(2, f"stllm {args.command}: error: {fault}\n")
        except SystemExit as stop:  # argparse has printed its help or an error
            return int(stop.code or 0)
        try:
            return _run(command, args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of the output has ended, such as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if args.debug:
                escape_traceback()
                raise
            print(f"error: {sentence(error)}", file=sys.stderr)
            return 1


def _run(command: Command, args: argparse.Namespace) -> int:
    from stllm.common.distributed import end_with_launcher

    end_with_launcher()
    if "WORLD_SIZE" in os.environ and "local_rank" in args:  # without a launcher, LOCAL_RANK must not be set
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    setup_logging(debug=args.debug)
    with working("starting"):  # importing torch and transformers takes seconds
        import_module(command.needs)
        seed_everything(args.seed or 0)
        if args.device not in ("auto", "cpu"):
            resolve_device(args.device)  # raises for an absent device, also in commands that would not use it
    code = command.run(args)
    sys.stdout.flush()  # raises BrokenPipeError here, not at the interpreter's exit
    return code


def _unknown(words: Sequence[str], args: argparse.Namespace, example: str) -> str | None:
    """Return an error about arguments that the command does not accept, or None if there are none."""
    if not words:
        return None
    known = [f"--{name.replace('_', '-')}" for name in vars(args)]
    name = words[0].partition("=")[0]
    if name in known:  # the name of a positional argument
        return f"found {name}, which stllm {args.command} takes without a name, as in: {example}"
    hint = did_you_mean(name, known)
    return f"found {' '.join(words)}, which stllm {args.command} --help does not list{hint}"


def _quantized(args: argparse.Namespace) -> str | None:
    """Translate --quantization into an entry of --options. Return an error if it contradicts --engine, else None."""
    if (bits := getattr(args, "quantization", None)) is None:
        return None
    if getattr(args, "engine", None) is not None:
        return "--quantization does not apply to a language model behind --engine: leave out one of the two"
    args.options = [*args.options, f"model.quantization={bits}"]
    return None


def _hyphenated(argv: Sequence[str]) -> list[str]:
    """Replace underscores in option names by hyphens, because published command lines have e.g. --ckpt_path."""
    result: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return [*result, *argv[position:]]
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return result


def build_parser(names: Sequence[str] = COMMANDS) -> Parser:
    """Return the command-line parser. names: the commands to include; only their modules are imported."""
    about = "ST-LLM: a video LLM that answers questions about videos."
    parser = Parser(prog="stllm", description=about, allow_abbrev=False)
    _add_local_rank(parser)
    parser.add_argument("--version", action="version", version=f"stllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        command = command_of(name)
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
    device, words = group.add_mutually_exclusive_group(), "auto, cpu, cuda, cuda:N or mps (default: auto)"
    device.add_argument("--device", type=device_name, default="auto", help=words)
    words, absent = "the same as --device cuda:N", argparse.SUPPRESS
    device.add_argument("--gpu-id", dest="device", type=gpu_number, metavar="N", default=absent, help=words)
    types, words = (*DTYPES, *DTYPE_ALIASES), f"floating-point type of the model: {', '.join(DTYPES)} (default: auto)"
    group.add_argument("--dtype", choices=types, default="auto", metavar="TYPE", help=words)
    words = "seed of all random numbers (default: 0; for training run.seed)"
    group.add_argument("--seed", type=whole(0), metavar="N", help=words)
    group.add_argument(
        "--options",
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override those of --cfg-path, e.g. model.video_input=mean",
    )
    group.add_argument("--debug", action="store_true", help="show tracebacks of errors, and all log messages")
    _add_local_rank(parser)


def _add_local_rank(parser: Parser) -> None:
    """Add the hidden option `--local-rank`, which torch.distributed.launch and deepspeed pass."""
    parser.add_argument("--local-rank", type=int, metavar="N", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
