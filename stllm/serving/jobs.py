"""A bounded queue in front of the one model. It refuses requests beyond its places.

The server and the demo both use it. A job is a generator: it yields news for its listener, and a `Stage` where its next
steps must run in another thread. A few threads read files (in processes of their own, media/reading.py), so that a slow
file delays no other; one thread encodes; answers are written together (conversation/streaming.py), and each job waits
for its own in a thread. When a client leaves, its job is given up: a waiting job is dropped, a job that reads ends at
once, and a job that answers ends at its next token while the others go on. Its place and its files are freed.
"""

import logging
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any, Generic, TypeVar

import anyio
import torch

from stllm.common.errors import UserError, out_of_memory
from stllm.conversation.requests import EngineError
from stllm.media.reading import ReadingPool
from stllm.serving.limits import Limits

logger = logging.getLogger(__name__)
T = TypeVar("T")

EXTRA = 4  # one place in addition to so many, for clients that have none; chosen here
TICK = 0.5  # seconds without news after which a listening thread is asked whether it goes on


class Stage(Enum):
    """The kind of thread in which the next steps of a job run."""

    READING = "reading"
    MODEL = "model"  # one thread
    ANSWER = "answer"  # many threads, each of which waits for its answer, in a batch or from another server


Work = Callable[[Event], Generator[T | Stage, None, object]]  # the event is set when nobody listens any more


class BusyError(UserError):
    """No place is free for another request; one may become free soon."""


@dataclass(frozen=True)
class End:
    """The last news of a job. error: raised by its work."""

    error: BaseException | None = None


def explain(error: Exception, need_less: str = "take fewer frames or fewer beams, or ask a shorter question") -> str:
    """Return the sentence for whoever asked; after a lack of memory, free the GPU's.

    A defect of ours is logged, and a failure of the engine, whose address is not for everyone. need_less: in words,
    what takes less memory.
    """
    if isinstance(error, EngineError):
        logger.error("%s", error)
        return "the engine, which writes the answers, failed, and this server's log says why: try again in a moment"
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"not enough memory for this: {need_less}"
    logger.error("a request failed", exc_info=error)
    return "the server failed on this request, and its log says why; it goes on with the next one"


class Jobs:
    """The queue. places: for requests at once, including the one being answered. reading: processes that read media.

    A few more places are for clients that have none, so that one client cannot shut out all others.
    """

    def __init__(self, limits: Limits) -> None:
        self.places = 1 + limits.waiting
        self.reading = ReadingPool(seconds=limits.read_seconds)
        self.threads = {
            Stage.READING: ThreadPoolExecutor(self.reading.num_processes, thread_name_prefix="reading"),
            Stage.MODEL: ThreadPoolExecutor(1, thread_name_prefix="model"),
            Stage.ANSWER: ThreadPoolExecutor(self.places + self.places // EXTRA, thread_name_prefix="answer"),
        }
        self._inside: set[Job] = set()
        self._lock = Lock()
        self._closed = False

    def has_place(self, client: str | None) -> bool:
        """Check whether a request of this client may enter; None: of nobody in particular.

        One that has no other request here finds a place when others have taken all of them.
        """
        inside = list(self._inside)  # other threads change it
        is_new = client is not None and all(job.client != client for job in inside)
        return len(inside) < self.places + (self.places // EXTRA if is_new else 0)

    @property
    def num_inside(self) -> int:
        """Return the number of requests that wait, are read or are answered."""
        return len(self._inside)

    def check_room(self, client: str | None = None) -> None:
        """Raise BusyError when no place is free for this client."""
        if self._closed:
            raise BusyError("the server is ending: try again in a moment")
        if not self.has_place(client):
            raise BusyError(f"all {self.places} places are taken: try again in a moment")

    def admit(self, tell: "Callable[[T | End], None]", client: str | None = None) -> "Job[T]":
        """Take a place for one request. tell: gets its news, in any thread. client: its address.

        Raises BusyError when no place is free.
        """
        with self._lock:
            self.check_room(client)
            job: Job[T] = Job(self, tell, client)
            self._inside.add(job)
            return job

    def iterate(self, work: Work[T]) -> Generator[T | None, None, None]:
        """Yield the work's news to a listening thread, and None after each half second without news. Raises its errors.

        Closing the iterator gives up the job and does not wait for its end. Raises BusyError when no place is free.
        """
        news: SimpleQueue[T | End] = SimpleQueue()
        job = self.admit(news.put)
        try:
            job.start(work)
            while True:
                try:
                    item = news.get(timeout=TICK)
                except Empty:
                    yield None
                    continue
                if isinstance(item, End):
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            job.give_up()

    def leave(self, job: "Job") -> None:
        """Free the job's place. A second call does nothing."""
        with self._lock:
            self._inside.discard(job)

    def close(self) -> None:
        """Give up all jobs, end all readings, and wait for the model's running step to end."""
        self.reading.close()
        with self._lock:
            self._closed = True
            inside = list(self._inside)
        for job in inside:
            job.give_up()
        for threads in self.threads.values():
            threads.shutdown()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Close the queue when the application ends; for starlette's `lifespan`."""
        yield
        await anyio.to_thread.run_sync(self.close)


class Job(Generic[T]):
    """One request with a place in the queue. resources: closed when it leaves. client: its address, if known."""

    def __init__(self, jobs: Jobs, tell: Callable[[T | End], None], client: str | None = None) -> None:
        self.resources = ExitStack()
        self.client = client
        self._jobs, self._tell = jobs, tell
        self._given_up = Event()
        self._steps: Generator[T | Stage, None, object] | None = None
        self._future: Future[None] | None = None  # of the stage that waits for its thread, or runs
        self._lock = Lock()  # between giving up and going on to another stage

    def start(self, work: Work[T]) -> None:
        """Begin the work, and run it in this thread until it names a stage."""
        self._steps = work(self._given_up)
        self._go_on(None, Event())

    def give_up(self) -> None:
        """End the job: the listener has all its news or has gone. A second call does nothing."""
        with self._lock:
            self._given_up.set()
            waits = self._steps is None if self._future is None else self._future.cancel()
        if waits:
            self._leave(End())

    def _go_on(self, stage: Stage | None, begun: Event) -> None:
        """Run the work up to its next stage or its end."""
        begun.set()
        assert self._steps is not None
        try:
            for item in self._steps:
                if isinstance(item, Stage):
                    if item is not stage and self._hand_over(stage, item):
                        return
                else:
                    self._tell(item)
                if self._given_up.is_set():
                    break
            end = End()
        except BaseException as error:  # handed to the listener, who raises it
            end = End(error)
        self._leave(end)

    def _hand_over(self, stage: Stage | None, following: Stage) -> bool:
        """Queue the rest of the work for the next stage's thread. Return False for a job that was given up."""
        begun = Event()
        with self._lock:
            if self._given_up.is_set():
                return False
            self._future = self._jobs.threads[following].submit(self._go_on, following, begun)
        while stage is Stage.READING and not begun.wait(TICK) and not self._given_up.is_set():
            pass  # a thread that has read waits for the model, so that few clips wait for it in memory
        return True

    def _leave(self, end: End) -> None:
        if self._steps is not None:
            self._steps.close()
        self.resources.close()
        self._jobs.leave(self)
        self._tell(end)
