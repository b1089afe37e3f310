"""`stllm evaluate` and `stllm table` on the command line."""

import argparse

from stllm.commands.command import Command, Parser, add_checkpoint, add_config, add_context, add_media_seconds
from stllm.common.arguments import names, path, whole
from stllm.common.evaluation_section import benchmark_names
from stllm.common.registry import benchmarks


def _evaluate_options(parser: Parser) -> None:
    known = benchmark_names()
    parser.add_argument("benchmark", choices=known, metavar="BENCH", help=", ".join(known))
    add_checkpoint(parser)
    add_config(parser, "what the checkpoint says")
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
    speed.add_argument(
        "--num-workers", type=whole(0), metavar="N", help="processes that decode (default: one a core, up to 8)"
    )
    add_media_seconds(speed)


def _evaluate_fault(args: argparse.Namespace) -> str | None:
    if (args.probe or args.permute) and benchmarks.get(args.benchmark).judged:
        return f"--probe and --permute go with mvbench: the answers of {args.benchmark} need a judge"
    return None


def _table_options(parser: Parser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        metavar="[BENCH=]RESULTS.json",
        help="results of stllm evaluate mvbench and of stllm judge; BENCH (msvd, msrvtt, activitynet) for the axis qa",
    )


COMMANDS = {
    "evaluate": Command(
        help="asks a benchmark's questions, alone or under torchrun; the same command goes on where it stopped",
        target="stllm.evaluation.evaluate:run",
        add_options=_evaluate_options,
        example="stllm evaluate mvbench --ckpt-path DIR --anno-path MVBench --output-dir output/eval",
        check=_evaluate_fault,
    ),
    "table": Command(
        help="prints results of several benchmarks as a row of the paper's table, below the published ones",
        target="stllm.evaluation.reports.paper_table:run",
        add_options=_table_options,
        example="stllm table eval/mvbench.results.json eval/vcgbench.judged/*.results.json "
        "msvd=eval/msvd.judged/qa.results.json",
    ),
}
