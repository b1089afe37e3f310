"""`stllm convert` on the command line."""

import argparse

from stllm.commands.options import Command, Parser, add_config, path
from stllm.common.logging import console


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "source", nargs="+", type=path, metavar="SOURCE", help="weights in any known layout; later ones go on top"
    )
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="the folder to write: new, or empty")
    add_config(parser, "what the sources say")
    parser.add_argument(
        "--format",
        choices=("stllm", "released", "language-model"),
        default="stllm",
        help="the layout to write; language-model: a plain transformers folder of the language model alone, for "
        "`vllm serve DIR --enable-prompt-embeds` (default: stllm)",
    )
    parser.add_argument(
        "--adapter", type=path, metavar="DIR", help="a LoRA adapter to put on top: a run's lora_adapter"
    )
    parser.add_argument("--merge-lora", action="store_true", help="add LoRA to the weights that it adapts")


def run(args: argparse.Namespace) -> int:
    """Convert, print the audit, name the result. A conversion that is done is not repeated."""
    from stllm.models.checkpoints.convert import convert

    report = convert(
        args.source,
        args.to,
        cfg_path=args.cfg_path,
        options=args.options,
        format=args.format,
        dtype=args.dtype,
        adapter=args.adapter,
        merge=args.merge_lora,
    )
    if report is None:
        print(f"{args.to} holds the result of this command already ({args.format}); nothing was written")
        return 0
    out = console()
    out.print(report.table())
    for line in report.details():
        out.print(line, soft_wrap=True)
    print(f"written to {args.to} ({args.format})")
    return 0


COMMAND = Command(
    help="writes weights of any known layout as ours, or ours in the released layout",
    example="stllm convert released/ --to ours/ --cfg-path model.yaml",
    add_options=add_options,
    run=run,
    needs="stllm.models.checkpoints.convert",
)
