"""Command line of `stllm judge`."""

import argparse

from stllm.commands.options import Command, Parser, number, path, whole
from stllm.evaluation.axes import AXES


def add_options(parser: Parser) -> None:
    words = (
        f"what is scored: {', '.join(AXES[:5])} (VcgBench); {AXES[5]} (VideoQA); {AXES[6]} (captions and replies that "
        "its rules cannot score)"
    )
    parser.add_argument("axis", choices=AXES, metavar="AXIS", help=words)
    parser.add_argument(
        "--pred-path",
        type=path,
        metavar="FILE",
        help="predictions: NAME.jsonl of stllm evaluate, or a JSON list in the official format",
    )
    parser.add_argument(
        "--output-dir",
        type=path,
        default="output/judge",
        metavar="DIR",
        help="output folder for AXIS.ledger.jsonl, which has all verdicts, and AXIS.results.json; an interrupted run "
        "is resumed there (default: output/judge)",
    )
    group = parser.add_argument_group("the judge")
    words = "name of the model at the endpoint, or local:PATH to run a model on this machine"
    group.add_argument("--model", metavar="NAME", help=words)
    group.add_argument("--base-url", metavar="URL", help="URL of an OpenAI-compatible endpoint (default: OpenAI's)")
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that contains the key (default: OPENAI_API_KEY for OpenAI, none for other servers)",
    )
    words = "requests at a time; for a local model the batch size (default: 8)"
    group.add_argument("--concurrency", type=whole(1), default=8, metavar="N", help=words)
    group.add_argument(
        "--max-retries",
        type=whole(0),
        default=5,
        metavar="N",
        help="maximum number of further requests per item (default: 5)",
    )
    group.add_argument(
        "--timeout",
        type=number(0.01),
        default=60.0,
        metavar="SECONDS",
        help="time limit for a complete reply (default: 60)",
    )
    group.add_argument(
        "--temperature",
        type=number(0),
        default=0.0,
        metavar="T",
        help="temperature of the judge's sampling; ignored by a local model (default: 0)",
    )
    group.add_argument(
        "--max-tokens",
        type=whole(1),
        metavar="N",
        help="maximum tokens of a reply, including reasoning (default: the endpoint's; 128 for a local model)",
    )
    words = "YAML or JSON file with other instructions for the judge, such as the official ones"
    parser.add_argument("--prompts", type=path, metavar="FILE", help=words)
    words = "recompute the scores from the stored verdicts (AXIS.ledger.jsonl) without asking the judge"
    parser.add_argument("--offline", action="store_true", help=words)
    words = "compare the verdicts in --output-dir with those in LEDGER, another AXIS.ledger.jsonl or its folder"
    parser.add_argument("--compare", type=path, metavar="LEDGER", help=words)
    words = "test the judge on N random items, each with answers known to be right or wrong"
    parser.add_argument("--self-check", type=whole(1), metavar="N", help=words)
    words = "also write a file per item in the official format to DIR/AXIS"
    parser.add_argument("--export-items", type=path, metavar="DIR", help=words)


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
    """Run the command (in stllm.judge.run), and return its exit code."""
    from stllm.judge.run import run

    return run(args)


COMMAND = Command(
    help="scores predictions of VcgBench, VideoQA and TempCompass with a language model as judge",
    example="stllm judge qa --pred-path output/eval/msvd.jsonl --base-url http://localhost:8000/v1 --model NAME",
    add_options=add_options,
    run=run,
    needs="stllm.judge.run",
    check=check,
)
