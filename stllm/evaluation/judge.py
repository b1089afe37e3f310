"""`stllm judge`: a language model grades predictions, through an endpoint or on this machine; or its ledger is scored.

predictions -> items -> judge -> ledger, a line an item -> scores. The ledger is what counts: a rerun asks only for what
it lacks, `--offline` scores it again, `--compare` sets two beside each other, `--self-check` grades the judge itself.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.evaluation import judge_compare, judge_scores, judge_selfcheck
from stllm.evaluation.judge_ledger import JudgeRun, Ledger, read_ledger
from stllm.evaluation.judge_predictions import JudgeItem, Predictions, read_predictions
from stllm.evaluation.judge_prompts import PromptSet, load_prompts

log = logging.getLogger(__name__)

LOCAL = "local:"
OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"


def run(args: argparse.Namespace) -> int:
    """The command; exit code 1 when the judge stopped, or nothing was scored."""
    folder = user_path(args.output_dir)
    path = folder / f"{args.axis}.ledger.jsonl"
    if args.compare is not None:
        return _compare(args.axis, path, _ledger_path(args.compare, args.axis))
    if args.self_check is not None:
        return _self_check(args, folder)
    predictions = None if args.pred_path is None else read_predictions(args.pred_path, args.axis)
    stopped = None
    if predictions is not None and not args.offline:
        stopped = _judge(args, path, predictions.items, predictions.unanswered)
    judged, ledger = read_ledger(path)
    if args.offline:
        _check_offline(args, judged, ledger, predictions)
    keys = None if predictions is None else [item.key for item in predictions.items]
    result = judge_scores.score(judged, ledger.entries, ledger.model, keys)
    _write(args, result, ledger)
    if stopped is not None:
        raise UserError(stopped)
    if result["mean"] is None:
        raise UserError(f"no item was scored: {folder / f'{args.axis}.results.json'} lists why")
    return 0


def _write(args: argparse.Namespace, result: judge_scores.Results, ledger: Ledger) -> None:
    """The results file and table of an axis, VcgBench's average if it can be told, and the official item files."""
    folder = user_path(args.output_dir)
    judge_scores.write_json(folder / f"{args.axis}.results.json", result)
    for line in judge_scores.table(result):
        print(line)
    if args.axis in judge_scores.VCGBENCH_AXES:
        _average(folder)
    if args.export_items is not None:
        exported = user_path(args.export_items) / args.axis  # three axes share their items' names
        print(f"{judge_scores.export_items(ledger.entries.values(), exported)} item files in {exported}")


def _check_offline(args: argparse.Namespace, judged: JudgeRun, ledger: Ledger, predictions: Predictions | None) -> None:
    """Sees that what the command line names is what the ledger is of. Raises UserError, saying what differs."""
    given = {"requested_model": args.model, "prompt_digest": args.prompts and load_prompts(args.prompts).digest}
    named = {name: value for name, value in given.items() if value is not None}
    ledger.check(replace(judged, **named), None if predictions is None else predictions.items)


def _judge(args: argparse.Namespace, path: Path, items: Sequence[JudgeItem], unanswered: dict[str, str]) -> str | None:
    """Asks for what the ledger lacks; returns why asking stopped before its end, if it did."""
    from stllm.evaluation.judge_asking import Asking, warn_once

    prompts = load_prompts(args.prompts)
    if items:
        prompts.messages(args.axis, items[0])  # instructions that lack the axis are told before a model is loaded
    base_url = None if args.model.startswith(LOCAL) else _checked_url(args.base_url or OPENAI_URL)
    api_key = None if base_url is None else _api_key(args)
    judged = _judge_run(args, prompts, base_url, len(items), unanswered)
    with Ledger(path) as ledger:
        ledger.begin(judged, items)
        asking = Asking(ledger=ledger, run=judged, prompts=prompts)
        if not asking.unscored(items):
            return None
        if base_url is None or api_key is None:
            from stllm.evaluation.judge_local import LocalJudge

            name = args.model.removeprefix(LOCAL)
            local = LocalJudge.load(name, device=args.device, dtype=args.dtype, max_new_tokens=args.max_tokens)
            asking.local(items, local, args.concurrency)
        else:
            from stllm.evaluation.judge_endpoint import Endpoint

            endpoint = Endpoint(
                base_url=base_url,
                model=args.model,
                api_key=api_key,
                timeout=args.timeout,
                max_retries=args.max_retries,
                temperature=args.temperature,
                max_tokens=args.max_tokens,
                on_fault=warn_once(),
            )
            asking.endpoint(items, endpoint, args.concurrency)
    return asking.stopped


def _judge_run(
    args: argparse.Namespace, prompts: PromptSet, base_url: str | None, num_items: int, unanswered: dict[str, str]
) -> JudgeRun:
    return JudgeRun(
        axis=args.axis,
        requested_model=args.model,
        base_url=None if base_url is None else _without_password(base_url),
        prompt_version=prompts.version,
        prompt_digest=prompts.digest,
        temperature=0.0 if base_url is None else args.temperature,
        max_tokens=args.max_tokens,
        num_items=num_items,
        unanswered=unanswered,
    )


def _self_check(args: argparse.Namespace, folder: Path) -> int:
    predictions = read_predictions(args.pred_path, args.axis)
    items = judge_selfcheck.known_items(predictions.items, args.self_check, args.seed or 0)
    path = folder / f"{args.axis}.selfcheck.ledger.jsonl"
    stopped = _judge(args, path, items, {})
    result = judge_selfcheck.trust(args.axis, items, read_ledger(path)[1])
    judge_scores.write_json(folder / f"{args.axis}.selfcheck.json", result)
    for line in judge_selfcheck.trust_lines(result):
        print(line)
    if stopped is not None:
        raise UserError(stopped)
    return 1 if result["told_apart"] is None else 0  # a check in which nothing was graded has not been passed


def _compare(axis: str, path: Path, other: Path) -> int:
    result = judge_compare.compare(read_ledger(path), read_ledger(other))
    judge_scores.write_json(path.with_name(f"{axis}.comparison.json"), result)
    for line in judge_compare.comparison_lines(result):
        print(line)
    return 0


def _average(folder: Path) -> None:
    """Prints and writes VcgBench's average once all axes are there; says why not when they do not belong together."""
    results = judge_scores.read_results(folder)
    if len(results) < len(judge_scores.VCGBENCH_AXES):
        return
    path = folder / "vcgbench_average.json"
    try:
        average = judge_scores.vcgbench_average(results)
    except UserError as error:
        path.unlink(missing_ok=True)  # of scores that are no longer there
        log.warning("%s", error)
        return
    judge_scores.write_json(path, average)
    print(f"VcgBench average {average['mean']:.2f} (truncated {average['mean_truncated']:.2f})")


def _ledger_path(text: str, axis: str) -> Path:
    """A ledger, or the one of the axis in a folder."""
    path = user_path(text)
    return path / f"{axis}.ledger.jsonl" if path.is_dir() else path


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--base-url: found {url!r}, expected a URL such as http://localhost:8000/v1")
    return url


def _without_password(url: str) -> str:
    """The URL as it may be written down."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _api_key(args: argparse.Namespace) -> str:
    """The key of the named variable; OpenAI's goes to OpenAI alone unless it is named."""
    name = args.api_key_env or (OPENAI_KEY if args.base_url is None else None)
    if name is None:
        return "none"  # local servers ask for none
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {name} is not set: put the endpoint's key into it, name another with "
            "--api-key-env, or the URL of a server of your own with --base-url"
        )
    return key
