"""`stllm extract` on the command line."""

import argparse

from stllm.commands.options import Command, Parser, add_allow_pipe, add_media_seconds, add_workers, path, whole


def add_options(parser: Parser) -> None:
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
    words = "clips encoded at once (default: 8)"
    parser.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help=words)
    add_workers(parser)
    add_media_seconds(parser, "run.media_seconds of the configuration")
    add_allow_pipe(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command, which is in stllm.runners.extract; returns its exit code."""
    from stllm.runners.extract import run

    return run(args)


COMMAND = Command(
    help="computes a frozen encoder's features of all data sets once, for training to read in place of the media",
    example="torchrun --nproc_per_node=8 -m stllm extract --cfg-path train.yaml --output features",
    add_options=add_options,
    run=run,
    needs="stllm.runners.extract",
)
