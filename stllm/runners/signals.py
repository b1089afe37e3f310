"""Ctrl-C and SIGTERM during training: the step is finished and a checkpoint written; a second Ctrl-C stops at once."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stllm.common.terminal import escape_output

log = logging.getLogger(__name__)


class StopRequest:
    """Set by a signal, read by the trainer once a step."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + (self.received or signal.SIGINT)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:  # a launcher may well send SIGTERM twice
                raise KeyboardInterrupt
            return
        self.received = number
        log.info("%s: finishing this step, then a checkpoint is written", signal.Signals(number).name)


@contextmanager
def stopping_at_signals() -> Iterator[StopRequest]:
    """Within, the first SIGINT or SIGTERM only sets the request. Outside the main thread nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request._receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obeying_parent_alone(worker: int) -> None:
    """Makes a data worker deaf to signals that are meant for its process, and reach the whole group all the same.

    What it prints is escaped, as in its own process.

    torchrun, Slurm and terminals signal every process; a worker that ends breaks the step that is to be finished. Its
    own process's SIGTERM still ends it. worker: its number, as DataLoader's `worker_init_fn` is given it.
    """
    escape_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
