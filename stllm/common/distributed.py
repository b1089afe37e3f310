"""The processes under torchrun: their numbers, their group, and what they agree on.

The numbers need no torch: it is asked only when something has imported it already.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(days=30)  # for a process with longer clips than the others


def rank() -> int:
    """This process's number among all, 0 when it is alone."""
    return _initialized("get_rank", "RANK", 0)


def local_rank() -> int:
    """This process's number on its machine, 0 when it is alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes there are, 1 when there is one."""
    return _initialized("get_world_size", "WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def _initialized(function: str, variable: str, alone: int) -> int:
    """What the process group says once there is one; before, what torchrun's environment says."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(getattr(distributed, function)())
    return int(os.environ.get(variable, alone))


def is_distributed() -> bool:
    """Whether there is a group with other processes to agree with."""
    from torch import distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(values: list[Any]) -> list[Any]:
    """All processes' values, in the order of the processes. A collective call."""
    from torch import distributed as dist

    if not is_distributed():
        return list(values)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, values)
    return [value for values in every for value in values]


@contextmanager
def process_group() -> Iterator[None]:
    """The processes under torchrun as a group; gloo on GPUs, too: only counts pass between them."""
    from torch import distributed as dist

    if world_size() > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when every process has come here. Raises RuntimeError when one of them has ended."""
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
