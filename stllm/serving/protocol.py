"""uvicorn's HTTP protocol, with a limit for everything that uvicorn waits for without end."""

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # chosen here: for a request's header, and for the rest of a body after an early reply
UNREAD_SECONDS = 30  # chosen here: for a client to take what lies ready for it
REFUSED = 100  # connections beyond `limit_concurrency` that are told so; more would use up the process's open files


class TimedProtocol(H11Protocol):
    """Closes connections that are held for nothing: without a header, after the reply, unread, or one too many."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first header. Where all places are taken, whoever has waited longest for one goes."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; the system looks after it, when the connection is closing, too
            client = transport.get_extra_info("socket")
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            waiting = {
                one._timer.when(): one for one in self.connections if isinstance(one, TimedProtocol) and one._timer
            }
            if waiting:
                longest = waiting[min(waiting)]
                longest._stop_waiting()
                longest.transport.abort()
            elif len(self.connections) > self.limit_concurrency + REFUSED:
                transport.abort()
        self._timer = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Goes on waiting unless a request is answered now."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
