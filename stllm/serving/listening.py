"""A web application on an address of this machine, until it is ended: what `stllm serve` and `stllm demo` share."""

import asyncio
import gc
import logging
import socket
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import Any

import uvicorn

from stllm.common.errors import UserError
from stllm.serving.ending import check_interrupted, end_at_once
from stllm.serving.jobs import Jobs
from stllm.serving.protocol import REFUSED, TimedProtocol

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECTIONS = 500  # fewer than the files that a process may open by default
LATEST_SECONDS = 8.0  # after the first signal; what still runs then, such as a long encoding, is cut off


def bound(host: str, port: int) -> socket.socket:
    """The address, taken before a model is loaded. Raises UserError when it is not to be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"{host}:{port} cannot be taken ({error.strerror or error}): name another --port, or a --host of this "
            "machine"
        ) from None
    return listener


def address(host: str, listener: socket.socket) -> str:
    """http://HOST:PORT."""
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(app: Any, listener: socket.socket, folder: Path, jobs: Jobs, *, patience: int) -> None:
    """Serves until SIGINT or SIGTERM, which are raised again at the end; a second one ends the process at once.

    The first one ends what is being read; answers that are written have `patience` seconds. folder: of uploads.
    """
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        limit_concurrency=CONNECTIONS,
        backlog=REFUSED,  # which asyncio accepts in one go, before any of them is looked at
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=patience,
    )
    check_interrupted()
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    server = _Server(config, folder, jobs)
    gc.freeze()  # the modules and the model stay: the interpreter's last collection would look at them for seconds
    try:
        server.run(sockets=[listener])
    finally:
        server.latest.cancel()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, folder: Path, jobs: Jobs) -> None:
        super().__init__(config)
        self.folder = folder
        self.jobs = jobs
        self.latest = Timer(LATEST_SECONDS, end_at_once, [folder])
        self.latest.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the shutdown, or ends the process when it has begun."""
        if self.should_exit:
            end_at_once(self.folder)
        self.jobs.reading.close()
        self.latest.start()
        super().handle_exit(sig, frame)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether to log it: requests that the shutdown cancels are no failures, and each would print a traceback."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)
