"""The serving process of `stllm serve` and `stllm demo`: bind the address, load the model, serve, shut down.

At the end, the folder of uploads is removed. A second Ctrl-C ends the process at once.
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
CONNECTIONS = 500  # fewer than the default limit of open files per process
HEADER_SECONDS = 10.0  # time limit for a request's header, and for the rest of a body after an early reply; our choice
UNREAD_SECONDS = 30  # time limit for a client to receive data that was sent to it; our choice
REFUSED = 100  # connections beyond CONNECTIONS that get a refusal; further ones are closed, to save open files
LATEST_SECONDS = 8.0  # time limit for the shutdown; a step that still runs then, such as a long encoding, is aborted


@dataclass(frozen=True)
class Host:
    """A loaded model and what an application needs to serve it.

    checkpoint: the model's path. folder: folder for uploads. url: http://HOST:PORT. local: True if only this machine
    can connect.
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
    """Bind the address, load the model, and serve until SIGINT or SIGTERM, which is raised again at the end.

    The first signal ends the reading of media, and running answers have `patience` seconds to end. A second signal ends
    the process at once. Raises UserError.

    args: parsed options for a checkpoint and an address. build: function that returns the application, and the line to
    print when it is ready. prefix: first part of the name of the folder for uploads.
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
        started = Thread(target=jobs.reading.start, daemon=True)  # start reading processes while the model is loaded
        started.start()
        chat = load_chosen(args, checkpoint)
        started.join()
        name = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{name}:{listener.getsockname()[1]}"
        app, greeting = build(Host(chat, Path(checkpoint), jobs, folder, url, args.host in LOOPBACK))
        listener.listen()  # before printing the address, so that a client can connect at once
        print(f"{greeting} (Ctrl-C ends it)", flush=True)
        if args.host not in LOOPBACK:
            logger.warning("everyone who can reach %s can use this server: there is no password", args.host)
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            limit_concurrency=CONNECTIONS,
            backlog=REFUSED,  # asyncio accepts so many connections before it handles any of them
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=patience,
        )
        if _signals:  # an earlier KeyboardInterrupt may have been lost: Python ignores exceptions in `__del__`
            raise KeyboardInterrupt
        # Without this filter, each request that the shutdown cancels would print a traceback.
        logging.getLogger("uvicorn.error").addFilter(
            lambda record: record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)
        )
        server = _Server(config, folder, jobs)
        gc.freeze()  # otherwise the last garbage collection at exit would scan modules and model for seconds
        try:
            server.run(sockets=[listener])
        finally:
            server.latest.cancel()
    return 0


_signals: list[int] = []  # signals that have raised KeyboardInterrupt


@contextmanager
def own_folder(prefix: str) -> Iterator[Path]:
    """Make a temporary folder for uploads, which is removed after the block. From now on, handle signals.

    The first SIGINT or SIGTERM raises KeyboardInterrupt. A second one, or SIGHUP, removes the folder and ends the
    process at once. Folders with this prefix that killed processes of this user left behind are removed first. They are
    recognised by a lock: a process holds one on its folder, and the system releases it when the process ends.
    """
    for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # not a folder, not of this user, still in use, or just removed
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
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup sets another handler, which is kept
        signal.signal(signal.SIGHUP, lambda *_: end_at_once(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def end_at_once(folder: Path) -> NoReturn:
    """Remove the folder and end the process, without waiting for threads or requests."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError, ValueError):  # stderr may be closed
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
        """Start the shutdown at the first signal; end the process at the second."""
        if self.should_exit:
            end_at_once(self.folder)
        self.jobs.reading.close()
        self.latest.start()
        super().handle_exit(sig, frame)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with time limits where uvicorn would wait forever.

    It closes a connection that sends no complete header, that goes on sending a body after the reply, whose client does
    not receive the reply, or that exceeds the number of connections.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the header. If there are too many connections, close the one that is idle longest."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux enforces it, even while the connection is being closed
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
        """Stop the timer while a request is being answered; otherwise keep it running."""
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
