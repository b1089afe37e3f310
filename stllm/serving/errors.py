"""What goes wrong, as OpenAI's error objects; nothing of this machine (paths, tracebacks) is in them."""

import logging
from typing import Any

import torch

from stllm.common.errors import UserError, out_of_memory
from stllm.media.reading import NobodyWaits
from stllm.serving.jobs import BusyError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2


class ApiError(Exception):
    """An error that the client is told. status: of HTTP; param: the field of the request that is meant."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI's object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After, where trying again helps."""
        return {"Retry-After": str(RETRY_SECONDS)} if self.status == 503 else {}


def api_error(error: BaseException) -> ApiError:
    """Any failure of a request, as what the client is told. What is a defect of ours goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="server_overloaded")
    if isinstance(error, NobodyWaits):
        return ApiError(503, "the server is ending: try again in a moment", code="server_overloaded")
    if isinstance(error, UserError):
        return ApiError(400, " ".join(str(error).split()))
    if isinstance(error, Exception) and out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ApiError(
            500, "not enough memory for this request: ask about a shorter video or with fewer frames", code="memory"
        )
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")
