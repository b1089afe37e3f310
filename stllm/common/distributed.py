"""Which of several processes this is. torch is asked only when something has imported it already."""

import os
import sys


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
