"""`stllm toy` on the command line."""

import argparse

from stllm.commands.options import Command, Parser, add_workers, path, whole


def add_options(parser: Parser) -> None:
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help="the folder to write: new, or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the toy world in that folder")
    parser.add_argument(
        "--num-train", type=whole(1), default=1200, metavar="N", help="training clips, of all kinds (default: 1200)"
    )
    parser.add_argument(
        "--num-test", type=whole(1), default=240, metavar="N", help="test clips, of all kinds (default: 240)"
    )
    parser.add_argument(
        "--num-frames", type=whole(8, 64), default=16, metavar="N", help="of a clip, 8 to 64 (default: 16)"
    )
    parser.add_argument(
        "--size", type=whole(64, 112), default=64, metavar="N", help="pixels a side, even, 64 to 112 (default: 64)"
    )
    add_workers(parser, "processes that draw; 0: this one (default: one a core, up to 16)")
    parser.add_argument("--long", action="store_true", help="rare events in clips of 64 frames beside the other tasks")
    parser.add_argument(
        "--benchmarks",
        type=whole(1),
        nargs="?",
        const=4,
        default=0,
        metavar="N",
        help="a twin of every benchmark, too, with N items a task (default: none; without N: 4)",
    )


def check(args: argparse.Namespace) -> str | None:
    if args.options or args.device not in ("auto", "cpu") or args.dtype != "auto":
        return "it renders on the CPU and has no configuration: drop --options, --device and --dtype"
    if args.size % 2:
        return f"found --size {args.size}, expected an even number: videos have half as many pixels of colour a side"
    return None


def run(args: argparse.Namespace) -> int:
    """Run the command, which is in stllm.toy.world; returns its exit code."""
    from stllm.toy.world import run

    return run(args)


COMMAND = Command(
    help="writes the toy world: real mp4 files with VideoChat2-IT and MVBench annotations",
    example="stllm toy --output toy_world --num-train 2000 --num-test 400 --seed 1",
    add_options=add_options,
    run=run,
    needs="stllm.toy.world",
    check=check,
)
