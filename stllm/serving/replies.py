"""OpenAI's reply objects: a whole completion, the chunks of a streamed one, the list of models, and errors.

An error reveals nothing about this machine: no paths, no tracebacks.
"""

import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch

from stllm.common.errors import UserError, out_of_memory
from stllm.media.reading import NobodyWaits
from stllm.serving.jobs import BusyError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2


@dataclass(frozen=True)
class Finished:
    """The end of an answer. text: the whole answer; reason: "stop", or "length" when max_tokens ended it.

    prompt_tokens: read by the model, including those of the video; cut_tokens: removed by the context rule.
    """

    text: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cut_tokens: int = 0

    def usage(self) -> dict[str, int]:
        """Count tokens as OpenAI does. `cut_tokens`, which OpenAI does not have, is added only when tokens were cut."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            **({"cut_tokens": self.cut_tokens} if self.cut_tokens else {}),
        }


@dataclass(frozen=True)
class Reply:
    """The objects of one reply."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, end: Finished) -> dict[str, Any]:
        """Return the whole answer."""
        message = {"role": "assistant", "content": end.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": end.usage()}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        """Return a piece of the answer, as an event."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self, end: Finished) -> str:
        """Return the last event, for clients that request the usage."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": end.usage()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def model_object(name: str, created: int) -> dict[str, Any]:
    """Return an entry of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "stllm"}


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event with JSON in it."""
    return f"data: {json.dumps(value)}\n\n"


class ApiError(Exception):
    """An error for the client. status: of HTTP; param: the field of the request at fault."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return Retry-After when trying again can help."""
        return {"Retry-After": str(RETRY_SECONDS)} if self.status == 503 else {}


def api_error(error: BaseException) -> ApiError:
    """Turn any failure of a request into an error for the client. A defect of ours is also logged."""
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
