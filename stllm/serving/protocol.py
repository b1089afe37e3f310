"""uvicorn's HTTP protocol with a time limit for a request's header, which uvicorn waits for without end."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # chosen here


class TimedProtocol(H11Protocol):
    """Closes a connection whose header, the first or a later one, is not whole in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first header."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Goes on waiting as long as a header is incomplete."""
        super().data_received(data)
        arrives = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not arrives:
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
