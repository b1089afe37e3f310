"""`stllm convert`, `stllm inspect` and `stllm verify` on the command line."""

import argparse

from stllm.commands.command import Command, Parser, add_config
from stllm.common.arguments import number, path


def _convert_options(parser: Parser) -> None:
    parser.add_argument(
        "source", nargs="+", type=path, metavar="SOURCE", help="weights in any known layout; later ones go on top"
    )
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="the folder to write: new, or empty")
    add_config(parser, "what the sources say")
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
    add_config(parser, "what the checkpoint says")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _inspect_fault(args: argparse.Namespace) -> str | None:
    named = args.path or args.cfg_path or args.options
    return None if named else "name a PATH, a --cfg-path, or --options model.model_type=..."


def _verify_options(parser: Parser) -> None:
    parser.add_argument(
        "dir", nargs="+", type=path, metavar="DIR", help="a folder with weights and expected.safetensors"
    )
    parser.add_argument(
        "--atol",
        type=number(0),
        default=1e-4,
        metavar="X",
        help="largest absolute difference of a tensor (default: 1e-4)",
    )
    parser.add_argument(
        "--rtol",
        type=number(0),
        default=1e-3,
        metavar="X",
        help="largest relative difference of a gradient (default: 1e-3)",
    )


def _verify_fault(args: argparse.Namespace) -> str | None:
    if args.options or args.device not in ("auto", "cpu") or args.dtype not in ("auto", "float32", "fp32"):
        return (
            "it recomputes in float32 on the CPU, with the folder's own settings: drop --options, --device and --dtype"
        )
    return None


COMMANDS = {
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
}
