"""The end of a serving process: its folder of uploads goes with it, and a second Ctrl-C ends it at once."""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

_signals: list[int] = []  # those that have raised KeyboardInterrupt


@contextmanager
def own_folder(prefix: str) -> Iterator[Path]:
    """A new folder for uploads, removed at the end; from now on SIGINT and SIGTERM raise KeyboardInterrupt, once.

    A second signal, or SIGHUP, removes the folder and ends the process without waiting for anything. Folders of the
    same prefix and user whose process no longer runs (after SIGKILL) are removed first: the owner holds a lock on its
    folder, which the system releases however the process ends.
    """
    for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _remove_if_abandoned(other)
    folder, lock = _locked_folder(prefix)
    _signals.clear()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for stopping in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stopping, lambda *_: end_at_once(folder))
        _signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup; the terminal has gone, and nobody waits
        signal.signal(signal.SIGHUP, lambda *_: end_at_once(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_interrupted() -> None:
    """Raise KeyboardInterrupt again if a signal has raised it: in a `__del__`, Python prints it and goes on."""
    if _signals:
        raise KeyboardInterrupt


def end_at_once(folder: Path) -> NoReturn:
    """Removes the folder and ends the process, without waiting for threads or requests."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError, ValueError):  # the terminal, or whoever read our messages, has gone
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
    os._exit(130)


def _locked_folder(prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with suppress(FileNotFoundError):  # another process took it for abandoned before it was locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, lock
            os.close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):  # not a folder, not ours, its owner runs, or it has just been removed
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
