"""`stllm table`: prints results of several benchmarks in the paper's table, or compares two runs item by item."""

import argparse

from stllm.commands.options import Command, Parser, path


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "results",
        nargs="*",
        metavar="[BENCH=]RESULTS.json",
        help="results files of stllm evaluate mvbench and of stllm judge; for VideoQA put the benchmark and = before "
        "the path: msvd=, msrvtt= or activitynet=",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=path,
        metavar=("A.jsonl", "B.jsonl"),
        help="compare two runs over the same questions instead: print the difference of their scores with interval and "
        "p-value, and the items with another result",
    )
    parser.add_argument(
        "--output", type=path, metavar="NAME", help="also write the comparison to NAME.json, NAME.md and NAME.png"
    )


def check(args: argparse.Namespace) -> str | None:
    if bool(args.results) == (args.compare is not None):
        return "name results files, or two runs with --compare A.jsonl B.jsonl"
    return "--output goes with --compare" if args.output is not None and args.compare is None else None


def run(args: argparse.Namespace) -> int:
    """Print the table or the comparison."""
    from stllm.evaluation.reports.comparison import compare
    from stllm.evaluation.reports.paper_table import paper_table

    if args.compare is None:
        print(paper_table(args.results), end="")
    else:
        first, second = args.compare
        print(compare(first, second, args.output), end="")
    return 0


COMMAND = Command(
    help="prints your results of several benchmarks as a row of the paper's table, or compares two runs",
    example="stllm table eval/mvbench.results.json eval/vcgbench.judged/*.results.json "
    "msvd=eval/msvd.judged/qa.results.json",
    add_options=add_options,
    run=run,
    needs="stllm.evaluation.reports.paper_table",
    check=check,
)
