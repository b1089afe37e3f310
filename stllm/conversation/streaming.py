"""Batched generation for questions from several threads, and streaming of their answers.

A generation starts at once if none is running. Questions that arrive while it runs are batched for the next one if
their settings are equal. After a generation of several questions, the next one is delayed briefly, because clients
often ask again right after an answer. transformers' continuous batching is not used: as of 5.24 it takes token ids, not
embeddings. Each caller receives its own answer, at once or token by token, and may leave while the other answers are
still being generated. Letters in shapes: B questions, A new tokens.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from queue import Empty, SimpleQueue
from threading import Condition, Event, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from stllm.common.errors import out_of_memory
from stllm.conversation.decoding import Decoding, NaNWatch, NoNumbersError
from stllm.conversation.requests import Prepared
from stllm.processors.prompts import PromptProcessor

T = TypeVar("T")

MAX_ROWS = 16  # sequences per generation (questions times beams); our choice: 8 GB of keys and values for a 7B model
TICK = 0.1  # seconds between two checks whether the caller still waits for its answer
# Delay for clients that ask again: this share of the last generation's time, but at most PAUSE seconds. Our choice.
PAUSE_PART, PAUSE = 0.5, 0.05


class Batches:
    """Queue of questions for the language model, and the thread that answers them in batches. Thread-safe.

    generate: function that answers prepared questions with the same settings: (prepared, decoding, watch, **arguments
    of transformers' `generate`) -> token ids, (B, A). dtype: the scores' type.
    """

    def __init__(self, generate: Callable[..., Tensor], processor: PromptProcessor, dtype: torch.dtype) -> None:
        self.max_rows = MAX_ROWS
        self._generate, self._processor, self._dtype = generate, processor, dtype
        self._waiting: list[_Row] = []
        self._runs = False  # whether the answering thread runs
        self._lock = Condition()  # notified when a question arrives
        self._last: tuple[float, int] = 0.0, 0  # last generation: its seconds, and how many questions were there

    def complete(self, prepared: Sequence[Prepared], decoding: Decoding, stop: Event) -> list[list[int]]:
        """Return the token ids of each answer. Raises UserError.

        Once `stop` is set, the answers end with the tokens so far; with several beams, they are empty.
        """
        rows = [_Row(one, decoding, stop, self._is_whole) for one in prepared]
        try:
            self._begin(rows)
            return [list(self._tokens(row)) for row in rows]
        finally:
            for row in rows:
                self._leave(row)

    def stream(self, prepared: Prepared, decoding: Decoding, stop: Event) -> Generator[str, None, list[int]]:
        """Yield the answer's text piece by piece, and return its token ids. Raises UserError.

        Setting `stop`, or closing the generator, ends the answer. Other answers of the same batch continue.
        """
        row = _Row(prepared, decoding, stop, self._is_whole, streams=True)
        text, ids = _TextDecoder(self._processor), []
        try:
            self._begin([row])
            for token in self._tokens(row):
                ids.append(token)
                text.put(torch.tensor([token]))
                yield from text.take()
            text.end()
            yield from text.take()
            return ids
        finally:
            self._leave(row)

    def _begin(self, rows: "Sequence[_Row]") -> None:
        with self._lock:
            self._waiting += rows
            self._lock.notify_all()
            begins, self._runs = not self._runs, True
        if begins:
            Thread(target=self._work, name="answers", daemon=True).start()

    def _tokens(self, row: "_Row") -> Iterator[int]:
        """Yield the token ids of one question's answer up to its end."""
        while True:
            try:
                news = row.news.get(timeout=TICK)
            except Empty:
                if not row.is_wanted():
                    self._forget(row)
                continue
            if news is None:
                return
            if isinstance(news, BaseException):
                raise news
            yield from news

    def _is_whole(self, ids: list[int], decoding: Decoding) -> bool:
        """Check whether an answer is complete: it ends with EOS or the end mark, or has the maximum length."""
        mark = self._processor.end_sym
        # Tokens have at least one character, except for a few special ones; so these last ids cover the whole mark.
        tail = self._processor.tokenizer.decode(ids[-len(mark) - 2 :])
        return ids[-1] == self._processor.eos_token_id or mark in tail or len(ids) == decoding.max_new_tokens

    def _leave(self, row: "_Row") -> None:
        """Remove a question whose caller no longer waits, and wait until the model has stopped generating for it."""
        row.left = True
        self._forget(row)
        if row.is_alone or not row.is_done:
            row.ended.wait()

    def _forget(self, row: "_Row") -> None:
        with self._lock:
            if row in self._waiting:
                self._waiting.remove(row)
                row.end()

    # ---- the thread that answers ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while rows := self._next():
            start = time.perf_counter()
            self._answer(rows)
            with self._lock:  # a question that came after the first answer may be from the same client, so not counted
                first = min(row.done_at for row in rows)
                self._last = time.perf_counter() - start, len(rows) + sum(row.came_at < first for row in self._waiting)

    def _next(self) -> "list[_Row]":
        """Take the first waiting question and as many others with the same settings as fit into a batch."""
        with self._lock:
            seconds, before = self._last
            if before > 1:
                self._lock.wait_for(
                    lambda: len(self._waiting) >= min(before, self.max_rows), min(PAUSE, PAUSE_PART * seconds)
                )
            if not self._waiting:
                self._runs, self._last = False, (0.0, 0)
                return []
            decoding = self._waiting[0].decoding
            count = max(1, self.max_rows // decoding.num_beams)
            rows = [row for row in self._waiting if row.decoding == decoding][:count]
            self._waiting = [row for row in self._waiting if row not in rows]
            return rows

    def _answer(self, rows: "Sequence[_Row]") -> None:
        """Answer questions in one generation. If it fails before the first token, try again with each half.

        The reason for a failure may be too little memory, which also limits later batches, or one faulty question.
        """
        prepared, decoding = [row.prepared for row in rows], rows[0].decoding
        rows[0].is_alone = len(rows) == 1
        watch = NaNWatch(self._dtype)
        teller = _Teller(rows, watch)
        more: dict[str, Any] = {"watch": watch, "stopping_criteria": StoppingCriteriaList([_StopRows(rows)])}
        if decoding.num_beams == 1:
            more["streamer"] = teller
        try:
            ids = self._generate(prepared, decoding, **more)
            if decoding.num_beams > 1:
                for row, answer in zip(rows, ids.tolist(), strict=True):
                    for token in answer:
                        row.hear(token)
            for row in rows:
                row.end()
            return
        except BaseException as error:  # passed to the callers, which raise it
            if teller.has_told or len(rows) == 1:
                bad = watch.found(len(rows)) if isinstance(error, NoNumbersError) else [True] * len(rows)
                for row, is_bad in zip(rows, bad, strict=True):
                    row.end(error if is_bad else None)
                return
            if out_of_memory(error):
                self.max_rows = max(1, len(rows) * decoding.num_beams // 2)
        half = len(rows) // 2  # outside `except`, so that the error no longer keeps the failed generation's memory
        self._answer(rows[:half])
        self._answer(rows[half:])


class _Row:
    """A question in the queue or in a batch. In a batch it takes one row, or with beam search one row per beam.

    news: queue from which the caller reads lists of token ids, then None or an error. is_whole: function that checks
    whether token ids are a complete answer. streams: True to put each token into `news` at once.
    """

    def __init__(
        self,
        prepared: Prepared,
        decoding: Decoding,
        stop: Event,
        is_whole: Callable[[list[int], Decoding], bool],
        *,
        streams: bool = False,
    ) -> None:
        self.prepared, self.decoding = prepared, decoding
        self.news: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self.left = False  # whether the caller has left
        self.came_at, self.done_at = time.perf_counter(), math.inf
        self.is_alone = False  # True if no other question is in its batch
        self.ended = Event()  # set when its generation no longer adds tokens to it
        self._ids: list[int] = []
        self._stop, self._is_whole, self._streams = stop, is_whole, streams

    def is_wanted(self) -> bool:
        """Check whether the caller still waits for the rest of the answer."""
        return not (self.is_done or self.left or self._stop.is_set())

    @property
    def is_done(self) -> bool:
        """Check whether the answer is complete, or has failed."""
        return self.done_at < math.inf

    def hear(self, token: int) -> None:
        """Add the next token. It is passed on at once if the answer is streamed, else with the complete answer."""
        if self.is_done:
            return
        self._ids.append(token)
        if self._streams:
            self.news.put([token])
        if self._is_whole(self._ids, self.decoding):
            self.finish()

    def finish(self, error: BaseException | None = None) -> None:
        """Tell the caller that the answer has ended, or failed with `error`. A second call does nothing."""
        if self.is_done:
            return
        self.done_at = time.perf_counter()
        if not self._streams:
            self.news.put(self._ids)
        self.news.put(error)

    def end(self, error: BaseException | None = None) -> None:
        """Call `finish`, and set the event `ended`: this generation adds no more tokens to the answer."""
        self.finish(error)
        self.ended.set()


class _Teller(BaseStreamer):
    """Streamer for `generate` that passes each row its next token or an error. transformers' streamers take one row."""

    def __init__(self, rows: Sequence[_Row], watch: NaNWatch) -> None:
        self.rows, self.watch = rows, watch
        self.has_told = False

    def put(self, value: Tensor) -> None:
        """Pass on the tokens of one step, (B,).

        The first call is for the prompts' ids. It has none, because the prompts are passed as embeddings.
        """
        if value.numel():
            self.has_told = True
            for row, token, is_bad in zip(self.rows, value.tolist(), self.watch.found(len(value)), strict=True):
                if is_bad:
                    row.finish(self.watch.error)
                else:
                    row.hear(token)

    def end(self) -> None:
        """Do nothing: `_answer` ends the rows."""


class _StopRows(StoppingCriteria):
    """Stopping criterion that ends the rows whose callers no longer wait."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        stopped = [not row.is_wanted() for row in self.rows]
        if not all(stopped):  # otherwise the generation ends now, and `_answer` ends all rows
            for row, is_stopped in zip(self.rows, stopped, strict=True):
                if is_stopped and not row.ended.is_set():
                    row.end()
        beams = len(input_ids) // len(self.rows)
        return torch.tensor(stopped, device=input_ids.device).repeat_interleave(beams)


class _TextDecoder(TextStreamer):
    """Decoder from token ids to pieces of text. `take` returns what transformers' TextStreamer would print."""

    def __init__(self, processor: PromptProcessor) -> None:
        super().__init__(processor.tokenizer, skip_special_tokens=True)
        self._pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Store a piece of text. TextStreamer calls this when the piece can no longer change."""
        self._pieces.append(text)

    def take(self) -> list[str]:
        """Return the pieces stored since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces


class AnswerStream:
    """Streaming version of `PromptProcessor.clean`, which cuts a text at the end mark and strips it.

    Text that may be the beginning of the end mark, or trailing space, is held back until the next piece decides.
    """

    def __init__(self, end_sym: str) -> None:
        self.end_sym = end_sym
        self._text = ""
        self._shown = 0
        self.ended = False

    def feed(self, piece: str) -> str:
        """Add a piece, and return the further text that is now certainly part of the answer."""
        self._text = (self._text + piece).lstrip() if not self._shown else self._text + piece
        before, mark, _ = self._text.partition(self.end_sym)
        self.ended = bool(mark)
        # number of characters at the end that may be the beginning of the end mark
        lengths = range(len(self.end_sym) - 1, 0, -1)
        held = 0 if mark else next((n for n in lengths if before.endswith(self.end_sym[:n])), 0)
        certain = before[: len(before) - held].rstrip()
        new = certain[self._shown :]
        self._shown += len(new)
        return new

    def close(self) -> str:
        """Return the text still held back: the text has ended, so it is not an end mark."""
        rest = self._text.split(self.end_sym)[0].rstrip()[self._shown :]
        self._shown += len(rest)
        return rest


def clean_pieces(pieces: Generator[str, None, T], end_sym: str) -> Generator[str, None, T]:
    """Yield the cleaned answer from pieces of generated text. Returns what the generator `pieces` returns."""
    answer = AnswerStream(end_sym)
    with closing(pieces):
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                if rest := answer.close():
                    yield rest
                value: T = end.value
                return value
            if not answer.ended and (new := answer.feed(piece)):
                yield new
