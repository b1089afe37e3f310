"""Reading a request's body: bounded in bytes and in time."""

import anyio
from starlette.requests import Request

from stllm.serving.errors import ApiError

DISCARDED = 8  # times the limit, or this many MiB: read and dropped, so that the client gets to read the refusal
MEBIBYTE = 1 << 20


async def read_body(request: Request, most: int, seconds: float) -> bytes | None:
    """The body; None when it has more than `most` bytes. What is beyond is not kept.

    Raises ApiError when it does not arrive in time, starlette's ClientDisconnect when the client has gone.
    """
    kept = bytearray()
    num_bytes = 0
    try:
        with anyio.fail_after(seconds):
            async for piece in request.stream():
                num_bytes += len(piece)
                if num_bytes <= most:
                    kept += piece
                elif num_bytes > DISCARDED * max(most, MEBIBYTE):
                    break
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {seconds:.0f} s") from None
    return bytes(kept) if num_bytes <= most else None
