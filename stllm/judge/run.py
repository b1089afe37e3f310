"""`stllm judge`: have a language model score predictions, through an endpoint or in this process.

predictions -> items -> judge -> ledger (one line per item) -> scores. A rerun asks only for items without a score in
the ledger. `--offline` recomputes the scores from the ledger, `--compare` compares two ledgers, and `--self-check`
tests the judge with predictions of known quality.

An item is asked again a few times if the reply has no verdict, and then fails. It fails at once if the reply was cut
off, because that would happen again. The command stops if many items in a row fail or if the server refuses all
requests. Finished items stay in the ledger, and the same command resumes.
"""

import argparse
import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.evaluation.axes import TEMPCOMPASS, VCGBENCH_AXES
from stllm.judge import scores
from stllm.judge.items import JudgeItem, load_prompts, read_predictions
from stllm.judge.ledger import JudgeRun, continued, read_ledger

log = logging.getLogger(__name__)

LOCAL = "local:"


def run(args: argparse.Namespace) -> int:
    """Run the command, and return the exit code. Raises UserError if asking stopped early, or if nothing was scored."""
    folder = user_path(args.output_dir)
    path = folder / f"{args.axis}.ledger.jsonl"
    if args.compare is not None:
        other = user_path(args.compare)
        other = other / path.name if other.is_dir() else other
        compared = scores.compare(read_ledger(path), read_ledger(other))
        _report(path.with_name(f"{args.axis}.comparison.json"), compared, scores.comparison_lines(compared))
        return 0
    predictions = None if args.pred_path is None else read_predictions(args.pred_path, args.axis)
    if args.self_check is not None:
        assert predictions is not None  # the command line requires --pred-path with --self-check
        items = scores.known_items(predictions.items, args.self_check, args.seed or 0)
        path = folder / f"{args.axis}.selfcheck.ledger.jsonl"
        stopped = _judge(args, path, items, {})
        trust = scores.trust(items, read_ledger(path))
        _report(folder / f"{args.axis}.selfcheck.json", trust, scores.trust_lines(trust))
        if stopped is not None:
            raise UserError(stopped)
        return 1 if trust["told_apart"] is None else 0  # a check without any score is not passed
    stopped = None
    if predictions is not None and not args.offline:
        stopped = _judge(args, path, predictions.items, predictions.unanswered)
    ledger = read_ledger(path)
    if args.offline:
        given = {
            "requested_model": args.model,
            "prompt_digest": args.prompts and load_prompts(args.prompts, args.axis).digest,
        }
        named = {name: value for name, value in given.items() if value is not None}
        ledger.check(replace(ledger.run, **named), None if predictions is None else predictions.items)
    result = scores.score(ledger, None if predictions is None else [item.key for item in predictions.items])
    lines = scores.table(result)
    if args.axis == TEMPCOMPASS and args.pred_path is not None:
        result["scores"] = scores.tempcompass_scores(user_path(args.pred_path), ledger)
        lines += scores.tempcompass_lines(result["scores"])
    _report(folder / f"{args.axis}.results.json", result, lines)
    if args.axis in VCGBENCH_AXES:
        print(scores.write_average(folder), end="")
    if args.export_items is not None:
        exported = user_path(args.export_items) / args.axis  # a folder per axis, since item names are not unique
        print(f"{scores.export_items(ledger.entries.values(), exported)} item files in {exported}")
    if stopped is not None:
        raise UserError(stopped)
    if result["mean"] is None:
        raise UserError(f"no item was scored: {folder / f'{args.axis}.results.json'} lists why")
    return 0


def _report(path: Path, result: dict[str, Any], lines: Sequence[str]) -> None:
    scores.write_json(path, result)
    print("\n".join(lines))


def _judge(args: argparse.Namespace, path: Path, items: Sequence[JudgeItem], unanswered: dict[str, str]) -> str | None:
    """Have the items judged that have no score in the ledger. Return the reason for stopping early, or None."""
    prompts = load_prompts(args.prompts, args.axis)
    for item in {item.form: item for item in items}.values():
        prompts.messages(args.axis, item)  # raises if instructions are missing, before a model is loaded
    endpoint = None
    if not args.model.startswith(LOCAL):
        from stllm.judge.endpoint import Endpoint

        settings = {"model": args.model, "temperature": args.temperature}
        if args.max_tokens is not None:
            settings["max_tokens"] = args.max_tokens
        endpoint = Endpoint(settings, base_url=args.base_url, api_key_env=args.api_key_env, timeout=args.timeout)
    judged = JudgeRun(
        axis=args.axis,
        requested_model=args.model,
        base_url=None if endpoint is None else endpoint.address,
        prompt_version=prompts.version,
        prompt_digest=prompts.digest,
        temperature=0.0 if endpoint is None else args.temperature,
        max_tokens=args.max_tokens,
        num_items=len(items),
        unanswered=unanswered,
    )
    with continued(path, judged, items) as ledger:
        waiting = [item for item in items if item.key not in ledger.entries or not ledger.entries[item.key].is_scored]
        if not waiting:
            return None
        if num_done := len(items) - len(waiting):
            log.info("%d of %d items have their score in %s", num_done, len(items), path)
        with tqdm(total=len(items), initial=num_done, desc=args.axis, unit="item", disable=None) as bar:
            if endpoint is not None:
                asking = endpoint.ask(
                    waiting,
                    ledger,
                    prompts,
                    concurrency=args.concurrency,
                    max_attempts=args.max_retries + 1,
                    done=bar.update,
                )
                return asyncio.run(asking)
            from stllm.judge.local import LocalJudge

            name = args.model.removeprefix(LOCAL)
            judge = LocalJudge(name, device=args.device, dtype=args.dtype, max_new_tokens=args.max_tokens)
            for start in range(0, len(waiting), args.concurrency):
                batch = waiting[start : start + args.concurrency]
                replies = judge.replies([prompts.messages(args.axis, item) for item in batch])
                for item, reply in zip(batch, replies, strict=True):
                    ledger.append(item, reply)  # not asked again, since greedy decoding gives the same reply
                    bar.update()
            return None
