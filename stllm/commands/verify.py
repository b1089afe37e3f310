"""Command line of `stllm verify`."""

import argparse
import sys
from pathlib import Path

from stllm.commands.options import Command, Parser, number, path
from stllm.common.logging import console


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "dir",
        nargs="+",
        type=path,
        metavar="DIR",
        help="a golden folder: weights, and the tensors expected from them in expected.safetensors and meta.json",
    )
    parser.add_argument(
        "--atol",
        type=number(0),
        default=1e-4,
        metavar="X",
        help="largest allowed absolute difference of a tensor (default: 1e-4)",
    )
    parser.add_argument(
        "--rtol",
        type=number(0),
        default=1e-3,
        metavar="X",
        help="largest allowed relative difference of a gradient (default: 1e-3)",
    )


def check(args: argparse.Namespace) -> str | None:
    if args.options or args.device not in ("auto", "cpu") or args.dtype not in ("auto", "float32", "fp32"):
        return (
            "it recomputes in float32 on the CPU, with the folder's own settings: drop --options, --device and --dtype"
        )
    return None


def run(args: argparse.Namespace) -> int:
    """Print a table per folder. The exit code is 1 if a difference exceeds its tolerance."""
    from rich.table import Table
    from rich.text import Text

    from stllm.models.checkpoints.verify import verify_folder

    failed = []
    for folder in args.dir:
        rows = verify_folder(folder, atol=args.atol, rtol=args.rtol)
        table = Table(title=str(folder))
        for column in ("tensor", "compared", "largest difference", "tolerance", ""):
            numeric = column in ("largest difference", "tolerance")
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            words = {"tensor": "absolute", "gradient": "relative", "equal": "equality"}[row.kind]
            difference = ("same" if row.passed else "differs") if row.kind == "equal" else f"{row.difference:.1e}"
            tolerance = f"{row.tolerance:.0e}" if row.tolerance else ""
            table.add_row(row.name, words, difference, tolerance, "ok" if row.passed else Text("FAIL", style="red"))
        console().print(table)
        failed += [f"{Path(folder).name}: {row.name}" for row in rows if not row.passed]
    if failed:
        print(f"error: beyond tolerance: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


COMMAND = Command(
    help="recomputes a model's tensors in float32 on the CPU, and compares them with expected ones in its folder",
    example="stllm verify tests/golden/instructblip_residual_mvm",
    add_options=add_options,
    run=run,
    needs="stllm.models.checkpoints.verify",
    check=check,
)
