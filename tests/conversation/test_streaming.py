"""The stream's pieces join to the finished answer, and what fails in the thread fails for the listener."""

from time import sleep
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stllm.conversation.streaming import AnswerStream, stream_answer


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


def test_an_error_in_generation_reaches_the_listener() -> None:
    def generate(**_: object) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(stream_answer(generate, tokenizer=None, end_sym="###"))  # type: ignore[arg-type]


def test_what_generation_returns_is_waited_for() -> None:
    """transformers' `generate` ends its streamer before it returns."""
    ids = torch.tensor([[1, 2, 3]])

    def generate(streamer: Any, **_: object) -> torch.Tensor:
        streamer.end()
        sleep(0.2)
        return ids

    stream = stream_answer(generate, tokenizer=None, end_sym="###")  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as end:
        while True:
            next(stream)
    assert end.value.value is ids
