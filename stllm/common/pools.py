"""`map` over several processes, in order, that ends when one of them dies."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol, TypeVar

from stllm.common.errors import UserError
from stllm.common.parent import end_with_parent

CHUNK = 8  # tasks that a process is given at once

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """The builtin of that name, or a pool's."""

    def __call__(self, function: Callable[[T], R], tasks: Iterable[T], /) -> Iterator[R]: ...


def one_a_core(asked: int | None, most: int) -> int:
    """Processes: as many as are asked for, else one a core, but no more than `most`."""
    return min(os.cpu_count() or 1, most) if asked is None else asked


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
