"""`stllm evaluate`: asks a checkpoint a benchmark's questions and scores the answers.

settings -> benchmark (items) -> runs (lines, one an item) -> official files, figures, table, chart
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stllm.common.config import load_evaluation
from stllm.common.distributed import is_main, process_group
from stllm.common.errors import UserError, out_of_memory
from stllm.common.jsonl import naming_full_disk
from stllm.common.schema import EvaluationSettings
from stllm.conversation.chat import FOLDER, default_num_frames
from stllm.evaluation import results
from stllm.evaluation.benchmarks.base import Loaded, load_benchmark
from stllm.evaluation.probes.permutation import probe_options
from stllm.evaluation.probes.temporal import probe_views
from stllm.evaluation.results import Outcome
from stllm.evaluation.runs import Runs
from stllm.models.checkpoints.infer_config import open_model
from stllm.models.settings import explicit_settings

SHOWN_FAILURES = 3
Probe = Callable[[Runs, str, Loaded, Outcome | None], str | None]  # see probe_views
PROBES: dict[str, Probe] = {"probe": probe_views, "permute": probe_options}


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 0 when there are answers, 130 when Ctrl-C ended it. Raises UserError."""
    keys = [field.name for field in fields(EvaluationSettings)]
    given = {key: value for key in keys if (value := getattr(args, key, None)) is not None}
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
    name = settings.output_name
    if name is not None and (name != Path(name).name or name in ("", ".", "..")):
        raise UserError(f"output_name is {name!r}: expected a name without a folder, which output_dir says")
    loaded = load_benchmark(args.benchmark, settings)
    try:
        with process_group():
            runs = Runs(opened, settings, device=args.device, dtype=args.dtype)
            return evaluate(runs, loaded, [probe for option, probe in PROBES.items() if getattr(args, option)])
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


def evaluate(runs: Runs, loaded: Loaded, probes: Sequence[Probe] = ()) -> int:
    """Asks, writes every file and prints a summary; then the same for each probe.

    A collective call; returns the exit code: 1 when not one item could be answered.
    """
    name, code = runs.settings.output_name or loaded.name, 0
    started = time.perf_counter()
    outcome = runs.run(loaded, name)
    if outcome is not None:
        with naming_full_disk(runs.folder):
            content = results.write(runs.folder, name, loaded, outcome)
        print(summary(runs.folder / name, loaded, outcome, content, time.perf_counter() - started))
        if not content["counts"]["answered"]:
            first = next((record["error"] for record in outcome.records), "there is no item")
            print(f"error: not one item could be answered; the first one: {first}", file=sys.stderr)
            code = 1
    for probe in probes:
        with naming_full_disk(runs.folder):
            found = probe(runs, name, loaded, outcome)
        if found is not None:
            print(found)
    return code


def summary(path: Path, loaded: Loaded, outcome: Outcome, content: Mapping[str, Any], seconds: float) -> str:
    """The lines to print at the end. path: of the files, without an ending."""
    counts, lines = content["counts"], []
    for rule, scores in content["scores"].items():
        if isinstance(scores, Mapping):
            figures = {"of all items": scores["average"], "of those answered": scores["average_answered"]}
            said = ", ".join(f"{value:.1f} % {of}" for of, value in figures.items() if value is not None)
            lines.append(f"{loaded.name}, {rule}: {said}")
    lines.append(
        f"{counts['answered']} answered, {counts['failed']} failed, {counts['excluded']} excluded, of "
        f"{counts['total']}; {seconds:.0f} s"
    )
    asked, own = outcome.settings["evaluation"]["num_frames"], outcome.settings["model"]["num_frames"]
    frames = "one frame a second of each video" if asked == 0 else f"{asked} frames of each video"
    if own is not None:
        frames += ", the checkpoint's own number" if asked == own else f" (the checkpoint's own number: {own})"
    lines.append(frames)
    if "cut" in counts:
        lines.append(f"the context rule cut the prompts of {counts['cut']} items, see cut_tokens in {path}.jsonl")
    errors = [record["error"] for record in outcome.records if record.get("error")]
    lines += [f"failed: {error}" for error in errors[:SHOWN_FAILURES]]
    if len(errors) > SHOWN_FAILURES:
        lines.append(f"failed: {len(errors) - SHOWN_FAILURES} more, see {path}.jsonl")
    lines += [f"excluded: {task}: {reason}" for task, reason in loaded.excluded.items()]
    lines.append(f"files: {path}.*")
    return "\n".join(lines)
