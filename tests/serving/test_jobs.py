"""The queue: order of jobs, their items and exceptions, cancellation, and a full queue."""

from collections.abc import Generator, Iterator
from threading import Event, current_thread
from typing import Any

import pytest

from stllm.serving import jobs as queue
from stllm.serving.jobs import BusyError, Jobs, Stage
from stllm.serving.limits import Limits
from tests.helpers.serving import wait_until

PATIENCE = 30.0  # seconds; only a test that fails waits so long

Steps = Generator[Any, None, None]


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs(Limits(waiting=4))
    yield jobs
    jobs.close()


def test_items_of_a_job_are_yielded_in_order(jobs: Jobs) -> None:
    assert [item for item in jobs.iterate(lambda _: counted(3)) if item is not None] == [0, 1, 2]


def counted(count: int) -> Steps:
    yield Stage.MODEL
    yield from range(count)


def test_an_exception_of_a_job_is_raised_and_the_thread_continues(jobs: Jobs) -> None:
    def fails(_: Event) -> Steps:
        yield Stage.MODEL
        yield 1
        raise ValueError("broken")

    news = jobs.iterate(fails)

    assert next(news) == 1
    with pytest.raises(ValueError, match="broken"):
        list(news)
    assert [item for item in jobs.iterate(lambda _: counted(2)) if item is not None] == [0, 1]


def test_iterate_yields_none_while_a_job_has_no_items(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "TICK", 0.01)
    go = Event()

    def waits(_: Event) -> Steps:
        yield Stage.MODEL
        assert go.wait(PATIENCE)
        yield 7

    news = jobs.iterate(waits)
    assert next(news) is None
    go.set()
    assert [item for item in news if item is not None] == [7]


def test_leaving_signals_the_job_without_waiting(jobs: Jobs) -> None:
    """The job still runs after its caller has left; the next job starts when it has ended."""
    go, ended = Event(), Event()

    def long(left: Event) -> Steps:
        yield Stage.MODEL
        yield 1
        assert left.wait(PATIENCE) and go.wait(PATIENCE)
        ended.set()

    news = jobs.iterate(long)

    assert next(news) == 1
    news.close()
    assert not ended.is_set()
    after = jobs.iterate(lambda _: iter_ended(ended))
    go.set()
    assert [item for item in after if item is not None] == [True]


def iter_ended(ended: Event) -> Steps:
    yield Stage.MODEL
    yield ended.is_set()


def test_a_job_cancelled_in_the_queue_is_not_started(jobs: Jobs) -> None:
    go, begun = Event(), Event()

    def first(_: Event) -> Steps:
        yield Stage.MODEL
        yield 1
        assert go.wait(PATIENCE)

    def second(_: Event) -> Steps:
        yield Stage.MODEL
        begun.set()
        yield 2

    running = jobs.iterate(first)

    assert next(running) == 1
    waiting = jobs.iterate(second)
    assert next(waiting) is None  # it stands in the queue
    waiting.close()
    go.set()
    assert [item for item in jobs.iterate(lambda _: counted(1)) if item is not None] == [0]
    assert not begun.is_set()


def test_only_reading_stages_run_concurrently(jobs: Jobs) -> None:
    go, names = Event(), []

    def reads(_: Event) -> Steps:
        names.append(current_thread().name)
        yield Stage.READING
        names.append(current_thread().name)
        yield "read"
        assert go.wait(PATIENCE)
        yield Stage.MODEL
        names.append(current_thread().name)
        yield "answered"

    slow = jobs.iterate(reads)
    assert next(slow) == "read"
    assert [item for item in jobs.iterate(lambda _: counted(2)) if item is not None] == [0, 1]  # the model is free
    go.set()
    assert [item for item in slow if item is not None] == ["answered"]
    assert names[0] == current_thread().name
    assert (names[1].startswith("reading"), names[2].startswith("model")) == (True, True)


def test_the_number_of_read_clips_that_wait_for_the_model_is_limited(jobs: Jobs) -> None:
    """At most two clips wait; the third is read only when the model has taken one of them."""
    go, num_read = Event(), []

    def reads(_: Event) -> Steps:
        yield Stage.READING
        num_read.append(1)
        yield Stage.MODEL
        yield 1

    def answers(_: Event) -> Steps:
        yield Stage.MODEL
        yield 1
        assert go.wait(PATIENCE)

    running = jobs.iterate(answers)
    assert next(running) == 1
    waiting = [jobs.iterate(reads) for _ in range(4)]
    assert [next(one) for one in waiting] == [None] * 4
    assert len(num_read) == 2
    waiting[0].close()  # who leaves makes room for the next one
    wait_until(lambda: len(num_read) == 3)
    go.set()
    for one in waiting[1:]:
        assert [item for item in one if item is not None] == [1]


def test_places_are_counted_and_freed(jobs: Jobs) -> None:
    go = Event()

    def waits(_: Event) -> Steps:
        yield Stage.MODEL
        yield 1
        assert go.wait(PATIENCE)

    inside = [jobs.iterate(waits) for _ in range(5)]
    assert [next(one) for one in inside] == [1, None, None, None, None]
    with pytest.raises(BusyError, match="all 5 places are taken"):
        next(jobs.iterate(waits))
    inside[3].close()
    assert jobs.num_inside == 4
    go.set()
    for one in inside:
        list(one)
    wait_until(lambda: not jobs.num_inside)


def test_one_client_cannot_block_another(jobs: Jobs) -> None:
    news: list[Any] = []
    mine = [jobs.admit(news.append, "1.1.1.1") for _ in range(5)]
    with pytest.raises(BusyError, match="all 5 places are taken"):
        jobs.admit(news.append, "1.1.1.1")
    another = jobs.admit(news.append, "2.2.2.2")
    for client in ("2.2.2.2", "3.3.3.3"):
        with pytest.raises(BusyError, match="all 5 places are taken"):
            jobs.admit(news.append, client)
    for job in [*mine, another]:
        job.give_up()
    assert not jobs.num_inside
