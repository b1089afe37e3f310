"""Reads media in separate processes, which can be killed. A file may take hours to decode, or crash its decoder.

A server reads its clients' files this way. Each reading has a time limit, and ends when its client has left. A crash
ends only the process that reads. All processes are forked from one process that does nothing else and has already
imported torch and the decoders, so a new one is ready within milliseconds. The fork server of multiprocessing is not
used: its socket has a path, which is too long if TMPDIR is long, and which is left behind if the server is killed.
"""

import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from torch import Tensor, from_numpy

from stllm.common.distributed import killed_with_parent
from stllm.common.errors import UserError
from stllm.common.logging import escape_output, setup_logging
from stllm.media.info import MediaError

R = TypeVar("R")

NUM_PROCESSES = 2  # chosen here: while a slow file occupies one process, other clients can use the second one
TICK = 0.1  # seconds between two checks of a reading
START_SECONDS = 60.0  # time limit for the start of a process, including the import of torch
SILENT_SECONDS = 5  # time limit between two parts of a result that is being sent
MEMORY = 4 << 30  # bytes that one reading may use (8K video uses 1 GiB): a small file can ask for tables of any length
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # forking needs one thread

logger = logging.getLogger(__name__)


class NobodyWaits(UserError):
    """Raised if a reading was ended because its caller no longer waits or the pool was closed."""


class ReadingPool:
    """A pool of processes that read media for this process.

    num_processes: the number of readings at the same time, which limits the memory for decoding. seconds: the time
    limit of one reading.
    """

    def __init__(self, num_processes: int = NUM_PROCESSES, *, seconds: float) -> None:
        self.num_processes = num_processes
        self.seconds = seconds
        self._closed = False
        self._free: SimpleQueue[_ReadingProcess] = SimpleQueue()
        for _ in range(num_processes):
            self._free.put(_ReadingProcess())

    def start(self) -> None:
        """Start the processes in advance. Otherwise the first reading would wait some seconds for them."""
        processes = [self._free.get() for _ in range(self.num_processes)]
        for process in processes:
            with suppress(EOFError, OSError, NobodyWaits):  # the first reading will report it
                process.start(lambda: self._check(Event()))
        for process in processes:
            self._give_back(process)

    def read(self, task: Callable[[], R], path: Path, stop: Event) -> R:
        """Run a task in the next free process and return its result. Task and result must be picklable.

        path: the file, named in error messages. stop: ends the reading when it is set. Raises what the task raises,
        MediaError if the task takes too long or its process dies, and NobodyWaits if the reading was ended.
        """
        process = None
        while process is None:
            self._check(stop)
            with suppress(Empty):
                process = self._free.get(timeout=TICK)
        try:
            connection = process.start(lambda: self._check(stop))
            connection.send(task)
            end = time.monotonic() + self.seconds
            while not connection.poll(TICK):
                self._check(stop)
                if time.monotonic() > end:
                    raise MediaError(
                        f"{path}: it could not be decoded within {self.seconds:g} s, the limit of this server: send a "
                        "shorter or a smaller one, or encode it anew"
                    )
            result = _receive(connection)
        except (EOFError, OSError):
            process.end()
            logger.warning("a process died while it decoded a client's file")
            raise MediaError(
                f"{path}: the process that decoded it died; the file may be damaged, or memory ran out: encode it "
                "anew, or send a smaller one"
            ) from None
        except BaseException:
            process.end()
            raise
        finally:
            self._give_back(process)
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """End the processes: idle ones at once, busy ones within `TICK` seconds. Later readings raise NobodyWaits."""
        self._closed = True
        with suppress(Empty):
            while True:
                self._free.get_nowait().end()

    def _give_back(self, process: "_ReadingProcess") -> None:
        self._free.put(process)
        if self._closed:
            self.close()

    def _check(self, stop: Event) -> None:
        if self._closed or stop.is_set():
            raise NobodyWaits("the reading was ended, because nobody waits for it")


class _ReadingProcess:
    """One process, started when it is needed and restarted after it has ended. Only one thread uses it at a time."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._pid: int | None = None  # None until the process has sent it

    def start(self, check: Callable[[], None]) -> Connection:
        """Start the process if needed, and return the connection to it.

        check: function that is called repeatedly while the process starts; its exception ends the waiting. Raises
        EOFError if the process does not start.
        """
        if self._connection is not None and self._connection.poll():  # data without a task: the process has ended
            self.end()
        if self._connection is None:
            self._pid = None
            self._connection = _forks.connect()
        if self._pid is None:
            end = time.monotonic() + START_SECONDS
            while not self._connection.poll(TICK):
                check()
                if time.monotonic() > end:
                    _forks.end()
                    raise EOFError("no process was forked")
            self._pid = self._connection.recv()
        return self._connection

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        if self._connection is not None:
            if self._pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            self._connection.close()
            self._connection = None


class _Forks:
    """The process that all reading processes are forked from. All of them end when this process ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = Lock()

    def connect(self) -> Connection:
        """Fork a new process and return the connection to it. The first message on it is the process id."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            if self._control is None or self._process is None or self._process.poll() is not None:
                self._control, control = socket.socketpair()
                code = f"import sys; sys.path[:] = {sys.path!r}; from stllm.media.reading import fork_at_request"
                with control:
                    self._process = subprocess.Popen(
                        [sys.executable, "-c", f"{code}; fork_at_request({control.fileno()})"],
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, **ONE_THREAD},
                        pass_fds=[control.fileno()],
                        start_new_session=True,  # Ctrl-C in a terminal must reach only the server
                    )
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENT_SECONDS, 0))
        return Connection(ours.detach())

    def end(self) -> None:
        """Kill the forking process; the processes forked from it end, too. The next `connect` starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


_forks = _Forks()


def fork_at_request(control: int) -> None:
    """Fork a process for each connection that is sent through a socket, until the socket is closed.

    control: the file descriptor of the socket.
    """
    import av  # noqa: F401
    import PIL.Image  # noqa: F401

    import stllm.media.clip  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for their exit codes
    with socket.socket(fileno=control) as requests:
        while True:
            message, connections, *_ = socket.recv_fds(requests, 1, 1)
            if not message:
                os._exit(0)
            if os.fork() == 0:
                requests.close()
                with suppress(OSError):  # the other end is closed: nobody waits for it any more
                    _work(Connection(connections[0]))
                os._exit(0)
            os.close(connections[0])


def _work(connection: Connection) -> None:
    """Run the tasks that arrive, one after another. Exit when the connection is closed, even during a task."""
    killed_with_parent()
    if sys.platform == "linux":  # limit the memory that this process may add to its current memory
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    escape_output()
    setup_logging()
    connection.send(os.getpid())
    tasks: SimpleQueue[bytes] = SimpleQueue()

    def receive_tasks() -> None:
        with suppress(EOFError, OSError):
            while True:
                tasks.put(connection.recv_bytes())
        os._exit(0)

    Thread(target=receive_tasks, daemon=True).start()
    while True:
        try:
            result = pickle.loads(tasks.get())()
        except UserError as error:
            result = error
        except Exception as error:  # a bug here: only this traceback shows where
            logger.error("a reading failed: %s", traceback.format_exc())
            result = error
        buffers: list[pickle.PickleBuffer] = []
        packed = BytesIO()
        _Pickler(packed, protocol=5, buffer_callback=buffers.append).dump(result)
        connection.send((packed.getvalue(), len(buffers)))
        for buffer in buffers:
            connection.send_bytes(buffer.raw())
        del result, buffers, packed


class _Pickler(pickle.Pickler):
    """A pickler that stores tensors as numpy arrays, so that their data can be sent without a copy."""

    def reducer_override(self, value: Any) -> Any:
        return (from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _receive(connection: Connection) -> Any:
    packed, num_buffers = connection.recv()
    return pickle.loads(packed, buffers=[bytearray(connection.recv_bytes()) for _ in range(num_buffers)])
