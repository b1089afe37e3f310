"""Command line of `stllm doctor`."""

import argparse

from stllm.commands.options import Command, Parser, add_allow_pipe, add_media_seconds, add_workers, path
from stllm.common.schema import MEDIA_SECONDS, benchmark_names

DOCTOR_FORMATS = ("vc2", *benchmark_names(), "videoqa", "shards")


def add_options(parser: Parser) -> None:
    parser.add_argument("--cfg-path", type=path, metavar="YAML", help="check all data sets of this configuration")
    parser.add_argument(
        "--anno-path",
        "--gt-file",
        type=path,
        metavar="FILE",
        help="check this annotation file; for a benchmark in several files the folder, for shards a path or URL of tar "
        "files with globs or {braces}",
    )
    parser.add_argument(
        "--format",
        choices=DOCTOR_FORMATS,
        help="format of --anno-path. vc2: training data in VideoChat2-IT's format, captions, or JSONL. videoqa: any of "
        "the VideoQA benchmarks. shards: tars of images or clips with their texts",
    )
    parser.add_argument(
        "--overlap",
        type=path,
        metavar="YAML",
        help="list test clips of --benchmark that are also in the training data of this configuration. Clips are "
        "compared by name, content and perceptual hashes of frames (these need pip install 'stllm[overlap]')",
    )
    parser.add_argument(
        "--benchmark",
        choices=benchmark_names(),
        metavar="BENCH",
        help="the benchmark for --overlap; --anno-path is its ground truth",
    )
    words = "folder of the media (default: folder of --anno-path)"
    parser.add_argument("--video-dir", type=path, metavar="DIR", help=words)
    parser.add_argument(
        "--answers-path", type=path, metavar="FILE", help="VideoQA: file of the answers, if --anno-path has none"
    )
    parser.add_argument(
        "--flatten",
        nargs=2,
        type=path,
        metavar=("IN", "OUT"),
        help="check nothing; convert the training file IN to a new file OUT with one record per question",
    )
    parser.add_argument(
        "--decode",
        choices=("none", "first", "all"),
        default="first",
        help="how much of each medium is read. none: only its size. first: the first frame and the length. all: every "
        "frame (default: first)",
    )
    add_workers(parser, "number of processes; 0: only the main process (default: one per core, at most 8)")
    add_media_seconds(parser, f"{MEDIA_SECONDS:g}; with --decode all: {12 * MEDIA_SECONDS:g}")
    add_allow_pipe(parser)
    parser.add_argument("--all", action="store_true", help="list all faults, not only the first 20 of each kind")
    parser.add_argument("--json", action="store_true", help="print a JSON report with all faults")


def check(args: argparse.Namespace) -> str | None:
    if args.overlap is not None or args.benchmark is not None:
        if args.overlap is None or args.benchmark is None or args.anno_path is None:
            return "a search for overlap needs --overlap TRAIN_YAML, --benchmark BENCH and its --anno-path"
        named = [name for name in ("cfg_path", "format", "flatten") if getattr(args, name) is not None]
        return f"--{named[0].replace('_', '-')} does not go with --overlap" if named else None
    if sum(given is not None for given in (args.cfg_path, args.anno_path, args.flatten)) != 1:
        return "name either a --cfg-path, or an --anno-path with its --format, or --flatten IN OUT"
    if args.flatten is not None:
        named = [name for name in ("format", "video_dir", "answers_path", "json", "options") if getattr(args, name)]
        return f"--{named[0].replace('_', '-')} does not go with --flatten, which checks nothing" if named else None
    if args.cfg_path is not None:
        given = [name for name in ("format", "video_dir", "answers_path") if getattr(args, name) is not None]
        return (
            f"--{given[0].replace('_', '-')} goes with --anno-path: a --cfg-path contains this setting"
            if given
            else None
        )
    if args.format is None:
        return f"--anno-path needs a --format: {', '.join(DOCTOR_FORMATS)}"
    if args.options:
        return "--options are settings over a --cfg-path: there is none"
    if args.answers_path is not None and args.format in ("vc2", "mvbench", "vcgbench", "shards"):
        return f"--answers-path goes with VideoQA, not with --format {args.format}"
    return None


def run(args: argparse.Namespace) -> int:
    """Run the command (in stllm.doctor.doctor or overlap), and return its exit code."""
    from stllm.doctor import doctor, overlap

    return doctor.run(args) if args.overlap is None else overlap.run(args)


COMMAND = Command(
    help="checks data sets and benchmarks for missing or unreadable files, empty answers, wrong times and more",
    example="stllm doctor --anno-path train.json --video-dir videos --format vc2",
    add_options=add_options,
    run=run,
    needs="stllm.doctor.doctor",
    check=check,
)
