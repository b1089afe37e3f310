"""Command line of `stllm convert`."""

import argparse

from stllm.commands.options import Command, Parser, add_config, path
from stllm.common.logging import console


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        type=path,
        metavar="SOURCE",
        help="a file or folder of weights in any known format; later sources override earlier ones",
    )
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="output folder, which is new or empty")
    add_config(parser, "inferred from the sources")
    parser.add_argument(
        "--format",
        choices=("stllm", "released", "language-model"),
        default="stllm",
        help="output format. stllm: this package's. released: that of the published ST-LLM weights. language-model: "
        "only the language model, as a transformers folder for `vllm serve DIR --enable-prompt-embeds` "
        "(default: stllm)",
    )
    parser.add_argument(
        "--adapter", type=path, metavar="DIR", help="folder of a LoRA adapter to add, such as RUN/lora_adapter"
    )
    parser.add_argument("--merge-lora", action="store_true", help="merge LoRA into the weights of its layers")


def run(args: argparse.Namespace) -> int:
    """Convert the weights, and print the audit of the keys. A conversion that was already done is not repeated."""
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
    help="converts weights from any known format to stllm's, or from stllm's to that of the published weights",
    example="stllm convert released/ --to ours/ --cfg-path model.yaml",
    add_options=add_options,
    run=run,
    needs="stllm.models.checkpoints.convert",
)
