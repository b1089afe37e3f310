"""`stllm evaluate`: a benchmark's questions to a checkpoint, and what its answers come to.

settings -> benchmark (items) -> runs (lines, one an item) -> official files, figures, table, chart
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stllm.common.config import load_evaluation
from stllm.common.distributed import is_main, process_group
from stllm.common.errors import UserError, out_of_memory
from stllm.common.files import write_text
from stllm.common.jsonl import naming_full_disk
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.chat import default_num_frames
from stllm.conversation.embedded import FOLDER
from stllm.evaluation import results
from stllm.evaluation.items import Benchmark
from stllm.evaluation.probes import Probe, probe_options, probe_views
from stllm.evaluation.runs import Outcome, Runs
from stllm.models.checkpoints.infer_config import open_model
from stllm.models.settings import explicit_settings

# options of the command that are settings of the section
OPTIONS = (
    *("anno_path", "answers_path", "video_dir", "output_dir", "output_name", "tasks", "limit", "num_frames"),
    *("num_beams", "max_new_tokens", "context", "batch_size", "num_workers", "media_seconds"),
)
SHOWN_FAILURES = 3
PROBES = {"probe": probe_views, "permute": probe_options}


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 0 when there are answers, 130 when Ctrl-C ended it. Raises UserError."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    checkpoint = args.ckpt_path or explicit_settings(args.cfg_path, args.options).get("ckpt")
    if checkpoint is None:
        raise UserError(
            "no checkpoint was named: give one with --ckpt-path DIR, or as model.ckpt of --cfg-path; the tiny model "
            f"that comes with the package, for the toy world alone, is {FOLDER}"
        )
    opened = open_model(checkpoint, args.cfg_path, options=args.options)
    own = {} if opened.config.num_frames is None else {"num_frames": opened.config.num_frames}
    settings = load_evaluation(args.benchmark, args.cfg_path, args.options, given, own)
    if settings.num_frames is None:  # an empty value in a YAML takes back the preset's
        settings = replace(settings, num_frames=default_num_frames(opened.config))
    _check_name(settings)
    benchmark = benchmarks.get(args.benchmark)(settings)
    try:
        with process_group():
            runs = Runs(opened, settings, device=args.device, dtype=args.dtype)
            return evaluate(runs, benchmark, [probe for name, probe in PROBES.items() if getattr(args, name)])
    except KeyboardInterrupt:
        if is_main():
            print("interrupted: what was answered is kept, and the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if not out_of_memory(error) or isinstance(error, UserError):
            raise
        raise UserError(_too_large(settings)) from error


def evaluate(runs: Runs, benchmark: Benchmark, probes: Sequence[Probe] = ()) -> int:
    """Asks, writes every file, says on stdout what came out; then the same for each probe.

    A collective call; returns the exit code.
    """
    name = runs.settings.output_name or benchmark.name
    started = time.perf_counter()
    outcome = runs.run(benchmark, name)
    code = 0 if outcome is None else _tell(runs.folder, name, benchmark, outcome, started)
    for probe in probes:
        with naming_full_disk(runs.folder):
            found = probe(runs, name, benchmark, outcome)
        if found is not None:
            print(found)
    return code


def _tell(folder: Path, name: str, benchmark: Benchmark, outcome: Outcome, started: float) -> int:
    """Writes what came out, and says it; returns the exit code. started: as perf_counter has it."""
    with naming_full_disk(folder):
        content = write_outcome(folder, name, benchmark, outcome)
    print(summary(folder / name, benchmark, outcome, content, time.perf_counter() - started))
    if content["counts"]["answered"]:
        return 0
    first = next((record["error"] for record in outcome.records), "there is no item")
    print(f"error: not one item could be answered; the first one: {first}", file=sys.stderr)
    return 1


def write_outcome(folder: Path, name: str, benchmark: Benchmark, outcome: Outcome) -> dict[str, Any]:
    """The official script's files, the results file, the table and the chart; returns what the results file holds."""
    for part, content in benchmark.official(outcome.records).items():
        path = folder / f"{name}.{part}.json" if part else folder / f"{name}.json"
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return results.write(
        folder,
        name,
        benchmark,
        outcome.records,
        settings=outcome.settings,
        digests=outcome.digests,
        seconds=outcome.seconds,
    )


def summary(path: Path, benchmark: Benchmark, outcome: Outcome, content: Mapping[str, Any], seconds: float) -> str:
    """What a person wants to know at the end. path: of the files, without an ending."""
    counts, lines = content["counts"], []
    for rule, scores in content["scores"].items():
        if isinstance(scores, Mapping):
            figures = {"of all items": scores["average"], "of those answered": scores["average_answered"]}
            said = ", ".join(f"{value:.1f} % {of}" for of, value in figures.items() if value is not None)
            lines.append(f"{benchmark.name}, {rule}: {said}")
    lines.append(
        f"{counts['answered']} answered, {counts['failed']} failed, {counts['excluded']} excluded, of "
        f"{counts['total']}; {seconds:.0f} s"
    )
    lines.append(_looked_at(outcome.settings))
    if "cut" in counts:
        lines.append(f"the context rule cut the prompts of {counts['cut']} items, see cut_tokens in {path}.jsonl")
    errors = [record["error"] for record in outcome.records if record.get("error")]
    lines += [f"failed: {error}" for error in errors[:SHOWN_FAILURES]]
    if len(errors) > SHOWN_FAILURES:
        lines.append(f"failed: {len(errors) - SHOWN_FAILURES} more, see {path}.jsonl")
    lines += [f"excluded: {task}: {reason}" for task, reason in benchmark.excluded.items()]
    lines.append(f"files: {path}.*")
    return "\n".join(lines)


def _looked_at(settings: Mapping[str, Any]) -> str:
    """The number of frames, and where it comes from."""
    asked, own = settings["evaluation"]["num_frames"], settings["model"]["num_frames"]
    frames = "one frame a second of each video" if asked == 0 else f"{asked} frames of each video"
    if own is None:
        return frames
    return (
        f"{frames}, the checkpoint's own number" if asked == own else f"{frames} (the checkpoint's own number: {own})"
    )


def _check_name(settings: EvaluationSettings) -> None:
    name = settings.output_name
    if name is not None and (name != Path(name).name or name in ("", ".", "..")):
        raise UserError(f"output_name is {name!r}: expected a name without a folder, which output_dir says")


def _too_large(settings: EvaluationSettings) -> str:
    return (
        f"not enough memory for {settings.batch_size} questions at once: lower --batch-size, --num-beams or "
        "--num-frames, or take --dtype bfloat16; what was answered is kept, and the same command goes on"
    )
