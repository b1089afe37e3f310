"""Ctrl-C and SIGTERM during training: the step is finished and a checkpoint written; a second Ctrl-C stops at once."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
