"""OpenAI's reply objects: a whole completion, the chunks of a streamed one, the list of models."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finished:
    """The end of an answer. text: the whole of it; reason: "stop", or "length" when max_tokens ended it.

    prompt_tokens: read by the model, those of the video included; cut_tokens: cut before by the context rule.
    """

    text: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cut_tokens: int = 0

    def usage(self) -> dict[str, int]:
        """Tokens as OpenAI counts them; `cut_tokens`, beyond OpenAI's fields, only where there are any."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            **({"cut_tokens": self.cut_tokens} if self.cut_tokens else {}),
        }


@dataclass(frozen=True)
class Reply:
    """Makes the objects of one reply."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, end: Finished) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": end.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": end.usage()}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        """A piece of the answer, as an event."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self, end: Finished) -> str:
        """What comes last where the client asked for it."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": end.usage()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def model_object(name: str, created: int) -> dict[str, Any]:
    """A model as the list of models has it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "stllm"}


def event(value: dict[str, Any]) -> str:
    """A server-sent event with JSON in it."""
    return f"data: {json.dumps(value)}\n\n"
