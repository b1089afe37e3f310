"""The life of a serving process, for `stllm serve` and `stllm demo`: take the address, load the model, serve, end.

At the end its folder of uploads is removed. A second Ctrl-C ends it at once.
"""

import argparse
import asyncio
import fcntl
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread, Timer
from types import FrameType
from typing import Any, NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat, chosen_checkpoint, load_chosen
from stllm.serving.jobs import Jobs
from stllm.serving.limits import Limits

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECTIONS = 500  # fewer than the files that a process may open by default
HEADER_SECONDS = 10.0  # chosen here: for a request's header, and for the rest of a body after an early reply
UNREAD_SECONDS = 30  # chosen here: for a client to take the bytes that are ready for it
REFUSED = 100  # connections above CONNECTIONS that get a refusal; more could use up the files that a process may open
LATEST_SECONDS = 8.0  # after the first signal; what still runs then, such as a long encoding, is cut off


@dataclass(frozen=True)
class Host:
    """A loaded model, and what an application needs in order to serve it.

    checkpoint: of the model. folder: for uploads. url: http://HOST:PORT. local: True if only this machine can reach it.
    """

    chat: Chat
    checkpoint: Path
    jobs: Jobs
    folder: Path
    url: str
    local: bool


def serve(
    args: argparse.Namespace, limits: Limits, build: Callable[[Host], tuple[Any, str]], *, prefix: str, patience: int
) -> int:
    """Take the address, load the model, and serve until SIGINT or SIGTERM, which are raised again at the end.

    The first signal ends the reading of media; answers in progress have `patience` seconds. A second signal ends the
    process at once. Raises UserError.

    args: of a command with options for a checkpoint and an address. build: returns the application, and the line to
    print once it can be reached. prefix: of the folder for uploads.
    """
    checkpoint = chosen_checkpoint(args)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family) as listener, own_folder(prefix) as folder:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((args.host, args.port))
        except OSError as error:
            raise UserError(
                f"{args.host}:{args.port} cannot be taken ({error.strerror or error}): name another --port, or a "
                "--host of this machine"
            ) from None
        jobs = Jobs(limits)
        started = Thread(target=jobs.reading.start, daemon=True)  # while the model is loaded
        started.start()
        chat = load_chosen(args, checkpoint)
        started.join()
        name = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{name}:{listener.getsockname()[1]}"
        app, greeting = build(Host(chat, Path(checkpoint), jobs, folder, url, args.host in LOOPBACK))
        listener.listen()  # a reader of the address may connect at once
        print(f"{greeting} (Ctrl-C ends it)", flush=True)
        if args.host not in LOOPBACK:
            logger.warning("whoever reaches %s can ask: there is no password", args.host)
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            limit_concurrency=CONNECTIONS,
            backlog=REFUSED,  # asyncio accepts as many in one go, before it looks at any of them
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=patience,
        )
        if _signals:  # Python prints a KeyboardInterrupt that is raised in a `__del__`, and goes on
            raise KeyboardInterrupt
        # Requests that the shutdown cancels are no failures, and each would print a traceback.
        logging.getLogger("uvicorn.error").addFilter(
            lambda record: record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)
        )
        server = _Server(config, folder, jobs)
        gc.freeze()  # modules and model stay: the interpreter's last collection would look at them for seconds
        try:
            server.run(sockets=[listener])
        finally:
            server.latest.cancel()
    return 0


_signals: list[int] = []  # those that have raised KeyboardInterrupt


@contextmanager
def own_folder(prefix: str) -> Iterator[Path]:
    """Make a folder for uploads, removed at the end. From now on SIGINT and SIGTERM raise KeyboardInterrupt, once.

    A second signal, or SIGHUP, removes the folder and ends the process without waiting for anything. Folders of the
    same prefix and user whose process no longer runs (after SIGKILL) are removed first. The owner holds a lock on its
    folder, and the system releases the lock however the process ends.
    """
    for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # not a folder, not ours, its owner runs, or it has just been removed
            lock = os.open(other, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)
            finally:
                os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with suppress(FileNotFoundError):  # another process removed it before it was locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                break
            os.close(lock)

    _signals.clear()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for stopping in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stopping, lambda *_: end_at_once(folder))
        _signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup: the terminal has gone, and nobody waits
        signal.signal(signal.SIGHUP, lambda *_: end_at_once(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def end_at_once(folder: Path) -> NoReturn:
    """Remove the folder and end the process, without waiting for threads or requests."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError, ValueError):  # the terminal, or the reader of our messages, has gone
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
    os._exit(130)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, folder: Path, jobs: Jobs) -> None:
        super().__init__(config)
        self.folder = folder
        self.jobs = jobs
        self.latest = Timer(LATEST_SECONDS, end_at_once, [folder])
        self.latest.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown, or end the process if the shutdown has begun."""
        if self.should_exit:
            end_at_once(self.folder)
        self.jobs.reading.close()
        self.latest.start()
        super().handle_exit(sig, frame)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with limits, where uvicorn would wait forever.

    It closes connections without a complete header, connections whose reply was sent before the body ended, connections
    whose client does not read, and connections above the limit.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first header. When all places are taken, close the one that has waited longest."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; the system checks it, also while the connection is closing
            client = transport.get_extra_info("socket")
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            waiting = [one for one in self.connections if isinstance(one, TimedProtocol) and one._timer]
            if waiting:
                longest = min(waiting, key=lambda one: one._timer.when() if one._timer else 0.0)
                longest._stop_waiting()
                longest.transport.abort()
            elif len(self.connections) > self.limit_concurrency + REFUSED:
                transport.abort()
        self._timer = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Keep the timer unless a request is being answered."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
