"""Command line of `stllm extract`."""

import argparse

from stllm.commands.options import Command, Parser, add_allow_pipe, add_media_seconds, add_workers, path, whole


def add_options(parser: Parser) -> None:
    words = "configuration of the training run"
    parser.add_argument("--cfg-path", type=path, metavar="YAML", required=True, help=words)
    parser.add_argument(
        "--output",
        required=True,
        type=path,
        metavar="DIR",
        help="output folder with a subfolder per data set; an interrupted run is resumed there",
    )
    parser.add_argument(
        "--stage",
        choices=("vit", "qformer"),
        default="vit",
        help="which features to store. vit: the encoder's output. qformer: the output of the Q-Former, which is "
        "smaller but must not depend on the question (default: vit)",
    )
    words = "clips encoded at once (default: 8)"
    parser.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help=words)
    add_workers(parser)
    add_media_seconds(parser, "run.media_seconds of the configuration")
    add_allow_pipe(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command (in stllm.runners.extract), and return its exit code."""
    from stllm.runners.extract import run

    return run(args)


COMMAND = Command(
    help="stores the frozen encoder's features of all data sets, so that training need not decode and encode media",
    example="torchrun --nproc_per_node=8 -m stllm extract --cfg-path train.yaml --output features",
    add_options=add_options,
    run=run,
    needs="stllm.runners.extract",
)
