"""`stllm <command>`: parses, imports the command's own module, and turns its failure into one sentence.

Standard library only up to the moment a command runs, so that `--help` answers at once. Exit codes: 0 success,
1 failure, 2 wrong usage, 130 interrupted.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from stllm import __version__
from stllm.common.arguments import device_name, gpu_number, number, path, whole
from stllm.common.device import DTYPE_ALIASES, DTYPES, seed_everything
from stllm.common.failures import sentence

Parser = argparse.ArgumentParser
DOCTOR_FORMATS = ("vc2", "mvbench", "vcgbench", "videoqa", "shards")


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
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from stllm.common.logging import setup_logging

    setup_logging(debug=args.debug)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal's encoding lacks is escaped, not fatal
            stream.reconfigure(errors="backslashreplace")
    module, function = COMMANDS[args.command].target.split(":")
    run = getattr(import_module(module), function)
    seed_everything(args.seed or 0)
    code = int(run(args))
    sys.stdout.flush()  # a closed pipe shows here, not at the interpreter's exit
    return code


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
    device.add_argument(
        "--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    device.add_argument(
        "--gpu-id",
        dest="device",
        type=gpu_number,
        metavar="N",
        default=argparse.SUPPRESS,
        help="the same as --device cuda:N",
    )
    group.add_argument(
        "--dtype",
        choices=(*DTYPES, *DTYPE_ALIASES),
        default="auto",
        metavar="TYPE",
        help=f"{', '.join(DTYPES)} (default: auto)",
    )
    group.add_argument("--seed", type=whole(0), help="seed of everything random (default: 0, in training run.seed)")
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
    parser.add_argument("--cfg-path", type=path, metavar="YAML", help=f"the model's configuration (default: {default})")


def _chat_options(parser: Parser) -> None:
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--video", type=path, metavar="PATH", help="a video, a gif, or a folder of frames")
    media.add_argument("--image", type=path, metavar="PATH", help="an image")
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="repeat it for several questions in one conversation; without it: an interactive prompt",
    )
    parser.add_argument(
        "--ckpt-path",
        type=path,
        metavar="DIR",
        help="weights: a folder, file or hub name of any known layout (default: model.ckpt of --cfg-path)",
    )
    _add_config(parser, "what the checkpoint says")
    parser.add_argument(
        "--reader", metavar="NAME", help="what decodes a video file: auto, pyav or decord (default: auto)"
    )
    parser.add_argument("--start", type=number(0), metavar="SECONDS", help="use the video from here on")
    parser.add_argument("--end", type=number(0), metavar="SECONDS", help="use the video up to here")
    parser.add_argument(
        "--num-frames",
        type=whole(1),
        metavar="N",
        help="frames taken from the video (default: 64 if residual, else 16)",
    )
    parser.add_argument("--num-beams", type=whole(1), metavar="N", help="beams of the search; 1: greedy (default: 5)")
    parser.add_argument(
        "--max-new-tokens", type=whole(1), metavar="N", help="tokens of the longest answer (default: 300)"
    )
    parser.add_argument(
        "--temperature", type=number(0), metavar="T", help="sample, at this temperature (default: 0, do not)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the answer as it is made (with 1 beam)")
    output.add_argument("--json", action="store_true", help="print one JSON line an answer")


def _chat_fault(args: argparse.Namespace) -> str | None:
    if args.question and args.video is None and args.image is None:
        return "a --question needs a --video or an --image to look at"
    if args.start is not None and args.end is not None and args.start >= args.end:
        return f"--start {args.start} must be before --end {args.end}"
    return None


def _convert_options(parser: Parser) -> None:
    parser.add_argument(
        "source", nargs="+", type=path, metavar="SOURCE", help="weights in any known layout; later ones go on top"
    )
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="the folder to write: new, or empty")
    _add_config(parser, "what the sources say")
    parser.add_argument(
        "--format", choices=("stllm", "released"), default="stllm", help="the layout to write (default: stllm)"
    )
    parser.add_argument(
        "--adapter", type=path, metavar="DIR", help="a LoRA adapter to put on top: a run's lora_adapter"
    )
    parser.add_argument("--merge-lora", action="store_true", help="add LoRA to the weights that it adapts")


def _inspect_options(parser: Parser) -> None:
    parser.add_argument(
        "path", nargs="?", type=path, metavar="PATH", help="a checkpoint: a file or folder of any known layout"
    )
    _add_config(parser, "what the checkpoint says")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _inspect_fault(args: argparse.Namespace) -> str | None:
    named = args.path or args.cfg_path or args.options
    return None if named else "name a PATH, a --cfg-path, or --options model.model_type=..."


def _verify_options(parser: Parser) -> None:
    parser.add_argument(
        "dir", nargs="+", type=path, metavar="DIR", help="a folder with weights and expected.safetensors"
    )
    parser.add_argument(
        "--atol", type=number(0), default=1e-4, help="largest absolute difference of a tensor (default: 1e-4)"
    )
    parser.add_argument(
        "--rtol", type=number(0), default=1e-3, help="largest relative difference of a gradient (default: 1e-3)"
    )


def _toy_options(parser: Parser) -> None:
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help="the folder to write: new, or empty")
    parser.add_argument(
        "--num-train", type=whole(1), default=1200, metavar="N", help="training clips, of all kinds (default: 1200)"
    )
    parser.add_argument(
        "--num-test", type=whole(1), default=240, metavar="N", help="test clips, of all kinds (default: 240)"
    )
    parser.add_argument("--long", action="store_true", help="clips of 64 frames, not 16")


def _toy_fault(args: argparse.Namespace) -> str | None:
    if args.options or args.device not in ("auto", "cpu") or args.dtype != "auto":
        return "it renders on the CPU and has no configuration: drop --options, --device and --dtype"
    return None


def _verify_fault(args: argparse.Namespace) -> str | None:
    if args.options or args.device not in ("auto", "cpu") or args.dtype not in ("auto", "float32", "fp32"):
        return (
            "it recomputes in float32 on the CPU, with the folder's own settings: drop --options, --device and --dtype"
        )
    return None


def _train_options(parser: Parser) -> None:
    parser.add_argument("--cfg-path", type=path, metavar="YAML", required=True, help="the run's configuration")


def _extract_options(parser: Parser) -> None:
    parser.add_argument("--cfg-path", type=path, metavar="YAML", required=True, help="the training run's configuration")
    parser.add_argument(
        "--output", required=True, type=path, metavar="DIR", help="where to write, a folder a data set; may be begun"
    )
    parser.add_argument(
        "--stage",
        choices=("vit", "qformer"),
        default="vit",
        help="what to keep: the encoder's output, or that of a Q-Former that reads no text, which is smaller "
        "(default: vit)",
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=8, metavar="N", help="clips encoded at once (default: 8)"
    )
    parser.add_argument(
        "--num-workers", type=whole(0), metavar="N", help="processes that decode (default: one a core, up to 8)"
    )


def _doctor_options(parser: Parser) -> None:
    parser.add_argument("--cfg-path", type=path, metavar="YAML", help="check all data sets of this configuration")
    parser.add_argument(
        "--anno-path",
        "--gt-file",
        type=path,
        metavar="FILE",
        help="or check this annotation file (mvbench: the folder; shards: tars, a glob, braces or a URL)",
    )
    parser.add_argument(
        "--format",
        choices=DOCTOR_FORMATS,
        help="what the file is; vc2: VideoChat2-IT, caption pairs or JSONL of your own",
    )
    parser.add_argument("--video-dir", type=path, metavar="DIR", help="the folder of its media (default: beside it)")
    parser.add_argument(
        "--answers-path", type=path, metavar="FILE", help="videoqa: the answers, when they have a file of their own"
    )
    parser.add_argument(
        "--decode",
        choices=("none", "first", "all"),
        default="first",
        help="how far media are read: size alone, first frame and length, or every frame (default: first)",
    )
    parser.add_argument(
        "--num-workers", type=whole(0), metavar="N", help="processes; 0: this one alone (default: one a core, up to 8)"
    )
    parser.add_argument("--all", action="store_true", help="list every fault, not the first 20 of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON report, with every fault")


def _doctor_fault(args: argparse.Namespace) -> str | None:
    if (args.cfg_path is None) == (args.anno_path is None):
        return "name either a --cfg-path, or an --anno-path with its --format"
    if args.cfg_path is not None:
        given = [name for name in ("format", "video_dir", "answers_path") if getattr(args, name) is not None]
        return (
            f"--{given[0].replace('_', '-')} goes with --anno-path: a configuration says it itself" if given else None
        )
    if args.format is None:
        return f"--anno-path needs a --format: {', '.join(DOCTOR_FORMATS)}"
    if args.options:
        return "--options are settings over a --cfg-path: there is none"
    if args.answers_path is not None and args.format != "videoqa":
        return "--answers-path goes with --format videoqa"
    return None


COMMANDS = {
    "chat": Command(
        help="answers questions about a video or an image",
        target="stllm.conversation.command:run",
        add_options=_chat_options,
        example='stllm chat --ckpt-path DIR --video clip.mp4 --question "What happens?"',
        check=_chat_fault,
    ),
    "train": Command(
        help="trains a model from a YAML, alone or under torchrun; the same command continues a run",
        target="stllm.runners.train:run",
        add_options=_train_options,
        example="torchrun --nproc_per_node=8 -m stllm train --cfg-path configs/train/instructblip_qa.yaml",
    ),
    "extract": Command(
        help="computes a frozen encoder's features of all data sets once, for training to read in place of the media",
        target="stllm.runners.extract:run",
        add_options=_extract_options,
        example="torchrun --nproc_per_node=8 -m stllm extract --cfg-path train.yaml --output features",
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
        help="recomputes folders of golden tensors, in float32 on the CPU, and prints the largest difference of each",
        target="stllm.models.checkpoints.verify:run",
        add_options=_verify_options,
        example="stllm verify golden/instructblip_residual_mvm",
        check=_verify_fault,
    ),
    "doctor": Command(
        help="checks data before hours are spent: what is missing, unreadable, empty, wrongly bounded or ambiguous",
        target="stllm.datasets.doctor:run",
        add_options=_doctor_options,
        example="stllm doctor --anno-path train.json --video-dir videos --format vc2",
        check=_doctor_fault,
    ),
    "toy": Command(
        help="writes the toy world: real mp4 files with VideoChat2-IT and MVBench annotations",
        target="stllm.datasets.toy_world:run",
        add_options=_toy_options,
        example="stllm toy --output toy_world --num-train 2000 --num-test 400 --seed 1",
        check=_toy_fault,
    ),
}
