"""Command line of `stllm inspect`."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stllm.commands.options import Command, Parser, add_config, path
from stllm.common.errors import UserError
from stllm.common.logging import console

if TYPE_CHECKING:
    from stllm.models.checkpoints.audit import AuditReport

SUMMARY = ("path", "format", "family", "tensors", "stored_bytes", "stored_types")


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "path", nargs="?", type=path, metavar="PATH", help="a checkpoint: a file or folder in any known format"
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def check(args: argparse.Namespace) -> str | None:
    named = args.path or args.cfg_path or args.options
    return None if named else "name a PATH, a --cfg-path, or --options model.model_type=..."


def run(args: argparse.Namespace) -> int:
    """Print a description of the checkpoint. The exit code is 1 if the configuration does not fit the weights."""
    from stllm.models.checkpoints.inspect import inspect_config, inspect_path

    if args.path is None:
        found, report = inspect_config(args.cfg_path, args.options)
    else:
        found, report = inspect_path(args.path, args.cfg_path, args.options)
    if args.json:
        print(json.dumps(found, indent=1, default=str))
    else:
        _print(found, report)
    try:
        if report is not None:
            report.raise_for_problems()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print(found: Mapping[str, Any], report: "AuditReport | None") -> None:
    from rich.table import Table

    from stllm.models.checkpoints.inspect import NUM_GPUS

    out = console()
    values = {**{key: found[key] for key in SUMMARY if key in found}, **found["sizes"]}
    for key, value in values.items():
        shown = _readable(value) if key == "stored_bytes" else value
        if isinstance(value, Mapping):
            shown = ", ".join(f"{name} {entry}" for name, entry in value.items())
        out.print(f"{key.replace('_', ' ')}: {shown}", soft_wrap=True)
    for line in found.get("assumed", ()):
        out.print(f"assumed: {line}", soft_wrap=True)
    if "parameters" in found:
        table = Table(title="parameters")
        for column in ("part", "total", "trainable"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for part, counts in [*found["parameters"].items(), ("all", found["total"])]:
            table.add_row(part, f"{counts['total']:,}", f"{counts['trainable']:,}")
        out.print(table)
        memory = ", ".join(f"{_readable(size)} as {name}" for name, size in found["memory_bytes"].items())
        out.print(f"memory of the weights: {memory}", soft_wrap=True)
    if "training_memory_bytes" in found:
        training = found["training_memory_bytes"]
        table = Table(title=f"training in {training['precision']} with AdamW, GiB, computed; activations come on top")
        table.add_column("strategy")
        for one, several in (("1 GPU", "each of {} GPUs"), ("host, 1 GPU", "host, {} GPUs")):
            for number in NUM_GPUS:
                table.add_column(one if number == 1 else several.format(number), justify="right")
        for name, figures in training["strategies"].items():
            cells = [figures[where][number] for where in ("gpu", "host") for number in NUM_GPUS]
            table.add_row(name, *(f"{size / 2**30:.1f}" for size in cells))
        out.print(table)
    if report is not None:
        out.print(report.table())
        for line in report.details():
            out.print(line, soft_wrap=True)


def _readable(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


COMMAND = Command(
    help="shows a checkpoint's format, model family, sizes and memory, and whether a configuration fits it",
    example="stllm inspect DIR --cfg-path model.yaml",
    add_options=add_options,
    run=run,
    needs="stllm.models.checkpoints.inspect",
    check=check,
)
