"""A time limit for reading one medium. Storage may hang, and a small file may take hours to decode.

The medium is read in a thread, because data workers must not start processes. If that takes too long, the caller
continues without it. The thread ends by itself at the next frame, or when the storage responds.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from stllm.common.errors import UserError
from stllm.media.info import MediaError

MAX_HANGING = 8  # chosen here: the command stops when this many threads that exceeded their limit have not ended
TICK = 1.0  # seconds; a pause of the whole process (SIGSTOP, a suspended job) counts as at most one tick

T = TypeVar("T")


class StorageError(UserError):
    """Raised if the storage seems to hang: `MAX_HANGING` readings took too long and have not ended."""


class _GivenUp(BaseException):
    """Ends a thread whose reading took too long. It is a BaseException, so handlers of file errors do not catch it."""


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
    """Return the result of `read()`, with a time limit in seconds (0: no limit).

    medium: the file that error messages name; `now_reading` can name another one later. setting: the setting of the
    limit, also named in messages. Raises what `read` raises, MediaError if it takes too long, and StorageError if
    `MAX_HANGING` readings hang.
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
    """Set the file that this thread reads next. The message of an exceeded limit names it."""
    if isinstance(thread := threading.current_thread(), _Reading):
        thread.medium = str(medium)
    keep_reading()


def keep_reading() -> None:
    """End this thread if its reading took too long. Called in loops over frames and packets."""
    if isinstance(thread := threading.current_thread(), _Reading) and thread.given_up:
        raise _GivenUp


@contextmanager
def unbounded() -> Iterator[None]:
    """Do not count the time of this block toward the limit, for example because it downloads more than one medium."""
    thread: Any = threading.current_thread()  # may be another type of thread, on which the mark has no effect
    thread.unbounded = True
    try:
        yield
    finally:
        thread.unbounded = False
