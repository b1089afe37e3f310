"""A benchmark's items asked, whichever benchmark: records come out one by one, as soon as each is known.

items by clip -> decoded ahead in other processes -> encoded once a clip -> batches across clips -> records

What is written about an item depends on nothing but the item: not on the batch, the workers or the other items.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from stllm.common.errors import UserError
from stllm.common.processes import end_with_parent
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Answer, Media, Request, RequestError
from stllm.conversation.seeing import ClipReader, Prepared, Seen
from stllm.evaluation.items import Benchmark, Item, Record
from stllm.media.clip import Clip
from stllm.media.time_bound import StorageError, read_within

CLIPS_AHEAD = 2  # that each worker holds ready
BATCHES_SORTED = 4  # that wait to be put together by length


@dataclass(frozen=True)
class ClipItems:
    """One clip (file, part, frames) and the items that ask about it, in their order."""

    media: Media
    items: list[Item]


class ReadClip(NamedTuple):
    """A clip that was read, or why it could not be; and the seconds it took."""

    clip: Clip | None
    error: str
    seconds: float


def by_clip(items: Sequence[Item]) -> list[ClipItems]:
    """The items that have a medium, each clip's together, in the order in which clips first come."""
    groups: dict[Media, ClipItems] = {}
    for item in items:
        if item.media is not None:
            groups.setdefault(item.media, ClipItems(item.media, [])).items.append(item)
    return list(groups.values())


def share(items: Sequence[Item], rank: int, num_ranks: int) -> list[Item]:
    """The items of one process: a clip's all with one, numbers of questions as even as that allows. Deterministic."""
    loads = [0] * num_ranks
    mine: set[str] = set()
    groups = [group.items for group in by_clip(items)] + [[item] for item in items if item.media is None]
    for group in sorted(groups, key=lambda group: -sum(len(item.questions) for item in group)):
        lightest = loads.index(min(loads))
        loads[lightest] += sum(len(item.questions) for item in group)
        if lightest == rank:
            mine.update(item.id for item in group)
    return [item for item in items if item.id in mine]


class ClipDataset(Dataset[ReadClip]):
    """Clips by number, read in whichever process asks."""

    def __init__(self, reader: ClipReader, media: Sequence[Media], media_seconds: float) -> None:
        self.reader, self.media, self.media_seconds = reader, media, media_seconds

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, number: int) -> ReadClip:
        """Reads one; what cannot be read is told."""
        start, media = time.perf_counter(), self.media[number]
        try:
            clip = read_within(
                self.media_seconds, partial(self.reader, media), medium=str(media.path), setting="--media-seconds"
            )
            return ReadClip(clip, "", time.perf_counter() - start)
        except StorageError:
            raise
        except UserError as error:
            return ReadClip(None, str(error), time.perf_counter() - start)


@dataclass
class _Asked:
    """An item whose questions wait in the queue, and the answers that have come, by the question's number."""

    item: Item
    answers: dict[int, Answer] = field(default_factory=dict)


class _Waiting(NamedTuple):
    """A question in the queue."""

    asked: _Asked
    number: int
    prepared: Prepared


class Engine:
    """Asks a model. batch_size: questions answered at once; num_workers: processes that decode, 0: this one.

    media_seconds: the limit on reading one medium; 0: none.
    """

    def __init__(
        self,
        chat: Chat,
        benchmark: Benchmark,
        *,
        decoding: Decoding,
        batch_size: int,
        num_workers: int,
        media_seconds: float = 0,
    ) -> None:
        self.chat, self.benchmark, self.decoding = chat, benchmark, decoding
        self.batch_size, self.num_workers, self.media_seconds = batch_size, num_workers, media_seconds
        self._queue: list[_Waiting] = []

    def records(self, items: Sequence[Item]) -> Iterator[Record]:
        """A record an item, in no promised order. An item that cannot be asked gives one with `error`.

        Raises what the model raises (out of memory, a prompt's NaN): what was yielded before stays true.
        """
        for item in items:
            if item.media is None:
                yield failed(item, item.error)
        groups = by_clip(items)
        for group, read in zip(groups, self._loader([group.media for group in groups]), strict=True):
            if read.clip is None:
                yield from (failed(item, read.error, read.seconds) for item in group.items)
                continue
            seen = self.chat.encode(read.clip, read_seconds=read.seconds)
            for item in group.items:
                yield from self._ask(item, seen)
                seen = replace(seen, seconds=dict.fromkeys(seen.seconds, 0.0))  # spent on the first item
            del seen, read  # while the next clip is waited for
        yield from self._answer_queue()

    def _loader(self, media: Sequence[Media]) -> DataLoader[ReadClip]:
        num_workers = min(self.num_workers, len(media))
        more: dict[str, Any] = {"prefetch_factor": CLIPS_AHEAD} if num_workers else {}
        return DataLoader(
            ClipDataset(self.chat.read, media, self.media_seconds),
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=end_with_parent,
            **more,
        )

    def _ask(self, item: Item, seen: Seen) -> Iterator[Record]:
        """Puts an item's questions into the queue, and gives the records of a full one."""
        try:
            requests = self._requests(item)
            prepared = [self.chat.prepare(request, self.decoding, seen) for request in requests]
        except RequestError as error:
            yield failed(item, f"{item.video}: {error}")
            return
        asked = _Asked(item)
        self._queue += [_Waiting(asked, number, one) for number, one in enumerate(prepared)]
        if len(self._queue) >= self.batch_size * BATCHES_SORTED:
            yield from self._answer_queue()

    def _requests(self, item: Item) -> tuple[Request, ...]:
        requests = self.benchmark.requests(item, self.chat.processor.template)
        assert len(requests) == len(item.questions), item.id
        assert all(request.media == item.media for request in requests), item.id
        return requests

    def _answer_queue(self) -> Iterator[Record]:
        """Answers what waits in batches of like lengths, which need little padding."""
        waiting, self._queue = sorted(self._queue, key=lambda one: one.prepared.length), []
        for first in range(0, len(waiting), self.batch_size):
            yield from self._answer(waiting[first : first + self.batch_size])

    def _answer(self, batch: Sequence[_Waiting]) -> Iterator[Record]:
        """Answers a batch in one generation, and gives the records of the items that are complete."""
        answers = self.chat.complete([one.prepared for one in batch], self.decoding)
        for (asked, number, _), answer in zip(batch, answers, strict=True):
            asked.answers[number] = answer
            if len(asked.answers) == len(asked.item.questions):
                yield self._record(asked)

    def _record(self, asked: _Asked) -> Record:
        item = asked.item
        answers = [asked.answers[number] for number in range(len(item.questions))]
        texts = [answer.text for answer in answers]
        times = [round(time, 3) for time in answers[0].frame_times]
        stages = answers[0].seconds
        return {
            **head(item),
            "prediction": _one_or_all(texts),
            "frames": {"count": len(times), "times": times},
            "cut_tokens": {kind: sum(getattr(answer.cut, kind) for answer in answers) for kind in ("visual", "text")},
            "seconds": {stage: round(sum(answer.seconds[stage] for answer in answers), 4) for stage in stages},
            "error": None,
            **self.benchmark.fields(item, texts),
        }


def failed(item: Item, error: str, seconds: float = 0.0) -> Record:
    """The record of an item that could not be asked."""
    assert error, item.id
    spent = {"read": round(seconds, 4), "encode": 0.0, "answer": 0.0}
    return {**head(item), "prediction": None, "frames": {"count": 0, "times": []}, "seconds": spent, "error": error}


def head(item: Item) -> Record:
    """What a record says of the item itself. clip: seconds of the part that is meant, None for the whole."""
    named: Record = {"id": item.id, "task": item.task, "video": item.video}
    if item.media is not None:
        named["clip"] = None if item.media.bounds is None else [item.media.start, item.media.end]
    options = {"candidates": list(item.candidates)} if item.candidates else {}
    return {**named, "question": _one_or_all(item.questions), **options, "answer": item.answer}


def _one_or_all(texts: Sequence[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)
