"""Items brought to a judge, several at a time: each ends as a line of the ledger, with a score or why there is none.

An item whose reply has no verdict is asked again a few times and then fails; a reply that was cut off fails at once, as
it would be cut off again. Asking stops when many items in a row fail or when the server refuses everything: finished
items stay in the ledger, and the same command continues.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stllm.common.errors import UserError
from stllm.evaluation.judge_endpoint import AskFailed, Endpoint, Stopped
from stllm.evaluation.judge_ledger import Entry, JudgeRun, Ledger
from stllm.evaluation.judge_parser import CutOff, Unparsable, parse_reply
from stllm.evaluation.judge_predictions import JudgeItem
from stllm.evaluation.judge_prompts import Messages, PromptSet

if TYPE_CHECKING:
    from stllm.evaluation.judge_local import LocalJudge

log = logging.getLogger(__name__)

NUM_REASKS = 2  # of an item whose reply states no score
MAX_FAILED_IN_A_ROW = 10  # then the judge is taken to be out of order


class Asking:
    """One run over the items that the ledger has no score of. stopped: why it ended before the last item, or None."""

    def __init__(self, *, ledger: Ledger, run: JudgeRun, prompts: PromptSet) -> None:
        self.ledger, self.judge_run, self.prompts = ledger, run, prompts
        self.stopped: str | None = None
        self._num_failed_in_a_row = 0
        self._bar: Any = None

    def endpoint(self, items: Sequence[JudgeItem], endpoint: Endpoint, concurrency: int) -> None:
        """Asks an endpoint, `concurrency` items at a time."""
        with self._progress(items):
            asyncio.run(self._ask_all(self.unscored(items), endpoint, concurrency))

    def local(self, items: Sequence[JudgeItem], judge: "LocalJudge", batch_size: int) -> None:
        """Asks a model on this machine, once an item: it would reply the same again."""
        waiting = self.unscored(items)
        with self._progress(items):
            for start in range(0, len(waiting), batch_size):
                batch = waiting[start : start + batch_size]
                replies = judge.replies([self._messages(item) for item in batch])
                for item, reply in zip(batch, replies, strict=True):
                    fields: dict[str, Any] = {"model": judge.model_id, "attempts": 1}
                    if reply is None:
                        error = "the instructions and texts are too long for the judge"
                        self._record(item, **fields, reply=None, error=error)
                    else:
                        self._record_reply(item, **fields, reply=reply[0], cut=reply[1])

    # ---- an endpoint ------------------------------------------------------------------------------------------------

    async def _ask_all(self, items: Sequence[JudgeItem], endpoint: Endpoint, concurrency: int) -> None:
        waiting = iter(items)  # shared: each worker takes the next one

        async def work() -> None:
            for item in waiting:
                await self._ask(item, endpoint)

        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(items)))]
        try:
            await asyncio.gather(*workers)
        except UserError as stop:  # also of the ledger, which does not mix judges
            self.stopped = str(stop)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await endpoint.close()

    async def _ask(self, item: JudgeItem, endpoint: Endpoint) -> None:
        messages = self._messages(item)
        attempts, limit = 0, endpoint.max_retries + 1
        for asked in range(1, NUM_REASKS + 2):
            try:
                reply = await endpoint.reply(messages, limit - attempts)
            except AskFailed as error:
                attempts += error.attempts
                self._record(item, model=None, reply=None, attempts=attempts, error=str(error))
                break
            attempts += reply.attempts
            last = asked > NUM_REASKS or attempts >= limit
            fields: dict[str, Any] = {"model": reply.model, "attempts": attempts, "cut": reply.cut}
            if self._record_reply(item, reply=reply.text, last=last, **fields):
                break
        if self._num_failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            last_fault = self.ledger.entries[item.key].error
            raise Stopped(
                f"{self._num_failed_in_a_row} items in a row failed (the last one: {last_fault}): mend that, or see "
                f"that the judge at {endpoint.base_url} works, then run the command again"
            )

    # ---- the ledger -------------------------------------------------------------------------------------------------

    def unscored(self, items: Sequence[JudgeItem]) -> list[JudgeItem]:
        """The items that the ledger has no score of."""
        entries = self.ledger.entries
        return [item for item in items if item.key not in entries or not entries[item.key].is_scored()]

    def _messages(self, item: JudgeItem) -> Messages:
        return self.prompts.messages(self.judge_run.axis, item)

    def _record_reply(self, item: JudgeItem, *, reply: str, last: bool = True, **fields: Any) -> bool:
        """Records the verdict of a reply, or that there is none if it is the `last`. Returns whether it recorded."""
        try:
            verdict = parse_reply(reply, self.judge_run.axis, cut=fields["cut"])
        except Unparsable as fault:
            last = last or isinstance(fault, CutOff)
            if last:
                self._record(item, reply=reply, **fields, error=f"the reply cannot be read: {fault}")
            return last
        parsed = {"score": verdict.score, **({"pred": verdict.pred} if verdict.pred else {})}
        self._record(item, reply=reply, parsed=parsed, **fields)
        return True

    def _record(self, item: JudgeItem, *, error: str | None = None, parsed: Any = None, **fields: Any) -> None:
        self.ledger.append(Entry.of(item, self.judge_run, parsed=parsed, error=error, **fields))
        self._num_failed_in_a_row = self._num_failed_in_a_row + 1 if error else 0
        self._bar.update()

    def _progress(self, items: Sequence[JudgeItem]) -> Any:
        """A bar over all items, begun where the ledger stands; none where nobody looks."""
        num_done = len(items) - len(self.unscored(items))
        if num_done:
            log.info("%d of %d items have their score in %s", num_done, len(items), self.ledger.path)
        self._bar = tqdm(total=len(items), initial=num_done, desc=self.judge_run.axis, unit="item", disable=None)
        return self._bar


def warn_once() -> Callable[[str], None]:
    """Tells each kind of fault the first time that it comes: a person sees why nothing moves."""
    told: set[str] = set()

    def tell(fault: str) -> None:
        kind = fault.partition(" (")[0].partition(":")[0]
        if kind not in told:
            told.add(kind)
            log.warning("%s: asking again", fault)

    return tell
