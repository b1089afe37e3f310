"""Several processes of one command: the group they form under torchrun, and how many more decode media for each."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import distributed as dist

from stllm.common.distributed import world_size

MAX_WORKERS = 8
PATIENCE = timedelta(days=30)  # for a process with longer clips than the others


@contextmanager
def process_group() -> Iterator[None]:
    """The processes under torchrun as a group; gloo on GPUs, too: only counts pass between them."""
    if world_size() > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when every process has come here. Raises RuntimeError when one of them has ended."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def num_decoders(asked: int | None) -> int:
    """Processes that decode: a core each, up to `MAX_WORKERS`, unless the user says."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores, MAX_WORKERS)) if asked is None else asked
