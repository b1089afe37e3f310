"""A spinner on stderr while something takes long, where a person is looking. rich is imported only there."""

import sys
from contextlib import AbstractContextManager, nullcontext

from stllm.common.distributed import is_main


def working(what: str) -> AbstractContextManager[object]:
    """Shows `what` until the block ends; nothing where stderr is no terminal, or this not the main process."""
    if not sys.stderr.isatty() or not is_main():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)
