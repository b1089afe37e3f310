"""Processes that a command starts: how many, a `map` over them, and how each ends with the one that started it.

A process must end even when SIGKILL gave its parent no chance to say so. Pipes do not tell: forked siblings hold each
other's ends open. The kernel's own signal (PR_SET_PDEATHSIG) follows the thread that forked, which may end long before
its process. So a thread looks once a second whose child this process is.
"""

import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

from stllm.common.errors import UserError
from stllm.common.logging import escape_output

SECONDS = 1.0  # between two looks
CHUNK = 8  # tasks that a process is given at once
MAX_WORKERS = 8  # unless more are asked for

T = TypeVar("T")
R = TypeVar("R")


def end_with_parent(worker: int = 0) -> None:
    """Bind this process to the one that started it through multiprocessing: call it first in every such process.

    It ends when its parent has ended or sends SIGTERM. SIGINT, and SIGTERM from anyone else, are ignored: torchrun,
    Slurm and terminals signal the whole group, and a worker that ends breaks the step that its parent wants to finish.

    What it prints is escaped, as in its parent. A result that cannot be sent (no room in shared memory, too many open
    files) ends it, too: Python would drop the result, and the parent would wait for it forever.

    worker: its number, unused; DataLoader's `worker_init_fn` is given it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None, "not started by multiprocessing"
    served = getattr(multiprocessing.current_process(), "_start_method", None) == "forkserver"
    starter = os.getppid() if served else parent.pid  # not getppid(): the parent may have ended before this line
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    escape_output()
    cast(Any, multiprocessing.queues.Queue)._on_queue_feeder_error = staticmethod(_end_with_error)
    can_wait = hasattr(signal, "sigtimedwait")  # not on macOS and Windows: there SIGTERM ends it, whoever sends it
    if can_wait:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def is_over() -> bool:
        if can_wait:
            received = signal.sigtimedwait({signal.SIGTERM}, SECONDS)
            if received is not None and received.si_pid == parent.pid:
                return True
        else:
            parent.join(SECONDS)
        return os.getppid() != starter or not parent.is_alive()

    _end_when(is_over)


def killed_with_parent() -> None:
    """Have the kernel kill this process once the thread that forked it is gone. Linux; elsewhere nothing happens.

    It works while a decoder holds the interpreter's lock, too, where no thread of Python can look.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_with_launcher() -> None:
    """Bind a rank to the torchrun (or accelerate) that started it; no other process is changed.

    A shell that started a command in the background may end. The ranks of a launcher that was killed may not go on:
    nobody would notice when one of them fails, and the others would wait for it.
    """
    # torchrun starts each rank in a session of its own; what a rank starts in turn inherits its environment alone
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.name != "posix" or os.getsid(0) != os.getpid():
        return
    launcher = os.getppid()
    if _takes_over(launcher):  # the launcher ended before this line
        os._exit(1)

    def is_over() -> bool:
        time.sleep(SECONDS)
        return os.getppid() != launcher

    _end_when(is_over)


def _end_with_error(error: Exception, _: object) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def _end_when(is_over: Callable[[], bool]) -> None:
    def watch() -> None:
        while not is_over():
            pass
        os._exit(0)  # Python's own exit would wait for queues that nobody reads; another code than 0 reads as a crash

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _takes_over(process: int) -> bool:
    """Check whether it is one of those that become the parents of orphans. In a container, process 1 may be torchrun."""
    try:
        program = os.path.basename(os.readlink(f"/proc/{process}/exe"))
    except OSError:  # another user's, or no Linux
        program = ""
    return program == "systemd" or (process == 1 and "python" not in program)


class Map(Protocol):
    """The builtin of that name, or a pool's."""

    def __call__(self, function: Callable[[T], R], tasks: Iterable[T], /) -> Iterator[R]: ...


def one_a_core(asked: int | None, most: int = MAX_WORKERS) -> int:
    """Processes: as many as are asked for, else one a core of this rank's share, from 1 to `most`."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores, most)) if asked is None else asked


@contextmanager
def mapping(num_workers: int, *, died: str) -> Iterator[Map]:
    """What maps a function over tasks; results come in their order. Ctrl-C reaches this process alone.

    num_workers: processes, whose function and tasks can be pickled; 0: this one alone.
    Raises UserError, `died`, when a process ends that was at work: no endless wait.
    """
    if num_workers < 1:
        yield map
        return
    spawned = multiprocessing.get_context("spawn")  # a fork would copy this process's threads' locks
    pool = ProcessPoolExecutor(num_workers, spawned, initializer=end_with_parent)
    try:
        yield lambda function, tasks: pool.map(function, tasks, chunksize=CHUNK)
    except BrokenProcessPool:
        raise UserError(died) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
