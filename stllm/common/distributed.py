"""Ranks under torchrun, worker processes that a command starts, and how each process ends.

A process must end when its parent has ended, even if the parent was killed by SIGKILL and could not signal it. A closed
pipe does not show this, because forked siblings keep each other's pipe ends open. The kernel's signal
(PR_SET_PDEATHSIG) is sent when the forking thread ends, which may be long before its process ends. So a thread checks
once a second whether the parent still exists.

Rank and world size do not need torch: the process group is asked only if torch is already imported.
"""

import gc
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
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

from stllm.common.errors import UserError
from stllm.common.logging import escape_output

PATIENCE = timedelta(days=30)  # timeout of the group; one process may have much longer clips than the others
SECONDS = 1.0  # seconds between two checks of the parent
CHUNK = 8  # tasks passed to a process at once
MAX_WORKERS = 8  # unless more are requested

T = TypeVar("T")
R = TypeVar("R")


# ---- under torchrun --------------------------------------------------------------------------------------------------


def rank() -> int:
    """Return this process's rank; 0 when there is only one process."""
    return _of_group("get_rank", "RANK", 0)


def world_size() -> int:
    """Return the number of processes in the run."""
    return _of_group("get_world_size", "WORLD_SIZE", 1)


def is_main() -> bool:
    """Check whether this process is the one that prints and writes."""
    return rank() == 0


def _of_group(function: str, variable: str, alone: int) -> int:
    """Return a number from the process group, or from torchrun's environment if there is no group yet.

    function: name of a function of torch.distributed. variable: name of an environment variable. alone: the value if
    there is neither a group nor the variable.
    """
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(getattr(dist, function)())
    return int(os.environ.get(variable, alone))


def is_distributed() -> bool:
    """Check whether a process group with more than one process exists."""
    from torch import distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(values: list[Any]) -> list[Any]:
    """Gather the values of all processes into one list, in rank order. A collective call: each process must make it."""
    from torch import distributed as dist

    if not is_distributed():
        return list(values)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, values)
    return [value for values in every for value in values]


@contextmanager
def process_group() -> Iterator[None]:
    """Open a process group for the block, if under torchrun. It uses gloo on GPUs, too: the messages are small."""
    from torch import distributed as dist

    if world_size() > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        end_process_group()


def end_process_group() -> None:
    """Destroy torch's process group if there is one. Its threads end only when nothing refers to it any more.

    A thread that is still alive can abort the interpreter at its exit. The garbage is collected first, because cycles
    of references keep a Trainer, its DDP and their process group alive.
    """
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process has called this function. Raises RuntimeError if one of them has ended."""
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


# ---- processes that a command starts ---------------------------------------------------------------------------------


def end_with_parent(worker: int = 0) -> None:
    """Make this process end with the one that started it through multiprocessing. Call it first in a worker process.

    The process ends when its parent has ended or sends SIGTERM. It ignores SIGINT, and SIGTERM from anyone else:
    torchrun, Slurm and terminals signal the whole group, and a worker that ends would break the step that its parent
    wants to finish.

    What the process prints is escaped, as in its parent. The process also ends when a result cannot be sent (no room in
    shared memory, too many open files): Python would drop the result, and the parent would wait for it forever.

    worker: its number, unused; DataLoader passes it to `worker_init_fn`.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None, "not started by multiprocessing"
    served = getattr(multiprocessing.current_process(), "_start_method", None) == "forkserver"
    starter = os.getppid() if served else parent.pid  # not always getppid(): the parent may have ended already
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
    """Make the kernel kill this process when the thread that forked it ends. Does nothing except on Linux.

    This works even while a decoder holds the interpreter's lock, when no Python thread can check the parent.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_with_launcher() -> None:
    """Make this process end with its launcher, if it is a rank started by torchrun or accelerate.

    A command that was started in the background may outlive its shell, but a rank must not outlive its launcher: nobody
    would notice when a rank fails, and the other ranks would wait for it.
    """
    # torchrun makes each rank a session leader; a child of a rank inherits the environment, but is not a leader
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.name != "posix" or os.getsid(0) != os.getpid():
        return
    launcher = os.getppid()
    try:
        program = os.path.basename(os.readlink(f"/proc/{launcher}/exe"))
    except OSError:  # another user's process, or not Linux
        program = ""
    # The launcher may have ended already, so that this process was adopted by systemd or by process 1. In a container,
    # process 1 may be torchrun itself.
    if program == "systemd" or (launcher == 1 and "python" not in program):
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
        os._exit(0)  # sys.exit would wait for queues that nobody reads; a code other than 0 would look like a crash

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Map(Protocol):
    """Type of the builtin `map`, and of a function that maps over a process pool."""

    def __call__(self, function: Callable[[T], R], tasks: Iterable[T], /) -> Iterator[R]: ...


def one_a_core(asked: int | None, most: int = MAX_WORKERS) -> int:
    """Return the number of worker processes: `asked`, or if it is None one per CPU core, but at most `most`.

    The cores are divided by the number of ranks on this machine; the result is at least 1.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores, most)) if asked is None else asked


@contextmanager
def mapping(num_workers: int, *, died: str) -> Iterator[Map]:
    """Yield a function like `map` that runs in worker processes and keeps the order. Workers ignore Ctrl-C.

    num_workers: the number of processes; function and tasks must be picklable. 0: everything runs in this process.
    died: the message of the UserError that is raised when a worker ends unexpectedly.
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
