"""`stllm chat` on the command line."""

import argparse

from stllm.commands.options import (
    EMBEDDED,
    Command,
    Parser,
    add_checkpoint,
    add_config,
    add_context,
    number,
    path,
    whole,
)


def add_options(parser: Parser) -> None:
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
    add_checkpoint(parser, EMBEDDED)
    add_config(parser, "what the checkpoint says")
    parser.add_argument(
        "--reader", metavar="NAME", help="what decodes a video file: auto, pyav or decord (default: auto)"
    )
    parser.add_argument("--start", type=number(0), metavar="SECONDS", help="use the video from here on")
    parser.add_argument("--end", type=number(0), metavar="SECONDS", help="use the video up to here")
    parser.add_argument(
        "--num-frames",
        type=whole(1),
        metavar="N",
        help="frames taken from the video (default: the checkpoint's own)",
    )
    parser.add_argument("--num-beams", type=whole(1), metavar="N", help="beams of the search; 1: greedy (default: 5)")
    parser.add_argument(
        "--max-new-tokens", type=whole(1), metavar="N", help="tokens of the longest answer (default: 300)"
    )
    parser.add_argument(
        "--temperature", type=number(0), metavar="T", help="sample, at this temperature (default: 0, do not)"
    )
    add_context(parser)
    parser.add_argument(
        "--evidence",
        type=path,
        metavar="PNG",
        help="draw how much each part of the video mattered to the answer (a second question's: PNG-2, and so on)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the answer as it is made (with 1 beam)")
    output.add_argument("--json", action="store_true", help="print one JSON line an answer")


def check(args: argparse.Namespace) -> str | None:
    if args.question and args.video is None and args.image is None:
        return "a --question needs a --video or an --image to look at"
    if args.evidence and (args.video is None or not args.question):
        return "--evidence needs a --video and a --question"
    if args.evidence and not args.evidence.lower().endswith(".png"):
        return f"--evidence {args.evidence}: the chart is a PNG file, name it so"
    if args.start is not None and args.end is not None and args.start >= args.end:
        return f"--start {args.start} must be before --end {args.end}"
    return None


def run(args: argparse.Namespace) -> int:
    """Run the command, which is in stllm.conversation.command; returns its exit code."""
    from stllm.conversation.command import run

    return run(args)


COMMAND = Command(
    help="answers questions about a video or an image",
    example='stllm chat --ckpt-path DIR --video clip.mp4 --question "What happens?"',
    add_options=add_options,
    run=run,
    needs="stllm.conversation.command",
    check=check,
)
