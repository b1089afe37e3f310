"""`stllm evaluate`: asks a model a benchmark's questions, and scores the answers.

settings -> benchmark (items) -> runs (one record per item) -> results (official files, scores, report, chart)
`stllm evaluate suite` does this for each benchmark in a YAML's section `suite`, and loads the model only once.
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
    add_beams,
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
    words = f"{', '.join(known)}; or {SUITE} for all benchmarks in section suite of --cfg-path"
    parser.add_argument("benchmark", choices=[*known, SUITE], metavar="BENCH", help=words)
    add_checkpoint(parser)
    add_config(parser)
    files = parser.add_argument_group("files (default: as in section evaluation of --cfg-path)")
    files.add_argument(
        "--anno-path",
        "--gt-file",
        type=path,
        metavar="PATH",
        help="ground truth: a file, or the benchmark's folder",
    )
    files.add_argument(
        "--answers-path", type=path, metavar="FILE", help="file of the answers, if the ground truth has only questions"
    )
    files.add_argument("--video-dir", type=path, metavar="DIR", help="folder of the videos")
    files.add_argument("--output-dir", type=path, metavar="DIR", help="output folder (default: output/eval)")
    files.add_argument("--output-name", type=path, metavar="NAME", help="name of the output files (default: BENCH)")
    asked = parser.add_argument_group("questions, frames and decoding (default: as published for the benchmark)")
    asked.add_argument("--tasks", type=names, metavar="A,B", help="ask only these tasks of the benchmark")
    asked.add_argument("--limit", type=whole(1), metavar="N", help="ask only the first N items of each task")
    frames = "frames per video; 0: one per second, but at least 4 and at most 16, as published for mvbench"
    asked.add_argument("--num-frames", type=whole(0), metavar="N", help=frames)
    add_beams(asked, "")
    asked.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="maximum length of an answer in tokens")
    add_context(asked, "published; all for benchmarks of multiple choice")
    probes = parser.add_argument_group("diagnostics of multiple-choice benchmarks, written to separate files")
    probes.add_argument(
        "--probe",
        action="store_true",
        help="also ask with reversed, shuffled, single and blank frames, to test whether the model uses their order",
    )
    probes.add_argument(
        "--permute",
        action="store_true",
        help="ask with each rotation of the options, to test whether the model favours a letter",
    )
    speed = parser.add_argument_group("speed (does not change answers)")
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
            f"--{own[0].replace('_', '-')} applies to a single benchmark: write it into section suite of the YAML"
            if own
            else None
        )
    if (args.probe or args.permute) and benchmarks.get(args.benchmark).judged:
        return f"--probe and --permute go with multiple choice: the answers of {args.benchmark} need a judge"
    if args.permute and not benchmarks.get(args.benchmark).rotates:
        return (
            f"--permute rotates lists of options (such as mvbench's): the questions of {args.benchmark} contain theirs"
        )
    return None


def run(args: argparse.Namespace) -> int:
    """Run the benchmark or suite with its probes, write the result files, and print summaries.

    All ground truths are read before the model is loaded. The exit code is 1 if no item of a benchmark could be
    answered, and 130 after Ctrl-C. Raises UserError.
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
            f"in the package, which knows only the toy world, is {FOLDER}"
        )
    opened = open_model(checkpoint, args.cfg_path, options=args.options)
    keys = [field.name for field in fields(EvaluationSettings)]
    given = {key: value for key in keys if (value := getattr(args, key, None)) is not None}
    own = {} if opened.config.num_frames is None else {"num_frames": opened.config.num_frames}
    asked: dict[str, tuple[EvaluationSettings, Loaded]] = {}  # by the name of the output files
    for benchmark in suite_of(args.cfg_path, args.options) if args.benchmark == SUITE else [args.benchmark]:
        settings = load_evaluation(benchmark, args.cfg_path, args.options, given, own)
        if settings.num_frames is None:  # an empty value in the YAML removes the benchmark's number
            settings = replace(settings, num_frames=default_num_frames(opened.config))
        name = benchmark if settings.output_name is None else settings.output_name
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"output_name is {name!r}: expected a name without a folder; set the folder in output_dir")
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
            print("interrupted: answers so far are kept, and the same command resumes", file=sys.stderr)
        return 130
    except Exception as error:
        if not out_of_memory(error) or isinstance(error, UserError):
            raise
        raise UserError(
            f"not enough memory for {settings.batch_size} questions at once: lower --batch-size, --num-beams or "
            "--num-frames, or take --dtype bfloat16; answers so far are kept, and the same command resumes"
        ) from error


COMMAND = Command(
    help="evaluates a model on a benchmark, in one or several processes (torchrun); "
    "the same command resumes an interrupted run",
    example="stllm evaluate mvbench --ckpt-path DIR --anno-path MVBench --output-dir output/eval",
    add_options=add_options,
    run=run,
    needs="stllm.evaluation.runs",
    check=check,
)
