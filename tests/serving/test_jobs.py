"""The model's thread: jobs in order, their news and failures handed over, listeners who leave without waiting."""

from collections.abc import Generator
from threading import Event

import pytest
from stllm.web.model_thread import ModelThread

from stllm.web import model_thread

PATIENCE = 30.0  # seconds; only a test that fails waits so long


def test_news_come_in_order_and_the_end_is_the_end() -> None:
    assert [item for item in ModelThread().iterate(lambda _: counted(3)) if item is not None] == [0, 1, 2]


def counted(count: int) -> Generator[int, None, None]:
    yield from range(count)


def test_what_a_job_raises_is_raised_and_the_thread_goes_on() -> None:
    def fails(_: Event) -> Generator[int, None, None]:
        yield 1
        raise ValueError("broken")

    thread = ModelThread()
    news = thread.iterate(fails)
    assert next(news) == 1
    with pytest.raises(ValueError, match="broken"):
        list(news)
    assert list(thread.iterate(lambda _: counted(2))) == [0, 1]


def test_a_listener_without_news_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_thread, "TICK", 0.01)
    go = Event()

    def waits(_: Event) -> Generator[int, None, None]:
        assert go.wait(PATIENCE)
        yield 7

    news = ModelThread().iterate(waits)
    assert next(news) is None
    go.set()
    assert [item for item in news if item is not None] == [7]


def test_leaving_tells_the_job_and_does_not_wait_for_it() -> None:
    """The job still runs when its listener is gone; the next one begins when it has ended."""
    go, ended = Event(), Event()

    def long(left: Event) -> Generator[int, None, None]:
        yield 1
        assert left.wait(PATIENCE) and go.wait(PATIENCE)
        ended.set()

    thread = ModelThread()
    news = thread.iterate(long)
    assert next(news) == 1
    news.close()
    assert not ended.is_set()
    after = thread.iterate(lambda _: iter_ended(ended))
    go.set()
    assert [item for item in after if item is not None] == [True]


def iter_ended(ended: Event) -> Generator[bool, None, None]:
    yield ended.is_set()


def test_a_job_whose_listener_left_in_the_queue_is_not_begun() -> None:
    go, begun = Event(), Event()

    def first(_: Event) -> Generator[int, None, None]:
        yield 1
        assert go.wait(PATIENCE)

    def second(_: Event) -> Generator[int, None, None]:
        begun.set()
        yield 2

    thread = ModelThread()
    running = thread.iterate(first)
    assert next(running) == 1
    waiting = thread.iterate(second)
    assert next(waiting) is None  # it stands in the queue
    waiting.close()
    go.set()
    assert list(thread.iterate(lambda _: counted(1))) == [0]
    assert not begun.is_set()
