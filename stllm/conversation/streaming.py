"""An answer as it is written: transformers' iterator streamer, with the end mark and outer spaces held back."""

from collections.abc import Callable, Generator
from contextlib import closing
from threading import Event, Thread
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

from stllm.conversation.decoding import StopWhen

T = TypeVar("T")


class AnswerStream:
    """Cuts a growing text as `PromptProcessor.clean` cuts a finished one, so that the pieces join to the answer.

    What may still turn out to be the end mark, or space at the very end, waits until the next piece decides.
    """

    def __init__(self, end_sym: str) -> None:
        self.end_sym = end_sym
        self._text = ""
        self._shown = 0
        self.ended = False

    def feed(self, piece: str) -> str:
        """Return the text that `piece` makes certain."""
        self._text = (self._text + piece).lstrip() if not self._shown else self._text + piece
        before, mark, _ = self._text.partition(self.end_sym)
        self.ended = bool(mark)
        # Characters at the end that may be the beginning of the end mark.
        lengths = range(len(self.end_sym) - 1, 0, -1)
        held = 0 if mark else next((n for n in lengths if before.endswith(self.end_sym[:n])), 0)
        certain = before[: len(before) - held].rstrip()
        new = certain[self._shown :]
        self._shown += len(new)
        return new

    def close(self) -> str:
        """Return the rest, which turned out not to be the end mark."""
        rest = self._text.split(self.end_sym)[0].rstrip()[self._shown :]
        self._shown += len(rest)
        return rest


def stream_answer(
    generate: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerBase,
    end_sym: str,
    stop: Event | None = None,
) -> Generator[str, None, Tensor]:
    """Runs `generate(streamer=..., stopping_criteria=...)` in a thread and yields the answer's text piece by piece.

    Closing the iterator, or setting `stop` from any thread, ends the generation at its next token. Returns what
    `generate` returns, and raises what it raises.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = Event() if stop is None else stop
    failure: list[BaseException] = []
    result: list[Tensor] = []

    def work() -> None:
        try:
            stopping = StoppingCriteriaList([StopWhen(stop)])
            result.append(generate(streamer=streamer, stopping_criteria=stopping))
        except BaseException as error:  # handed to the listener, who raises it
            failure.append(error)
        finally:
            streamer.end()

    def pieces() -> Generator[str, None, Tensor]:
        yield from streamer
        thread.join()  # transformers ends the streamer shortly before `generate` returns
        if failure:
            raise failure[0]
        return result[0]

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        return (yield from clean_pieces(pieces(), end_sym))
    finally:
        stop.set()
        thread.join()


def clean_pieces(pieces: Generator[str, None, T], end_sym: str) -> Generator[str, None, T]:
    """Yield the answer in these pieces of generated text, and return what they return."""
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
