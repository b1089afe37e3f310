"""Reading a request's body: bounded in bytes, in time, and in what all requests hold together while they arrive."""

import anyio
from starlette.requests import Request

from stllm.serving.errors import ApiError

DISCARDED = 8  # times the limit, or this many MiB: read and dropped, so that the client gets to read the refusal
MEBIBYTE = 1 << 20


class Bodies:
    """The bodies that arrive now. most, most_together: bytes of one and of all; seconds: for one to arrive whole."""

    def __init__(self, most: int, most_together: int, seconds: float) -> None:
        self.most = most
        self.most_together = most_together
        self.seconds = seconds
        self.num_bytes = 0

    async def read(self, request: Request, *, keep: bool = True) -> bytearray | None:
        """The body; None when it is too large, or not kept. What is not kept is still read, within bounds.

        Raises ApiError when it does not arrive in time or all together are too large, starlette's ClientDisconnect when
        the client has gone.
        """
        kept = bytearray()
        num_bytes = 0
        crowded = False
        try:
            with anyio.fail_after(self.seconds):
                async for piece in request.stream():
                    num_bytes += len(piece)
                    crowded = crowded or (keep and self.num_bytes + len(piece) > self.most_together)
                    if keep and not crowded and num_bytes <= self.most:
                        kept += piece
                        self.num_bytes += len(piece)
                    elif kept:
                        self.num_bytes -= len(kept)
                        kept = bytearray()
                    if num_bytes > DISCARDED * max(self.most, MEBIBYTE):
                        break
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self.seconds:.0f} s") from None
        finally:
            self.num_bytes -= len(kept)
        if num_bytes > self.most or not keep:
            return None
        if crowded:
            raise ApiError(503, "too many large requests arrive: try again in a moment", code="server_overloaded")
        return kept
