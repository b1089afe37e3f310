"""Ask a model the items of a benchmark, and yield a record for each as soon as it is complete.

Items are grouped by clip. Worker processes read clips ahead, each clip is encoded once, and its questions join those of
other clips in batches. An engine (conversation/remote.py) gets single questions instead, many at a time.

A record does not depend on the batch, the workers or the other items.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from stllm.common.distributed import end_with_parent
from stllm.common.errors import UserError
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Answer, ClipReader, EncodedClip, EngineError, Media, Prepared, RequestError
from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.media.clip import Clip
from stllm.media.time_bound import StorageError, read_within

CLIPS_AHEAD = 2  # clips that each worker reads ahead
BATCHES_SORTED = 4  # batches of questions that are collected before they are sorted by length


class QueuedQuestion(NamedTuple):
    """A question in the queue. number: its index in the item. answers: question number -> answer, for its item."""

    item: Item
    number: int
    prepared: Prepared
    answers: dict[int, Answer]


def by_clip(items: Sequence[Item]) -> dict[Media, list[Item]]:
    """Group items by clip (file, start and end, frames), in the order of each clip's first item."""
    groups: dict[Media, list[Item]] = {}
    for item in items:
        if item.media is not None:
            groups.setdefault(item.media, []).append(item)
    return groups


def share(items: Sequence[Item], rank: int, num_ranks: int) -> list[Item]:
    """Return the items of process `rank`. All items of a clip go to one process; questions are divided evenly."""
    loads = [0] * num_ranks
    mine: set[str] = set()
    groups = [*by_clip(items).values(), *([item] for item in items if item.media is None)]
    sizes = [sum(len(item.questions) for item in group) for group in groups]
    for size, group in sorted(zip(sizes, groups, strict=True), key=lambda both: -both[0]):
        lightest = loads.index(min(loads))
        loads[lightest] += size
        if lightest == rank:
            mine.update(item.id for item in group)
    return [item for item in items if item.id in mine]


def read_clip(reader: ClipReader, media_seconds: float, media: Media) -> tuple[Clip | str, float]:
    """Read one clip. Return the clip or an error sentence, and the seconds that reading took.

    media_seconds: the time limit; 0: no limit. Raises StorageError.
    """
    start = time.perf_counter()
    found: Clip | str
    try:
        found = read_within(media_seconds, partial(reader, media), medium=str(media.path), setting="--media-seconds")
    except StorageError:
        raise
    except UserError as error:
        found = str(error)
    return found, time.perf_counter() - start


class Asker:
    """Asks a model the items of a benchmark.

    batch_size: questions answered at once. num_workers: processes that read clips; 0: this one.
    media_seconds: time limit for reading one medium; 0: no limit.
    """

    def __init__(
        self,
        chat: Chat,
        loaded: Loaded,
        *,
        decoding: Decoding,
        batch_size: int,
        num_workers: int,
        media_seconds: float = 0,
    ) -> None:
        self.chat, self.loaded, self.decoding = chat, loaded, decoding
        self.batch_size, self.num_workers, self.media_seconds = batch_size, num_workers, media_seconds
        self._queue: list[QueuedQuestion] = []
        self._in_flight: dict[Future[list[int]], tuple[QueuedQuestion, float]] = {}  # answer -> question, time sent
        self._refused: set[str] = set()  # ids of items for which the engine refused a question

    def records(self, items: Sequence[Item]) -> Iterator[Record]:
        """Yield one record per item, in any order. The record of an item that cannot be asked has an `error`.

        Exceptions of the model (out of memory, NaN) are raised. Records yielded before them are valid.
        """
        for item in items:
            if item.media is None:
                yield failed(item, item.error)
        groups = by_clip(items)
        num_workers = min(self.num_workers, len(groups))
        clips: DataLoader[Any] = DataLoader(
            list(groups),  # type: ignore[arg-type]  # a list of media is a data set
            batch_size=None,
            collate_fn=partial(read_clip, self.chat.read, self.media_seconds),
            num_workers=num_workers,
            prefetch_factor=CLIPS_AHEAD if num_workers else None,
            worker_init_fn=end_with_parent,
        )
        try:
            yield from self._records_of(groups, clips)
        finally:
            for future in self._in_flight:
                future.cancel()

    def _records_of(self, groups: dict[Media, list[Item]], clips: "DataLoader[Any]") -> Iterator[Record]:
        for group, (clip, seconds) in zip(groups.values(), clips, strict=True):
            if isinstance(clip, str):
                yield from (failed(item, clip, seconds) for item in group)
                continue
            seen = self.chat.encode(clip, read_seconds=seconds)
            for item in group:
                yield from self._ask(item, seen)
                seen = replace(seen, seconds=dict.fromkeys(seen.seconds, 0.0))  # the first item's record has this time
            del seen, clip  # free their memory before waiting for the next clip
        yield from self._answer_queue() if self.chat.engine is None else self._exchange(0)

    def _ask(self, item: Item, seen: EncodedClip) -> Iterator[Record]:
        """Put an item's questions into the queue. If the queue is full, answer it and yield the records."""
        try:
            requests = self.loaded.requests(item, self.chat.processor.template)
            assert len(requests) == len(item.questions), item.id
            assert all(request.media == item.media for request in requests), item.id
            prepared = [self.chat.prepare(request, self.decoding, seen) for request in requests]
        except RequestError as error:
            yield failed(item, f"{item.video}: {error}")
            return
        answers: dict[int, Answer] = {}
        self._queue += [QueuedQuestion(item, number, one, answers) for number, one in enumerate(prepared)]
        if self.chat.engine is not None:
            yield from self._exchange(self.chat.engine.max_in_flight)
        elif len(self._queue) >= self.batch_size * BATCHES_SORTED:
            yield from self._answer_queue()

    def _exchange(self, most: int) -> Iterator[Record]:
        """Send the queued questions to the engine, and yield the records of answers that have arrived.

        Waits until at most `most` questions are unanswered. Raises EngineError after yielding the complete records.
        """
        engine, stopping = self.chat.engine, self.chat.processor.stopping()
        assert engine is not None
        for one in self._queue:
            future = engine.submit(self.chat.embeds(one.prepared), self.decoding, stopping)
            self._in_flight[future] = one, time.perf_counter()
        self._queue.clear()
        failure: EngineError | None = None
        while failure is None and self._in_flight:
            seconds = None if len(self._in_flight) > most else 0
            if not (done := wait(self._in_flight, seconds, FIRST_COMPLETED).done):
                return
            for future in done:
                one, sent = self._in_flight.pop(future)
                try:
                    answer = self.chat.answer_of(one.prepared, future.result(), time.perf_counter() - sent)
                except EngineError as error:
                    failure = error
                    continue
                except RequestError as error:
                    if one.item.id not in self._refused:
                        self._refused.add(one.item.id)
                        yield failed(one.item, f"{one.item.video}: {error}")
                    continue
                if one.item.id not in self._refused:
                    yield from self._record(one, answer)
        if failure is not None:
            raise failure

    def _answer_queue(self) -> Iterator[Record]:
        """Answer the queued questions, and yield the complete records. Sorting by length reduces padding."""
        waiting, self._queue = sorted(self._queue, key=lambda one: one.prepared.length), []
        for first in range(0, len(waiting), self.batch_size):
            batch = waiting[first : first + self.batch_size]
            found = self.chat.complete([one.prepared for one in batch], self.decoding)
            for one, answer in zip(batch, found, strict=True):
                yield from self._record(one, answer)

    def _record(self, one: QueuedQuestion, answer: Answer) -> Iterator[Record]:
        """Store an answer. If it is the last one of its item, yield the item's record."""
        one.answers[one.number] = answer
        if len(one.answers) < len(one.item.questions):
            return
        answers = [one.answers[number] for number in sorted(one.answers)]
        texts = [answer.text for answer in answers]
        times = [round(time, 3) for time in answer.frame_times]
        cut = {kind: sum(getattr(part.cut, kind) for part in answers) for kind in ("visual", "text")}
        spent = {stage: round(sum(part.seconds[stage] for part in answers), 4) for stage in answer.seconds}
        yield {
            **head(one.item),
            "prediction": _one_or_all(texts),
            "frames": {"count": len(times), "times": times},
            "cut_tokens": cut,
            "seconds": spent,
            "error": None,
            **self.loaded.benchmark.score(one.item, texts),
        }


def failed(item: Item, error: str, seconds: float = 0.0) -> Record:
    """Return the record of an item that could not be asked. error: the reason. seconds: time spent on reading."""
    assert error, item.id
    spent = {"read": round(seconds, 4), "encode": 0.0, "answer": 0.0}
    return {**head(item), "prediction": None, "frames": {"count": 0, "times": []}, "seconds": spent, "error": error}


def head(item: Item) -> Record:
    """Return the record's fields about the item. `clip` is [start, end] in seconds, or None for the whole video."""
    record: Record = {"id": item.id, "task": item.task, "video": item.video}
    if item.media is not None:
        record["clip"] = None if item.media.bounds is None else [item.media.start, item.media.end]
    record["question"] = _one_or_all(item.questions)
    if item.candidates:
        record["candidates"] = list(item.candidates)
    if item.groups:
        record["groups"] = {kind: list(names) for kind, names in item.groups.items()}
    return {**record, "answer": item.answer}


def _one_or_all(texts: Sequence[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)
