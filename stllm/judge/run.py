"""`stllm judge`: a language model grades predictions, through an endpoint or on this machine; or its ledger is scored.

predictions -> items -> judge -> ledger, a line an item -> scores. The ledger is what counts: a rerun asks only for what
it lacks, `--offline` scores it again, `--compare` sets two beside each other, `--self-check` grades the judge itself.

An item whose reply has no verdict is asked again a few times and then fails; a reply that was cut off fails at once, as
it would be cut off again. Asking stops when many items in a row fail or when the server refuses everything: finished
items stay in the ledger, and the same command continues.
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
from stllm.evaluation.axes import VCGBENCH_AXES, vcgbench_average
from stllm.judge import agreement, scores
from stllm.judge.ledger import JudgeRun, Ledger, continued, read_ledger
from stllm.judge.parser import CutOff, Unparsable, parse_reply
from stllm.judge.predictions import JudgeItem, read_predictions
from stllm.judge.prompts import PromptSet, load_prompts

if TYPE_CHECKING:
    from stllm.judge.endpoint import Endpoint
    from stllm.judge.local import LocalJudge

log = logging.getLogger(__name__)

LOCAL = "local:"
OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NUM_REASKS = 2  # of an item whose reply states no score
MAX_FAILED_IN_A_ROW = 10  # then the judge is taken to be out of order


def run(args: argparse.Namespace) -> int:
    """Run the command; exit code 1 when the judge stopped, or nothing was scored."""
    folder = Path(args.output_dir).expanduser()
    path = folder / f"{args.axis}.ledger.jsonl"
    if args.compare is not None:
        other = Path(args.compare).expanduser()
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
        return 1 if trust["told_apart"] is None else 0  # a check in which nothing was graded has not been passed
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
        _average(folder)
    if args.export_items is not None:
        exported = Path(args.export_items).expanduser() / args.axis  # three axes share their items' names
        print(f"{scores.export_items(ledger.entries.values(), exported)} item files in {exported}")
    if stopped is not None:
        raise UserError(stopped)
    if result["mean"] is None:
        raise UserError(f"no item was scored: {folder / f'{args.axis}.results.json'} lists why")
    return 0


def _report(path: Path, result: dict[str, Any], lines: Sequence[str]) -> None:
    scores.write_json(path, result)
    print("\n".join(lines))


def _average(folder: Path) -> None:
    """Print and write VcgBench's average once all axes are there; warn when they do not belong together."""
    results = scores.read_results(folder)
    if len(results) < len(VCGBENCH_AXES):
        return
    path = folder / "vcgbench_average.json"
    try:
        average = vcgbench_average(results)
    except UserError as error:
        path.unlink(missing_ok=True)  # of scores that are no longer there
        log.warning("%s", error)
        return
    lines = [f"VcgBench average {average['mean']:.2f} (truncated {average['mean_truncated']:.2f})"]
    _report(path, average, lines)


# ---- asking ---------------------------------------------------------------------------------------------------------


def _judge(args: argparse.Namespace, path: Path, items: Sequence[JudgeItem], unanswered: dict[str, str]) -> str | None:
    """Ask for what the ledger lacks; returns why asking stopped before its end, if it did."""
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
            asking = _Asking(judged, ledger, prompts, bar)
            if is_local:
                from stllm.judge.local import LocalJudge

                name = args.model.removeprefix(LOCAL)
                local = LocalJudge(name, device=args.device, dtype=args.dtype, max_new_tokens=args.max_tokens)
                asking.local(waiting, local, args.concurrency)
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
            return asyncio.run(asking.endpoint(waiting, endpoint, args.concurrency, args.max_retries + 1))


def _without_password(url: str) -> str:
    """The URL as it may be written down. Raises UserError for what is no URL of a server."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and httpx.URL(url).host and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid:
        raise UserError(f"--base-url: found {url!r}, expected a URL such as http://localhost:8000/v1")
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
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {name} holds characters that no key has: copy the key anew")
    return key


class _Asking:
    """Ask about items; each becomes a line of the ledger with a score or a reason for none."""

    def __init__(self, run: JudgeRun, ledger: Ledger, prompts: PromptSet, bar: "tqdm[Any]") -> None:
        self._axis, self._ledger, self._prompts, self._bar = run.axis, ledger, prompts, bar
        self._num_failed_in_a_row = 0

    def local(self, items: Sequence[JudgeItem], judge: "LocalJudge", batch_size: int) -> None:
        """Ask a model on this machine, once an item, as it would give the same reply again."""
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            replies = judge.replies([self._prompts.messages(self._axis, item) for item in batch])
            for item, reply in zip(batch, replies, strict=True):
                self._ledger.append(item, reply)
                self._bar.update()

    async def endpoint(
        self, items: Sequence[JudgeItem], endpoint: "Endpoint", concurrency: int, max_attempts: int
    ) -> str | None:
        """Ask an endpoint, `concurrency` items at a time; returns why asking stopped before the last item, or None."""
        waiting = iter(items)  # shared: each worker takes the next one

        async def work() -> None:
            for item in waiting:
                await self._ask(item, endpoint, max_attempts)

        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(items)))]
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

    async def _ask(self, item: JudgeItem, endpoint: "Endpoint", max_attempts: int) -> None:
        """Ask about one item until a reply states a score. Raises UserError when the run cannot go on."""
        messages = self._prompts.messages(self._axis, item)
        attempts = 0
        for _ in range(NUM_REASKS + 1):
            reply = await endpoint.reply(messages, max_attempts - attempts)
            attempts += reply.attempts
            if reply.reply is None or attempts >= max_attempts:
                break
            try:
                parse_reply(reply.reply, self._axis, cut=reply.cut)
                break
            except CutOff:  # it would be cut off again
                break
            except Unparsable:
                pass
        entry = self._ledger.append(item, replace(reply, attempts=attempts))
        self._bar.update()
        self._num_failed_in_a_row = 0 if entry.is_scored else self._num_failed_in_a_row + 1
        if self._num_failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise UserError(
                f"{self._num_failed_in_a_row} items in a row failed (the last one: {entry.outcome}): correct that, or "
                f"check that the judge at {endpoint.base_url} works, then run the command again"
            )
