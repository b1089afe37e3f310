"""`stllm table`: results of several benchmarks as a row of the paper's table."""

import argparse

from stllm.commands.options import Command, Parser


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        metavar="[BENCH=]RESULTS.json",
        help="results of stllm evaluate mvbench and of stllm judge; BENCH (msvd, msrvtt, activitynet) for the axis qa",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from stllm.evaluation.reports.paper_table import paper_table

    print(paper_table(args.results), end="")
    return 0


COMMAND = Command(
    help="prints results of several benchmarks as a row of the paper's table, below the published ones",
    example="stllm table eval/mvbench.results.json eval/vcgbench.judged/*.results.json "
    "msvd=eval/msvd.judged/qa.results.json",
    add_options=add_options,
    run=run,
    needs="stllm.evaluation.reports.paper_table",
)
