"""One thread for all that the model does: jobs in the order in which they came, and listeners who may leave.

The page's handlers run in threads of gradio's and must give way at once when a user stops or closes the tab, while a
video is being encoded, too. The job then ends as soon as it can, and the next one waits for it here.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Generic, TypeVar

T = TypeVar("T")
Job = Callable[[Event], Generator[T, None, object]]  # the event is set when nobody listens any more

TICK = 0.5  # seconds without news after which the listener is asked whether it goes on


class _End(Generic[T]):
    """The end of a job, with what it raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class ModelThread:
    """Runs jobs one after the other."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        Thread(target=self._work, name="model", daemon=True).start()

    def iterate(self, job: Job[T]) -> Generator[T | None, None, None]:
        """What the job yields, and None each half second in which it yields nothing. Raises what the job raises.

        Closing the iterator sets the job's event and does not wait for the job.
        """
        left = Event()
        news: SimpleQueue[T | _End[T]] = SimpleQueue()
        self._jobs.put(lambda: _run(job, left, news.put))
        try:
            yield from _listen(news)
        finally:
            left.set()

    def _work(self) -> None:
        while True:
            self._jobs.get()()


def _run(job: Job[T], left: Event, tell: Callable[[T | _End[T]], None]) -> None:
    error: BaseException | None = None
    try:
        if not left.is_set():
            with closing(job(left)) as items:
                for item in items:
                    tell(item)
                    if left.is_set():
                        break
    except BaseException as raised:  # handed to the listener, who raises it
        error = raised
    tell(_End(error))


def _listen(news: "SimpleQueue[T | _End[T]]") -> Iterator[T | None]:
    while True:
        try:
            item = news.get(timeout=TICK)
        except Empty:
            yield None
            continue
        if not isinstance(item, _End):
            yield item
        elif item.error is None:
            return
        else:
            raise item.error
