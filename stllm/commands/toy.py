"""Command line of `stllm toy`."""

import argparse

from stllm.commands.options import Command, Parser, add_workers, path, whole


def add_options(parser: Parser) -> None:
    words = "output folder, which is new or empty"
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help=words)
    words = "replace an earlier toy world in the output folder"
    parser.add_argument("--overwrite", action="store_true", help=words)
    words = "total number of training clips (default: 1200)"
    parser.add_argument("--num-train", type=whole(1), default=1200, metavar="N", help=words)
    words = "total number of test clips (default: 240)"
    parser.add_argument("--num-test", type=whole(1), default=240, metavar="N", help=words)
    words = "frames per clip, 8 to 64 (default: 16)"
    parser.add_argument("--num-frames", type=whole(8, 64), default=16, metavar="N", help=words)
    words = "height and width of a clip in pixels, an even number from 64 to 112 (default: 64)"
    parser.add_argument("--size", type=whole(64, 112), default=64, metavar="N", help=words)
    add_workers(parser, "number of processes that draw; 0: only the main process (default: one per core, at most 16)")
    words = "add a task with rare events in clips of 64 frames"
    parser.add_argument("--long", action="store_true", help=words)
    parser.add_argument(
        "--benchmarks",
        type=whole(1),
        nargs="?",
        const=4,
        default=0,
        metavar="N",
        help="also write small imitations of all benchmarks' files with N items per task (N defaults to 4)",
    )


def check(args: argparse.Namespace) -> str | None:
    if args.options or args.device not in ("auto", "cpu") or args.dtype != "auto":
        return "it renders on the CPU and has no configuration: drop --options, --device and --dtype"
    if args.size % 2:
        return f"found --size {args.size}, expected an even number: videos have half as many pixels of colour a side"
    return None


def run(args: argparse.Namespace) -> int:
    """Run the command (in stllm.toy.world), and return its exit code."""
    from stllm.toy.world import run

    return run(args)


COMMAND = Command(
    help="generates the toy world: mp4 clips of moving shapes, with training data and an MVBench-like test",
    example="stllm toy --output toy_world --num-train 2000 --num-test 400 --seed 1",
    add_options=add_options,
    run=run,
    needs="stllm.toy.world",
    check=check,
)
