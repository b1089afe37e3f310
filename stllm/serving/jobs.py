"""A bounded queue of jobs for one model, used by the server and the web page. A full queue refuses requests.

A job is a generator. It yields results for the client, and a `Stage` before steps that need another thread. Several
threads read media (in separate processes, media/reading.py), so that a slow file does not delay the others. One thread
encodes. For the answer, each job waits in a thread of its own, and answers are generated in batches
(conversation/streaming.py).
When a client leaves, its job is cancelled: a waiting job is dropped, reading ends at once, and an answer ends at its
next token while the other answers of its batch continue. The job's place and files are freed.
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

EXTRA = 4  # per so many places there is one more, reserved for clients without a request; our choice
TICK = 0.5  # seconds without a result after which `iterate` yields None, so that its caller can stop


class Stage(Enum):
    """A stage of a job. A job yields the stage that comes next, because each stage runs in threads of its own."""

    READING = "reading"
    MODEL = "model"  # one thread
    ANSWER = "answer"  # many threads, each of which waits for one answer, from a batch or an engine


Work = Callable[[Event], Generator[T | Stage, None, object]]  # a job's generator; the event is set when it is cancelled


class BusyError(UserError):
    """Raised if the queue has no free place. The client may try again later."""


@dataclass(frozen=True)
class End:
    """A marker that follows the last result of a job. error: the exception that ended the job, if any."""

    error: BaseException | None = None


def explain(error: Exception, need_less: str = "take fewer frames or fewer beams, or ask a shorter question") -> str:
    """Return the sentence about an error for the client. If memory ran out, also free cached GPU memory.

    Unexpected errors and failures of the engine are logged, and the client is not told their details. need_less: advice
    for using less memory.
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
    """The queue. A few additional places are reserved for clients without a request, so that one client cannot fill it.

    Attributes: places: number of requests that may wait or be answered at once. reading: processes that read media.
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
        """Check whether the queue has a place for a request of this client. client: its address, None if unknown.

        A few places are reserved for clients without another request in the queue.
        """
        inside = list(self._inside)  # a copy, since other threads change the set
        is_new = client is not None and all(job.client != client for job in inside)
        return len(inside) < self.places + (self.places // EXTRA if is_new else 0)

    @property
    def num_inside(self) -> int:
        """Return the number of queued and active requests."""
        return len(self._inside)

    def check_room(self, client: str | None = None) -> None:
        """Raise BusyError if no place is free for this client."""
        if self._closed:
            raise BusyError("the server is ending: try again in a moment")
        if not self.has_place(client):
            raise BusyError(f"all {self.places} places are taken: try again in a moment")

    def admit(self, tell: "Callable[[T | End], None]", client: str | None = None) -> "Job[T]":
        """Take a place for a request, and return its job. Raises BusyError if no place is free.

        tell: function that receives the job's results and then an `End`; any thread may call it. client: the client's
        address.
        """
        with self._lock:
            self.check_room(client)
            job: Job[T] = Job(self, tell, client)
            self._inside.add(job)
            return job

    def iterate(self, work: Work[T]) -> Generator[T | None, None, None]:
        """Run a job, and yield its results; yield None after each half second without one. Raises the job's exception.

        Closing the iterator cancels the job without waiting for its end. Raises BusyError if no place is free.
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
        """Cancel all jobs, stop the reading processes, and wait for the running step of the model."""
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
    """A request with a place in the queue.

    resources: an `ExitStack` that is closed when the job ends. client: the client's address, None if unknown.
    """

    def __init__(self, jobs: Jobs, tell: Callable[[T | End], None], client: str | None = None) -> None:
        self.resources = ExitStack()
        self.client = client
        self._jobs, self._tell = jobs, tell
        self._given_up = Event()
        self._steps: Generator[T | Stage, None, object] | None = None
        self._future: Future[None] | None = None  # future of the current stage
        self._lock = Lock()  # prevents that a cancelled job starts another stage

    def start(self, work: Work[T]) -> None:
        """Start the job, and run it in this thread until it yields a stage."""
        self._steps = work(self._given_up)
        self._go_on(None, Event())

    def give_up(self) -> None:
        """Cancel the job, or mark it as finished. A second call does nothing."""
        with self._lock:
            self._given_up.set()
            waits = self._steps is None if self._future is None else self._future.cancel()
        if waits:
            self._leave(End())

    def _go_on(self, stage: Stage | None, begun: Event) -> None:
        """Run the job up to its next stage or its end.

        stage: the stage of this thread. begun: set to show that it has begun.
        """
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
        except BaseException as error:  # passed on, to be raised in the client's thread
            end = End(error)
        self._leave(end)

    def _hand_over(self, stage: Stage | None, following: Stage) -> bool:
        """Submit the rest of the job to the next stage's threads. Return False if the job was cancelled."""
        begun = Event()
        with self._lock:
            if self._given_up.is_set():
                return False
            self._future = self._jobs.threads[following].submit(self._go_on, following, begun)
        while stage is Stage.READING and not begun.wait(TICK) and not self._given_up.is_set():
            pass  # wait until the model takes the clip, so that few clips are in memory
        return True

    def _leave(self, end: End) -> None:
        if self._steps is not None:
            self._steps.close()
        self.resources.close()
        self._jobs.leave(self)
        self._tell(end)
