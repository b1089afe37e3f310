"""`stllm evaluate` on the command line."""

import argparse

from stllm.commands.options import (
    Command,
    Parser,
    add_checkpoint,
    add_config,
    add_context,
    add_media_seconds,
    add_workers,
    names,
    path,
    whole,
)
from stllm.common.registry import benchmarks
from stllm.common.schema import benchmark_names


def add_options(parser: Parser) -> None:
    known = benchmark_names()
    parser.add_argument("benchmark", choices=known, metavar="BENCH", help=", ".join(known))
    add_checkpoint(parser)
    add_config(parser)
    files = parser.add_argument_group("files (default: section evaluation of --cfg-path)")
    files.add_argument(
        "--anno-path", "--gt-file", type=path, metavar="PATH", help="the ground truth: a file, or MVBench's folder"
    )
    files.add_argument(
        "--answers-path", type=path, metavar="FILE", help="the answers, when they have a file of their own"
    )
    files.add_argument("--video-dir", type=path, metavar="DIR", help="the folder of the videos")
    files.add_argument("--output-dir", type=path, metavar="DIR", help="where to write (default: output/eval)")
    files.add_argument("--output-name", type=path, metavar="NAME", help="of the files there (default: BENCH)")
    asked = parser.add_argument_group("what is asked, and how (default: as published)")
    asked.add_argument("--tasks", type=names, metavar="A,B", help="these tasks or parts alone")
    asked.add_argument("--limit", type=whole(1), metavar="N", help="the first N items of each task")
    asked.add_argument("--num-frames", type=whole(0), metavar="N", help="frames of a video; 0: MVBench's one a second")
    asked.add_argument("--num-beams", type=whole(1), metavar="N", help="beams of the search; 1: greedy")
    asked.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="tokens of the longest answer")
    add_context(asked, "published; for mvbench: all")
    probes = parser.add_argument_group("diagnostics (mvbench only), written to separate files")
    probes.add_argument(
        "--probe", action="store_true", help="clips reversed, shuffled, of one frame and blank: does it use time?"
    )
    probes.add_argument("--permute", action="store_true", help="options in every rotation: does it favour a letter?")
    speed = parser.add_argument_group("speed (no answer depends on it)")
    speed.add_argument("--batch-size", type=whole(1), metavar="N", help="questions answered at once (default: 8)")
    add_workers(speed)
    add_media_seconds(speed)


def check(args: argparse.Namespace) -> str | None:
    if (args.probe or args.permute) and benchmarks.get(args.benchmark).judged:
        return f"--probe and --permute go with mvbench: the answers of {args.benchmark} need a judge"
    return None


def run(args: argparse.Namespace) -> int:
    """Run the command, which is in stllm.evaluation.evaluate; returns its exit code."""
    from stllm.evaluation.evaluate import run

    return run(args)


COMMAND = Command(
    help="asks a benchmark's questions, alone or under torchrun; the same command goes on where it stopped",
    example="stllm evaluate mvbench --ckpt-path DIR --anno-path MVBench --output-dir output/eval",
    add_options=add_options,
    run=run,
    needs="stllm.evaluation.evaluate",
    check=check,
)
