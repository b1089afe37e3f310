"""`stllm judge`: grade predictions by a language model, through an endpoint or on this machine, or score its ledger.

predictions -> items -> judge -> ledger, one line for each item -> scores. The ledger is what counts: a rerun asks only
for what is missing, `--offline` scores it again, `--compare` compares two, `--self-check` grades the judge itself.

An item whose reply has no verdict is asked again a few times and then fails. A reply that was cut off fails at once,
because it would be cut off again. Asking stops when many items in a row fail or when the server refuses everything.
Finished items stay in the ledger, and the same command continues.
"""

import argparse
import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from tqdm import tqdm

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.evaluation.axes import VCGBENCH_AXES
from stllm.judge import agreement, scores
from stllm.judge.ledger import JudgeRun, Ledger, Reply, continued, read_ledger
from stllm.judge.parser import CutOff, Unparsable, parse_reply
from stllm.judge.predictions import JudgeItem, read_predictions
from stllm.judge.prompts import PromptSet, load_prompts

if TYPE_CHECKING:
    from stllm.judge.endpoint import Endpoint

log = logging.getLogger(__name__)

LOCAL = "local:"
OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NUM_REASKS = 2  # of an item whose reply states no score
MAX_FAILED_IN_A_ROW = 10  # then the judge is considered out of order


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit code is 1 when the judge stopped, or when nothing was scored."""
    folder = user_path(args.output_dir)
    path = folder / f"{args.axis}.ledger.jsonl"
    if args.compare is not None:
        other = user_path(args.compare)
        other = other / path.name if other.is_dir() else other
        compared = agreement.compare(read_ledger(path), read_ledger(other))
        _report(path.with_name(f"{args.axis}.comparison.json"), compared, agreement.comparison_lines(compared))
        return 0
    predictions = None if args.pred_path is None else read_predictions(args.pred_path, args.axis)
    if args.self_check is not None:
        assert predictions is not None  # the command line asks for it
        items = agreement.known_items(predictions.items, args.self_check, args.seed or 0)
        path = folder / f"{args.axis}.selfcheck.ledger.jsonl"
        stopped = _judge(args, path, items, {})
        trust = agreement.trust(args.axis, items, read_ledger(path)[1])
        _report(folder / f"{args.axis}.selfcheck.json", trust, agreement.trust_lines(trust))
        if stopped is not None:
            raise UserError(stopped)
        return 1 if trust["told_apart"] is None else 0  # a check that graded nothing is not passed
    stopped = None
    if predictions is not None and not args.offline:
        stopped = _judge(args, path, predictions.items, predictions.unanswered)
    judged, ledger = read_ledger(path)
    if args.offline:
        given = {"requested_model": args.model, "prompt_digest": args.prompts and load_prompts(args.prompts).digest}
        named = {name: value for name, value in given.items() if value is not None}
        ledger.check(replace(judged, **named), None if predictions is None else predictions.items)
    result = scores.score(judged, ledger, None if predictions is None else [item.key for item in predictions.items])
    _report(folder / f"{args.axis}.results.json", result, scores.table(result))
    if args.axis in VCGBENCH_AXES:
        print(scores.write_average(folder), end="")
    if args.export_items is not None:
        exported = user_path(args.export_items) / args.axis  # three axes share their items' names
        print(f"{scores.export_items(ledger.entries.values(), exported)} item files in {exported}")
    if stopped is not None:
        raise UserError(stopped)
    if result["mean"] is None:
        raise UserError(f"no item was scored: {folder / f'{args.axis}.results.json'} lists why")
    return 0


def _report(path: Path, result: dict[str, Any], lines: Sequence[str]) -> None:
    scores.write_json(path, result)
    print("\n".join(lines))


# ---- asking ---------------------------------------------------------------------------------------------------------


def _judge(args: argparse.Namespace, path: Path, items: Sequence[JudgeItem], unanswered: dict[str, str]) -> str | None:
    """Ask for what is missing in the ledger. Return the reason why asking stopped early, if it did."""
    prompts = load_prompts(args.prompts)
    if items:
        prompts.messages(args.axis, items[0])  # instructions that lack the axis are refused before a model is loaded
    is_local = args.model.startswith(LOCAL)
    base_url = args.base_url or OPENAI_URL
    address = _without_password(base_url)
    api_key = "none" if is_local else _api_key(args)
    judged = JudgeRun(
        axis=args.axis,
        requested_model=args.model,
        base_url=None if is_local else address,
        prompt_version=prompts.version,
        prompt_digest=prompts.digest,
        temperature=0.0 if is_local else args.temperature,
        max_tokens=args.max_tokens,
        num_items=len(items),
        unanswered=unanswered,
    )
    with continued(path, judged, items) as ledger:
        waiting = ledger.unscored(items)
        if not waiting:
            return None
        if num_done := len(items) - len(waiting):
            log.info("%d of %d items have their score in %s", num_done, len(items), path)
        with tqdm(total=len(items), initial=num_done, desc=args.axis, unit="item", disable=None) as bar:
            if is_local:
                from stllm.judge.local import LocalJudge

                name = args.model.removeprefix(LOCAL)
                judge = LocalJudge(name, device=args.device, dtype=args.dtype, max_new_tokens=args.max_tokens)
                for start in range(0, len(waiting), args.concurrency):
                    batch = waiting[start : start + args.concurrency]
                    replies = judge.replies([prompts.messages(args.axis, item) for item in batch])
                    for item, reply in zip(batch, replies, strict=True):
                        ledger.append(item, reply)  # asked only once: it would give the same reply again
                        bar.update()
                return None
            from stllm.judge.endpoint import Endpoint

            endpoint = Endpoint(
                base_url=base_url,
                model=args.model,
                api_key=api_key,
                timeout=args.timeout,
                temperature=args.temperature,
                max_tokens=args.max_tokens,
            )
            return asyncio.run(_ask_endpoint(waiting, endpoint, ledger, prompts, args, bar))


def _without_password(url: str) -> str:
    """The URL without its password, so that it may be written down. Raises UserError for what is no server's URL."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and httpx.URL(url).host and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid:
        raise UserError(f"--base-url: found {url!r}, expected a URL such as http://localhost:8000/v1")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _api_key(args: argparse.Namespace) -> str:
    """The key in the named variable. OpenAI's key is sent only to OpenAI unless it is named."""
    name = args.api_key_env or (OPENAI_KEY if args.base_url is None else None)
    if name is None:
        return "none"  # local servers ask for none
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {name} is not set: put the endpoint's key into it, name another with "
            "--api-key-env, or the URL of a server of your own with --base-url"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {name} holds characters that no key has: copy the key anew")
    return key


async def _ask_endpoint(
    items: Sequence[JudgeItem],
    endpoint: "Endpoint",
    ledger: Ledger,
    prompts: PromptSet,
    args: argparse.Namespace,
    bar: "tqdm[Any]",
) -> str | None:
    """Ask an endpoint, several items at a time. Return the reason why asking stopped early, or None."""
    waiting = iter(items)  # shared: each worker takes the next one
    num_failed = 0  # in a row

    def is_final(reply: Reply) -> bool:
        """Check whether asking again cannot help: a verdict, no reply, or a reply that would be cut off again."""
        try:
            return reply.reply is None or bool(parse_reply(reply.reply, args.axis, cut=reply.cut))
        except Unparsable as fault:
            return isinstance(fault, CutOff)

    async def work() -> None:
        nonlocal num_failed
        for item in waiting:
            messages = prompts.messages(args.axis, item)
            attempts = 0
            for _ in range(NUM_REASKS + 1):
                reply = await endpoint.reply(messages, args.max_retries + 1 - attempts)
                attempts += reply.attempts
                if attempts > args.max_retries or is_final(reply):
                    break
            entry = ledger.append(item, replace(reply, attempts=attempts))
            bar.update()
            num_failed = 0 if entry.is_scored else num_failed + 1
            if num_failed >= MAX_FAILED_IN_A_ROW:
                raise UserError(
                    f"{num_failed} items in a row failed (the last one: {entry.outcome}): correct that, or check that "
                    f"the judge at {endpoint.base_url} works, then run the command again"
                )

    workers = [asyncio.create_task(work()) for _ in range(min(args.concurrency, len(items)))]
    try:
        await asyncio.gather(*workers)
    except UserError as stop:  # also of the ledger, which does not mix judges
        return str(stop)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await endpoint.close()
    return None
