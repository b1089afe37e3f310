"""A limit on the time in which one medium is read. Storage may hang, and a small file may take hours to decode.

The reading runs in a thread, because data workers may not start processes. A reading that takes too long is given up:
the caller goes on, and the thread ends by itself at the next frame, or when the storage answers.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from stllm.common.errors import UserError
from stllm.media.info import MediaError

MAX_HANGING = 8  # chosen here: so many readings of one process that were given up and have not ended stop the command
TICK = 1.0  # seconds; a pause of the whole process (SIGSTOP, a suspended job) counts as one tick at most

T = TypeVar("T")


class StorageError(UserError):
    """So many readings hang that the fault is not in single files."""


class _GivenUp(BaseException):
    """The exception that ends the thread of a reading that was given up. Handlers of file errors do not catch it."""


class _Reading(threading.Thread):
    def __init__(self, read: Callable[[], Any], medium: str) -> None:
        super().__init__(name="reading", daemon=True)
        self.read, self.medium = read, medium
        self.given_up = self.unbounded = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.read()
        except BaseException as error:
            self.error = error


_hanging: list[_Reading] = []


def read_within(seconds: float, read: Callable[[], T], *, medium: str, setting: str) -> T:
    """Return `read()`, limited to this many seconds; 0: no limit.

    medium: its name in messages, unless `now_reading` has named it. setting: the name of the limit in messages.
    Raises what `read` raises, MediaError when it takes too long, StorageError when `MAX_HANGING` readings hang.
    """
    if not seconds:
        return read()
    reading = _Reading(read, medium)
    try:
        reading.start()
        left = seconds
        while left > 0 and reading.is_alive():
            tick = min(left, TICK)
            reading.join(tick)
            left -= 0 if reading.unbounded else tick
        if not reading.is_alive():
            if reading.error is not None:
                raise reading.error
            result: T = reading.result
            return result
        _hanging[:] = [*(other for other in _hanging if other.is_alive()), reading]
        if len(_hanging) >= MAX_HANGING:
            raise StorageError(
                f"{reading.medium}: {len(_hanging)} media could not be read within {seconds:g} s each, and their "
                "reading has not ended yet: the storage hangs; check it, then run the same command again, or raise "
                f"{setting}"
            )
        raise MediaError(
            f"{reading.medium}: its reading was given up after {seconds:g} s: check the file and its storage, or raise "
            f"{setting}"
        )
    finally:
        reading.given_up = True  # also when this thread was interrupted
        del reading  # the error's traceback refers to this frame


def now_reading(medium: object) -> None:
    """Name the file that this thread is about to read, for the message when reading takes too long."""
    if isinstance(thread := threading.current_thread(), _Reading):
        thread.medium = str(medium)
    keep_reading()


def keep_reading() -> None:
    """End this thread if its reading was given up. Loops over frames and packets call this."""
    if isinstance(thread := threading.current_thread(), _Reading) and thread.given_up:
        raise _GivenUp


@contextmanager
def unbounded() -> Iterator[None]:
    """Do not count the time in this block: more than one medium is fetched."""
    thread: Any = threading.current_thread()  # of any kind: only `read_within` looks at the mark
    thread.unbounded = True
    try:
        yield
    finally:
        thread.unbounded = False
