"""Asking: each clip is read and encoded once, items are divided evenly, and memory does not grow."""

import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.common.errors import UserError
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Answer, Media, Prepared, Request
from stllm.evaluation.asking import BATCHES_SORTED, Asker, by_clip, share
from stllm.evaluation.benchmarks.base import Item, Record
from stllm.processors.templates import Turn
from tests.conversation.test_chat import new_chat
from tests.helpers.benchmarks import asking
from tests.helpers.videos import write_video

GREEDY = Decoding(num_beams=1, max_new_tokens=6)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    return [str(write_video(folder / f"{n}.mp4", num_frames=12 + 5 * n, size=(64, 48))) for n in range(3)]


def item(number: int, media: Media | None, *more: str) -> Item:
    questions = (f"what is {number}", *more)
    return Item(str(number), "", "v", media, questions, "it", error="" if media else "v: it is not there")


def asker(items: Sequence[Item], batch_size: int = 3, num_workers: int = 0, **options: Any) -> Asker:
    chat = new_chat(cache_bytes=0, **options)
    return Asker(chat, asking(items), decoding=GREEDY, batch_size=batch_size, num_workers=num_workers)


def asked(clips: Sequence[str]) -> list[Item]:
    """Return items that alternate between clips: also one with two questions, one without a medium, one with bounds."""
    items = [item(number, Media(clips[number % 3])) for number in range(9)]
    items.append(item(9, Media(clips[0]), "and then"))  # the second is the shorter one
    items.append(item(10, None))
    items.append(item(11, Media(clips[1], start=0.1, end=0.5, sampling="segment", num_frames=4)))
    return items


def without_seconds(records: Sequence[Record]) -> dict[str, Record]:
    return {record["id"]: {key: value for key, value in record.items() if key != "seconds"} for record in records}


def test_each_clip_is_read_and_encoded_once(clips: list[str]) -> None:
    items = asked(clips)
    run = asker(items)
    read: Counter[Media] = Counter()
    encoded: list[int] = []
    reader = run.chat.read
    run.chat.read = lambda media: read.update([media]) or reader(media)  # type: ignore[assignment]
    run.chat.model.vision_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    records = list(run.records(items))
    assert len(records) == len(items)
    assert set(read.values()) == {1} and len(read) == 4  # three files, and a part of one
    assert len(encoded) == 4


@pytest.fixture(scope="module")
def alone(clips: list[str]) -> dict[str, Record]:
    """Return the record of each item when it is the only one asked."""
    items = asked(clips)
    run = asker(items, batch_size=1)
    return without_seconds([record for one in items for record in run.records([one])])


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 2), (100, 1)])
def test_records_do_not_depend_on_batches_or_workers(
    clips: list[str], alone: dict[str, Record], batch_size: int, num_workers: int
) -> None:
    items = asked(clips)
    found = without_seconds(list(asker(items, batch_size, num_workers).records(items)))
    assert found == alone
    assert len({str(record["prediction"]) for record in found.values()}) > 6


def test_the_fields_of_a_record(clips: list[str]) -> None:
    items = asked(clips)
    found = {record["id"]: record for record in asker(items).records(items)}
    two, missing = found["9"], found["10"]
    assert two["question"] == ["what is 9", "and then"] and len(two["prediction"]) == 2
    assert two["frames"]["count"] == len(two["frames"]["times"]) == 6
    assert two["right"] is False and two["error"] is None
    assert missing["error"] == "v: it is not there" and missing["prediction"] is None and "right" not in missing
    assert sum(record["seconds"]["read"] > 0 for record in found.values()) == 4  # once a clip


def test_an_exception_of_the_model_ends_the_run(clips: list[str]) -> None:
    items = asked(clips)
    run = asker(items)
    with torch.no_grad():
        run.chat.model.projection.bias[0] = float("nan")
    records = run.records(items)
    assert next(records)["error"] == "v: it is not there"
    with pytest.raises(UserError, match="visual tokens are no numbers"):
        next(records)


def test_memory_of_encoded_clips_is_freed(clips: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the current clip and the visual tokens of queued questions are kept in memory."""
    many = [item(number, Media(clips[number % 3], num_frames=1 + number)) for number in range(24)]
    run = asker(many, batch_size=4)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    encode = run.chat.encode
    most = 0

    def counting(clip: Any, **options: Any) -> Any:
        nonlocal most
        seen = encode(clip, **options)
        alive.add(seen.encoded)
        most = max(most, len(alive))
        return seen

    monkeypatch.setattr(run.chat, "encode", counting)
    for _ in run.records(many):
        assert len(run._queue) < 4 * BATCHES_SORTED
    assert most <= 2
    assert run.chat.cache.num_bytes == 0 and not run.chat._known


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_items_are_divided_evenly_and_by_clip(num_ranks: int) -> None:
    media = [Media(f"{number}.mp4") for number in range(10)]
    items = [item(number, media[number % 10 if number < 40 else 0]) for number in range(60)]
    items += [item(100 + number, None) for number in range(5)]
    shares = [share(items, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(one.id for part in shares for one in part) == sorted(one.id for one in items)
    for media_ in by_clip(items):
        assert sum(any(one.media == media_ for one in part) for part in shares) == 1
    loads = [len(part) for part in shares]
    largest = max(map(len, by_clip(items).values()))
    assert max(loads) <= max(largest, -(-len(items) // num_ranks) + 4)
    assert shares == [share(list(items), rank, num_ranks) for rank in range(num_ranks)]
    order = {one.id: place for place, one in enumerate(items)}
    assert all([order[one.id] for one in part] == sorted(order[one.id] for one in part) for part in shares)


def test_shares_are_balanced_by_questions_not_items() -> None:
    items = [item(0, Media("a"), "b", "c", "d"), *(item(number, Media(f"{number}")) for number in range(1, 5))]
    assert [one.id for one in share(items, 0, 2)] == ["0"]


def test_no_items_no_records(tmp_path: Path) -> None:
    assert list(asker([]).records([])) == []


def test_batches_have_similar_lengths_and_answers_keep_their_order(
    clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [item(number, Media(clips[0]), "what " * (number % 5 + 1)) for number in range(8)]
    run = asker(items, batch_size=4)
    lengths: list[list[int]] = []
    complete = run.chat.complete

    def counting(prepared: Sequence[Prepared], decoding: Decoding) -> list[Answer]:
        lengths.append([one.length for one in prepared])
        return complete(prepared, decoding)

    monkeypatch.setattr(run.chat, "complete", counting)
    records = list(run.records(items))
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat) and [len(batch) for batch in lengths] == [4, 4, 4, 4]
    for record in records:
        first, second = (
            Request((Turn(question),), media=items[0].media) for question in items[int(record["id"])].questions
        )
        assert record["prediction"] == [complete([run.chat.prepare(one)], GREEDY)[0].text for one in (first, second)]
