"""Reading processes that are stopped or use too much memory: their requests end, and later ones are answered."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest

from stllm.media import reading
from stllm.media.info import MediaError
from stllm.media.reading import ReadingPool

FILE = Path("clip.mp4")


@pytest.fixture
def pool() -> Iterator[ReadingPool]:
    pool = ReadingPool(1, seconds=60)
    pool.start()
    yield pool
    pool.close()


def fork_server() -> psutil.Process:
    return next(one for one in psutil.Process().children() if "fork_at_request" in " ".join(one.cmdline()))


def test_the_memory_of_a_reading_process_is_limited(pool: ReadingPool) -> None:
    with pytest.raises(MemoryError):
        pool.read(partial(eval, "len(bytearray(6 << 30))"), FILE, Event())
    assert pool.read(partial(eval, "len(bytearray(1 << 30))"), FILE, Event()) == 1 << 30


def test_a_process_stopped_while_sending_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SILENT_SECONDS", 1)
    pool = ReadingPool(1, seconds=60)
    pid = pool.read(os.getpid, FILE, Event())
    receive = reading._receive

    def stop_and_receive(connection: Any) -> Any:
        os.kill(pid, signal.SIGSTOP)
        return receive(connection)

    monkeypatch.setattr(reading, "_receive", stop_and_receive)
    with pytest.raises(MediaError, match="died"):
        pool.read(partial(bytes, 100 << 20), FILE, Event())
    monkeypatch.undo()
    assert pool.read(partial(len, "ab"), FILE, Event()) == 2
    pool.close()


def test_a_stopped_fork_server_is_replaced(pool: ReadingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = fork_server()
    resting = stopped.children()
    stopped.suspend()
    for child in resting:
        child.kill()
    psutil.wait_procs(resting, timeout=10)
    start = time.monotonic()
    monkeypatch.setattr(reading, "START_SECONDS", 1)
    with pytest.raises(MediaError, match="died"):
        pool.read(partial(len, "ab"), FILE, Event())
    assert time.monotonic() - start < 20
    monkeypatch.undo()
    assert pool.read(partial(len, "ab"), FILE, Event()) == 2
    assert not stopped.is_running()
