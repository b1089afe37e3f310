"""`stllm evaluate`: asks a checkpoint a benchmark's questions and scores the answers.

settings -> benchmark (items) -> runs (lines, one an item) -> results (official files, scores, table, chart)
`stllm evaluate suite` goes this way for each benchmark of a YAML's section `suite`, with one loaded model.
"""

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stllm.commands.options import (
    Command,
    Parser,
    add_checkpoint,
    add_config,
    add_context,
    add_engine,
    add_media_seconds,
    add_quantization,
    add_workers,
    names,
    path,
    whole,
)
from stllm.common.registry import benchmarks
from stllm.common.schema import benchmark_names

SUITE = "suite"


def add_options(parser: Parser) -> None:
    known = benchmark_names()
    words = f"{', '.join(known)}; or {SUITE}: those of section suite of --cfg-path, with one loaded model"
    parser.add_argument("benchmark", choices=[*known, SUITE], metavar="BENCH", help=words)
    add_checkpoint(parser)
    add_config(parser)
    files = parser.add_argument_group("files (default: section evaluation of --cfg-path)")
    files.add_argument(
        "--anno-path",
        "--gt-file",
        type=path,
        metavar="PATH",
        help="the ground truth: a file, or the benchmark's folder",
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
    probes = parser.add_argument_group("diagnostics of multiple choice, written to separate files")
    probes.add_argument(
        "--probe", action="store_true", help="clips reversed, shuffled, of one frame and blank: does it use time?"
    )
    probes.add_argument("--permute", action="store_true", help="options in every rotation: does it favour a letter?")
    speed = parser.add_argument_group("speed (no answer depends on it)")
    speed.add_argument("--batch-size", type=whole(1), metavar="N", help="questions answered at once (default: 8)")
    add_workers(speed)
    add_engine(parser)
    add_quantization(parser)
    add_media_seconds(speed)


def check(args: argparse.Namespace) -> str | None:
    if args.benchmark == SUITE:
        if args.cfg_path is None:
            return "suite needs --cfg-path FILE, whose section suite names the benchmarks"
        own = [
            name for name in ("anno_path", "answers_path", "video_dir", "output_name", "tasks") if getattr(args, name)
        ]
        return (
            f"--{own[0].replace('_', '-')} is of one benchmark: write it into section suite of the YAML"
            if own
            else None
        )
    if (args.probe or args.permute) and benchmarks.get(args.benchmark).judged:
        return f"--probe and --permute go with multiple choice: the answers of {args.benchmark} need a judge"
    if args.permute and not benchmarks.get(args.benchmark).rotates:
        return f"--permute rotates lists of options (such as mvbench's): the questions of {args.benchmark} hold theirs"
    return None


def run(args: argparse.Namespace) -> int:
    """Ask, write every file and print a summary; then the same for each probe, and each benchmark of a suite.

    All ground truths are read before the model is. Exit code 1 when not one item of a benchmark could be answered, 130
    when Ctrl-C ended it. Raises UserError.
    """
    from stllm.common.config import load_evaluation, suite_of
    from stllm.common.distributed import is_main, process_group
    from stllm.common.errors import UserError, out_of_memory
    from stllm.common.jsonl import naming_full_disk
    from stllm.common.schema import EvaluationSettings
    from stllm.conversation.chat import FOLDER, default_num_frames
    from stllm.evaluation import results
    from stllm.evaluation.benchmarks.base import Loaded, load_benchmark
    from stllm.evaluation.probes import permutation, temporal
    from stllm.evaluation.runs import Runs
    from stllm.models.checkpoints.infer_config import open_model
    from stllm.models.settings import explicit_settings

    checkpoint = args.ckpt_path or explicit_settings(args.cfg_path, args.options).get("ckpt")
    if checkpoint is None:
        raise UserError(
            "no checkpoint was named: give one with --ckpt-path DIR, or as model.ckpt of --cfg-path; the tiny model "
            f"that comes with the package, for the toy world alone, is {FOLDER}"
        )
    opened = open_model(checkpoint, args.cfg_path, options=args.options)
    keys = [field.name for field in fields(EvaluationSettings)]
    given = {key: value for key in keys if (value := getattr(args, key, None)) is not None}
    own = {} if opened.config.num_frames is None else {"num_frames": opened.config.num_frames}
    asked: dict[str, tuple[EvaluationSettings, Loaded]] = {}  # by the name of the files
    for benchmark in suite_of(args.cfg_path, args.options) if args.benchmark == SUITE else [args.benchmark]:
        settings = load_evaluation(benchmark, args.cfg_path, args.options, given, own)
        if settings.num_frames is None:  # an empty value in a YAML takes back the preset's
            settings = replace(settings, num_frames=default_num_frames(opened.config))
        name = benchmark if settings.output_name is None else settings.output_name
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"output_name is {name!r}: expected a name without a folder, which output_dir says")
        if name in asked:
            raise UserError(f"output_name is {name!r} for two benchmarks of the suite: leave it out")
        asked[name] = settings, load_benchmark(benchmark, settings)
    contents: dict[str, dict[str, Any]] = {}
    code = 0
    try:
        with process_group():
            first: Runs | None = None
            all_runs = []
            for settings, _ in asked.values():
                all_runs.append(Runs(opened, settings, device=args.device, dtype=args.dtype, shared=first))
                first = all_runs[0]
            for runs, (name, (_, loaded)) in zip(all_runs, asked.items(), strict=True):
                started = time.perf_counter()
                outcome = runs.run(loaded, name)
                if outcome is not None:
                    with naming_full_disk(runs.folder):
                        contents[name] = content = results.write(runs.folder, name, loaded, outcome)
                    seconds = time.perf_counter() - started
                    print(results.summary(runs.folder / name, loaded, outcome, content, seconds))
                    if not content["counts"]["answered"]:
                        why = next((record["error"] for record in outcome.records), "there is no item")
                        print(f"error: not one item could be answered; the first one: {why}", file=sys.stderr)
                        code = 1
                for option, probe in (("probe", temporal), ("permute", permutation)):
                    fits = not loaded.benchmark.judged and (option == "probe" or loaded.benchmark.rotates)
                    if getattr(args, option) and fits:
                        kept = [item for item in loaded.items if not loaded.benchmark.needs_judge(item)]
                        (plain, _), *others = probe.variants(replace(loaded, items=kept)).items()
                        outcomes = {plain: outcome}
                        for variant, changed in others:
                            outcomes[variant] = runs.run(changed, f"{name}.{variant}", variant=variant)
                        if is_main():
                            with naming_full_disk(runs.folder):
                                print(results.write_probe(runs.folder / f"{name}.{option}", loaded, outcomes, probe))
            if args.benchmark == SUITE and is_main() and first is not None:
                with naming_full_disk(first.folder):
                    print(results.write_suite(first.folder / Path(args.cfg_path).stem, contents), end="")
            return code
    except KeyboardInterrupt:
        if is_main():
            print("interrupted: what was answered is kept, and the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if not out_of_memory(error) or isinstance(error, UserError):
            raise
        raise UserError(
            f"not enough memory for {settings.batch_size} questions at once: lower --batch-size, --num-beams or "
            "--num-frames, or take --dtype bfloat16; what was answered is kept, and the same command goes on"
        ) from error


COMMAND = Command(
    help="asks a benchmark's questions, alone or under torchrun; the same command goes on where it stopped",
    example="stllm evaluate mvbench --ckpt-path DIR --anno-path MVBench --output-dir output/eval",
    add_options=add_options,
    run=run,
    needs="stllm.evaluation.runs",
    check=check,
)
