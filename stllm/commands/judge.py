"""`stllm judge` on the command line."""

import argparse

from stllm.commands.options import Command, Parser, number, path, whole
from stllm.evaluation.axes import AXES


def add_options(parser: Parser) -> None:
    parser.add_argument("axis", choices=AXES, metavar="AXIS", help=f"what is graded: {', '.join(AXES)}")
    parser.add_argument(
        "--pred-path", type=path, metavar="FILE", help="predictions: NAME.jsonl of stllm evaluate, or an official list"
    )
    parser.add_argument(
        "--output-dir",
        type=path,
        default="output/judge",
        metavar="DIR",
        help="ledger and results, a file an axis; a rerun goes on there (default: output/judge)",
    )
    group = parser.add_argument_group("the judge")
    group.add_argument(
        "--model", metavar="NAME", help="the model's name at the endpoint, or local:PATH for a model on this machine"
    )
    group.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible endpoint (default: OpenAI's)")
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="the environment variable that holds the key (default: OPENAI_API_KEY for OpenAI, none for other servers)",
    )
    group.add_argument(
        "--concurrency", type=whole(1), default=8, metavar="N", help="items asked at once; local: a batch (default: 8)"
    )
    group.add_argument(
        "--max-retries",
        type=whole(0),
        default=5,
        metavar="N",
        help="further requests that an item may take (default: 5)",
    )
    group.add_argument(
        "--timeout", type=number(0.01), default=60.0, metavar="SECONDS", help="for a whole reply (default: 60)"
    )
    group.add_argument(
        "--temperature",
        type=number(0),
        default=0.0,
        metavar="T",
        help="of the judge's sampling; local judges have none (default: 0)",
    )
    group.add_argument(
        "--max-tokens",
        type=whole(1),
        metavar="N",
        help="length of a reply, its thoughts included (default: the endpoint's; local: 128)",
    )
    parser.add_argument(
        "--prompts", type=path, metavar="FILE", help="your copy of the official instructions, YAML or JSON"
    )
    parser.add_argument("--offline", action="store_true", help="score the ledger again, and ask nothing")
    parser.add_argument(
        "--compare", type=path, metavar="LEDGER", help="compare the ledger in --output-dir with this one, or its folder"
    )
    parser.add_argument(
        "--self-check", type=whole(1), metavar="N", help="grade the judge itself on answers known to be right or wrong"
    )
    parser.add_argument(
        "--export-items", type=path, metavar="DIR", help="also write the official file of each item, to DIR/AXIS"
    )


def check(args: argparse.Namespace) -> str | None:
    if args.options:
        return "it has no configuration: drop --options"
    modes = [name for name in ("offline", "compare", "self_check") if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        return f"--{modes[0]} and --{modes[1].replace('_', '-')} do not go together"
    asks = modes in ([], ["self_check"])
    if asks and args.pred_path is None:
        return "name the predictions with --pred-path"
    if asks and args.model is None:
        return "name the judge with --model (and --base-url, or local:PATH for a model on this machine)"
    if modes == ["compare"] and (args.model or args.base_url or args.prompts or args.pred_path):
        return "--compare reads two ledgers alone: drop --pred-path, --model, --base-url and --prompts"
    if args.export_items is not None and modes not in ([], ["offline"]):
        return f"--export-items does not go with --{modes[0].replace('_', '-')}"
    if args.model is not None and args.model.startswith("local:"):
        return "--base-url does not go with a local: model" if args.base_url else None
    if args.device != "auto" or args.dtype != "auto":
        return "--device and --dtype are for a local: model"
    return None


def run(args: argparse.Namespace) -> int:
    """Run the command, which is in stllm.judge.run; returns its exit code."""
    from stllm.judge.run import run

    return run(args)


COMMAND = Command(
    help="lets a language model grade predictions of VcgBench, VideoQA and TempCompass",
    example="stllm judge qa --pred-path output/eval/msvd.jsonl --base-url http://localhost:8000/v1 --model NAME",
    add_options=add_options,
    run=run,
    needs="stllm.judge.run",
    check=check,
)
