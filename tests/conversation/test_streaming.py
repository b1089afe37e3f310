"""Streaming and batching: pieces join to the answer, and batched answers equal single ones."""

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stllm.conversation import streaming
from stllm.conversation.chat import FOLDER, Chat, find_examples, load_chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Media, Prepared, Request
from stllm.conversation.streaming import AnswerStream, Batches
from stllm.processors.templates import Turn
from tests.conversation.test_chat import new_chat
from tests.helpers.serving import wait_until


@given(pieces=st.lists(st.text(alphabet="ab# \n", max_size=4), max_size=12))
def test_pieces_join_to_the_cleaned_text(pieces: list[str]) -> None:
    stream = AnswerStream("###")
    shown = "".join(stream.feed(piece) for piece in pieces if not stream.ended) + stream.close()
    assert shown == "".join(pieces).split("###")[0].strip()


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    stream = AnswerStream("###")
    assert [stream.feed(piece) for piece in ("  A", " dog", " #", "1", "##", "# more")] == [
        "A",
        " dog",
        "",
        " #1",
        "",
        "",
    ]
    assert stream.ended


# ---- answers written together ---------------------------------------------------------------------------------------

GREEDY = Decoding(num_beams=1, max_new_tokens=16)


class Recorded:
    """A chat that records the questions of each generation. fail: function that may raise for some of them."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.generations: list[tuple[list[str], Decoding]] = []
        self.fail: Callable[[Sequence[Prepared]], None] = lambda prepared: None
        self.batches = Batches(self._generate, chat.processor, torch.float32)

    def _generate(self, prepared: Sequence[Prepared], decoding: Decoding, **more: Any) -> Tensor:
        self.generations.append(([one.request.turns[0].question for one in prepared], decoding))
        self.fail(prepared)
        return self.chat._generate(prepared, decoding, **more)

    def __call__(self, asked: Sequence[tuple[Prepared, Decoding]], stops: Sequence[Event] = ()) -> list[Any]:
        """Ask while a generation runs, so that questions are batched. Return each answer's ids, or an error's text."""
        stops = stops or [Event() for _ in asked]
        with ThreadPoolExecutor(len(asked)) as threads:
            with self.chat.lock:
                futures = []
                for (prepared, decoding), stop in zip(asked, stops, strict=True):
                    futures.append(threads.submit(self._one, prepared, decoding, stop))
                    wait_until(
                        lambda: len(self.batches._waiting) == max(0, len(futures) - 1) and self.generations != []
                    )
            return [str(future.exception()) if future.exception() else future.result() for future in futures]

    def _one(self, prepared: Prepared, decoding: Decoding, stop: Event) -> list[int]:
        if decoding.num_beams > 1:
            return self.batches.complete([prepared], decoding, stop)[0]
        ids: list[int] = []

        def keep_ids() -> Generator[str, None, None]:
            ids.extend((yield from self.batches.stream(prepared, decoding, stop)))

        text = "".join(keep_ids())
        assert text == self.chat.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return ids


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def prepared(chat: Chat) -> list[Prepared]:
    """Return prompts of several lengths, with and without video."""
    requests = [Request((Turn(question),), Media(str(path))) for path, question in find_examples()[:5]]
    return [chat.prepare(request) for request in [*requests, Request((Turn("What is red?"),))]]


@pytest.fixture
def recorded(chat: Chat) -> Recorded:
    return Recorded(chat)


@pytest.mark.parametrize("decoding", [GREEDY, replace(GREEDY, num_beams=3, max_new_tokens=12)])
def test_batched_questions_get_the_same_answers_as_single_ones(recorded: Recorded, prepared, decoding) -> None:
    alone = [recorded.chat._generate([one], decoding)[0].tolist() for one in prepared]
    answers = recorded([(one, decoding) for one in prepared])
    assert answers == alone
    assert [len(questions) for questions, _ in recorded.generations] == [1, len(prepared) - 1]


def test_questions_with_different_settings_are_not_batched(recorded: Recorded, prepared: list[Prepared]) -> None:
    kinds = [GREEDY, replace(GREEDY, max_new_tokens=2), replace(GREEDY, num_beams=2), replace(GREEDY, temperature=0.5)]
    asked = [(one, kind) for one in prepared for kind in kinds]
    answers = recorded(asked)
    for (one, kind), ids in zip(asked, answers, strict=True):
        if kind.temperature == 0:
            assert ids == recorded.chat._generate([one], kind)[0].tolist()
    assert [decoding for _, decoding in recorded.generations] == [GREEDY, *kinds[1:], GREEDY]
    assert [len(questions) for questions, _ in recorded.generations] == [1, 6, 6, 6, 5]


def test_a_batch_has_at_most_max_rows(recorded: Recorded, prepared: list[Prepared]) -> None:
    recorded.batches.max_rows = 2
    recorded([(one, GREEDY) for one in prepared])
    assert [len(questions) for questions, _ in recorded.generations] == [1, 2, 2, 1]


@pytest.mark.parametrize("beams", [1, 3])
def test_leaving_ends_only_the_callers_own_answer(chat: Chat, prepared: list[Prepared], beams: int) -> None:
    """One caller leaves during the generation, which continues for the others."""
    decoding = replace(GREEDY, num_beams=beams, max_new_tokens=12)
    recorded, stops = Recorded(chat), [Event() for _ in prepared]
    alone = [chat._generate([one], decoding)[0].tolist() for one in prepared]

    def leave(*_: Any) -> None:
        if len(recorded.generations) == 2:
            stops[3].set()

    hook = chat.model.language_model.get_decoder().register_forward_pre_hook(leave)
    try:
        answers = recorded([(one, decoding) for one in prepared], stops)
    finally:
        hook.remove()
    assert answers[:3] + answers[4:] == alone[:3] + alone[4:]
    assert len(answers[3]) < len(alone[3])


def test_a_question_whose_caller_left_the_queue_is_not_answered(recorded: Recorded, prepared: list[Prepared]) -> None:
    stop = Event()
    with recorded.chat.lock, ThreadPoolExecutor(2) as threads:
        first = threads.submit(recorded._one, prepared[0], GREEDY, Event())
        wait_until(lambda: recorded.generations != [])
        second = threads.submit(recorded._one, prepared[1], GREEDY, stop)
        wait_until(lambda: recorded.batches._waiting != [])
        stop.set()
        assert second.result(30) == []
        recorded.chat.lock.release()
        assert first.result(30) != []
        recorded.chat.lock.acquire()
    assert len(recorded.generations) == 1


def test_a_stream_that_is_closed_ends_its_generation(chat: Chat, prepared: list[Prepared]) -> None:
    batches = Batches(chat._generate, chat.processor, torch.float32)
    pieces = batches.stream(prepared[0], GREEDY, Event())
    next(pieces)
    pieces.close()
    assert not chat.lock.locked()


def test_a_batch_that_runs_out_of_memory_is_split(recorded: Recorded, prepared: list[Prepared]) -> None:
    def fail(asked: Sequence[Prepared]) -> None:
        if len(asked) > 2:
            raise MemoryError

    recorded.fail = fail
    answers = recorded([(one, GREEDY) for one in prepared])
    assert answers == [recorded.chat._generate([one], GREEDY)[0].tolist() for one in prepared]
    assert [len(questions) for questions, _ in recorded.generations] == [1, 5, 2, 3, 1, 2]
    assert recorded.batches.max_rows == 1


def test_an_error_before_the_first_token_reaches_only_its_caller(recorded: Recorded, prepared) -> None:
    def fail(asked: Sequence[Prepared]) -> None:
        if any(one is prepared[2] for one in asked):
            raise RuntimeError("broken")

    recorded.fail = fail
    answers = recorded([(one, GREEDY) for one in prepared])
    assert answers.pop(2) == "broken"
    alone = [recorded.chat._generate([one], GREEDY)[0].tolist() for one in prepared if one is not prepared[2]]
    assert answers == alone


def test_nan_scores_fail_only_their_row(recorded: Recorded, prepared: list[Prepared]) -> None:
    broken = replace(prepared[2], visual=torch.full_like(prepared[2].visual, torch.nan))  # type: ignore[arg-type]
    asked = [*prepared[:2], broken, *prepared[3:]]
    answers = recorded([(one, GREEDY) for one in asked])
    assert [len(questions) for questions, _ in recorded.generations] == [1, 5]
    alone = [recorded.chat._generate([one], GREEDY)[0].tolist() for one in asked if one is not broken]
    assert [ids for ids in answers if not isinstance(ids, str)] == alone
    assert "scores are no numbers" in answers[2]


def test_a_batch_waits_for_clients_that_ask_again_but_not_for_a_single_one(
    recorded: Recorded, prepared, monkeypatch
) -> None:
    monkeypatch.setattr(streaming, "PAUSE_PART", 1e9)
    monkeypatch.setattr(streaming, "PAUSE", 3600)
    alone = [recorded.chat._generate([one], GREEDY)[0].tolist() for one in prepared]
    for _ in range(2):
        assert recorded._one(prepared[0], GREEDY, Event()) == alone[0]
    recorded.generations.clear()

    def pause_after_the_second(_: Sequence[Prepared]) -> None:
        monkeypatch.setattr(streaming, "PAUSE", 3600 if len(recorded.generations) == 2 else 0)

    def sizes() -> list[int]:
        return [len(questions) for questions, _ in recorded.generations]

    recorded.fail = pause_after_the_second
    assert recorded([(one, GREEDY) for one in prepared[:4]]) == alone[:4]
    with ThreadPoolExecutor(3) as threads:
        again = [threads.submit(recorded._one, one, GREEDY, Event()) for one in prepared[:2]]
        wait_until(lambda: len(recorded.batches._waiting) == 2)
        time.sleep(0.2)
        assert sizes() == [1, 3]
        again.append(threads.submit(recorded._one, prepared[2], GREEDY, Event()))
        assert [one.result(30) for one in again] == alone[:3]
    assert sizes() == [1, 3, 3]


def test_the_qformer_batches_questions_of_several_threads(monkeypatch) -> None:
    chat = new_chat("instructblip")
    requests = [Request((Turn(question),), Media(str(path))) for path, question in find_examples()[:5]]
    expected = [chat.prepare(request).visual for request in requests]
    sizes, frame_tokens, go = [], chat.model.frame_tokens, Event()

    def counted(encoded: Tensor, **texts: Tensor) -> Tensor:
        sizes.append(len(encoded))
        assert go.wait(30)
        return frame_tokens(encoded, **texts)

    monkeypatch.setattr(chat.model, "frame_tokens", counted)
    with ThreadPoolExecutor(5) as threads:
        found = [threads.submit(chat.prepare, requests[0])]
        wait_until(lambda: sizes == [1])
        found += [threads.submit(chat.prepare, request) for request in requests[1:]]
        wait_until(lambda: chat._question_tokens._waiting.qsize() == 4)
        go.set()
        for one, visual in zip(found, expected, strict=True):
            torch.testing.assert_close(one.result(30).visual, visual)
    assert sizes == [1, 4]
