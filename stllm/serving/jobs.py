"""A bounded queue before the one model: a request that finds no place is refused at once, one at a time is answered.

A job's work runs in the model's thread and tells the event loop what it yields. Whoever leaves gives up the job: a
waiting one is dropped, a running one ends at its next token, and its place and its files are given back.
"""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from threading import Event, Lock
from typing import Generic, TypeVar

from stllm.serving.errors import ApiError

T = TypeVar("T")
Work = Callable[[Event], Generator[T, None, None]]  # the event is set when nobody listens any more


class Jobs:
    """places: requests that may be here at once, the one that is answered among them."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._inside: set[Job] = set()
        self._lock = Lock()

    @property
    def num_inside(self) -> int:
        """Requests that have arrived whole, whether they wait or are answered."""
        return len(self._inside)

    def check_room(self) -> None:
        """Raises ApiError when no place is free."""
        if len(self._inside) >= self.places:
            raise ApiError(503, f"all {self.places} places are taken: try again in a moment", code="server_overloaded")

    def admit(self) -> "Job":
        """A place for one request. Raises ApiError when none is free."""
        with self._lock:
            self.check_room()
            job: Job = Job(self)
            self._inside.add(job)
            return job

    def leave(self, job: "Job") -> None:
        """Frees the job's place; a second time nothing happens."""
        with self._lock:
            self._inside.discard(job)

    def close(self) -> None:
        """Gives up all jobs and waits for the running one to end."""
        with self._lock:
            inside = list(self._inside)
        for job in inside:
            job.give_up()
        self.worker.shutdown()


class _End:
    """The last thing that a job tells. error: what its work raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Job(Generic[T]):
    """One request with a place in the house. resources: what is closed when it leaves."""

    def __init__(self, jobs: Jobs) -> None:
        self.resources = ExitStack()
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[T | _End] = asyncio.Queue()
        self._given_up = Event()
        self._future: Future[None] | None = None

    def start(self, work: Work[T]) -> None:
        """Joins the queue."""
        self._future = self._jobs.worker.submit(self._run, work)

    async def next(self) -> T | None:
        """What the work yields next, None at its end. Raises what it raises."""
        item = await self._told.get()
        if not isinstance(item, _End):
            return item
        if item.error is not None:
            raise item.error
        return None

    def give_up(self) -> None:
        """Nobody listens any more, because all was told or because the client has gone. May be called again."""
        self._given_up.set()
        if self._future is None or self._future.cancel():
            self._leave(_End())

    def _run(self, work: Work[T]) -> None:
        end = _End()
        try:
            with closing(work(self._given_up)) as items:
                while not self._given_up.is_set() and (item := next(items, None)) is not None:
                    self._tell(item)
        except BaseException as error:  # handed to the listener, who raises it
            end = _End(error)
        self._leave(end)

    def _leave(self, end: _End) -> None:
        self.resources.close()
        self._jobs.leave(self)
        self._tell(end)

    def _tell(self, item: T | _End) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server ends, and nobody waits for news
            self._loop.call_soon_threadsafe(self._told.put_nowait, item)
