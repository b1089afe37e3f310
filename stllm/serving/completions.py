"""OpenAI's chat completion objects: parsing of requests, and the objects of replies.

A field that would change the answer but is not supported here is refused, not ignored. Errors contain no paths of this
machine and no tracebacks.
"""

import json
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stllm.common.errors import UserError, out_of_memory, unknown_name
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import EngineError
from stllm.media.reading import NobodyWaits
from stllm.processors.templates import Turn
from stllm.serving.jobs import BusyError, explain
from stllm.serving.limits import ApiError, Limits

NEED_LESS = "send a smaller num_frames or max_tokens, or shorter messages"
MAX_MESSAGES, MAX_PARTS = 1000, 100  # messages in a request, parts in a message; our choice
PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # ignored fields
NEUTRAL: dict[str, Any] = {  # fields that are accepted only with this value, or null
    "n": 1,
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "stop": [],
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "top_logprobs": 0,
    "seed": None,
    "reasoning_effort": None,
}


class _Url(BaseModel):
    url: str


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Video(BaseModel):
    type: Literal["video_url"]
    video_url: _Url


class _Image(BaseModel):
    type: Literal["image_url"]
    image_url: _Url


_Part = Annotated[_Text | _Video | _Image, Field(discriminator="type")]


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, _Text))

    def urls(self) -> list[str]:
        parts = [] if isinstance(self.content, str) else self.content
        videos = [part.video_url.url for part in parts if isinstance(part, _Video)]
        return videos + [part.image_url.url for part in parts if isinstance(part, _Image)]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[_Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    num_frames: int | None = Field(None, ge=1)  # an extension, not one of OpenAI's fields


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request. url: URL of its video or image; None without one. num_frames: None for the model's default."""

    turns: tuple[Turn, ...]
    system: str | None
    url: str | None
    num_frames: int | None
    decoding: Decoding
    stream: bool
    include_usage: bool


def parse_request(body: bytes, *, model: str, usual: Decoding, limits: Limits) -> ChatRequest:
    """Parse and check a request. Raises ApiError.

    model: the name of the served model. usual: default settings of generation.
    """
    try:
        wanted = _Body.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise ApiError(400, f"the request is not as expected: {what}", param=place or None) from None
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply") from None
    if wanted.model != model:
        message = f"the model {wanted.model[:100]!r} is not served here, but {model!r} is"
        raise ApiError(404, message, code="model_not_found")
    for name, value in (wanted.model_extra or {}).items():
        if name in PASSED_OVER or (name in NEUTRAL and value in (None, NEUTRAL[name])):
            continue
        if name in NEUTRAL:
            raise ApiError(400, f"{name} is not supported by this server: leave it out", param=name)
        known = {*_Body.model_fields, *PASSED_OVER, *NEUTRAL}
        raise ApiError(400, unknown_name("field", name[:100], known), param=name[:100])
    system, turns, url = _conversation(wanted.messages, limits)
    longest = wanted.max_completion_tokens or wanted.max_tokens
    for name, value, most in (
        ("num_frames", wanted.num_frames, limits.frames),
        ("max_tokens", longest, limits.new_tokens),
    ):
        if value is not None and value > most:
            raise ApiError(400, f"{name} is {value}, at most {most} are taken", param=name)
    try:  # always one beam, so that an answer is the same with and without streaming
        decoding = replace(
            usual,
            num_beams=1,
            max_new_tokens=longest or min(usual.max_new_tokens, limits.new_tokens),
            temperature=wanted.temperature or 0.0,
            top_p=usual.top_p if wanted.top_p is None else wanted.top_p,
        )
    except UserError as error:  # too many new tokens for the context rule
        raise ApiError(400, str(error), param="max_tokens") from None
    include_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
    return ChatRequest(turns, system, url, wanted.num_frames, decoding, bool(wanted.stream), include_usage)


def _conversation(messages: list[_Message], limits: Limits) -> tuple[str | None, tuple[Turn, ...], str | None]:
    """Return (system message, turns, URL of the medium). Raises ApiError.

    User and assistant messages must alternate, and only the first user message may have a medium.
    """
    num_parts = max(1 if isinstance(message.content, str) else len(message.content) for message in messages)
    if num_parts > MAX_PARTS:
        raise ApiError(400, f"a message has {num_parts} parts, at most {MAX_PARTS} are taken", param="messages")
    texts = [message.text() for message in messages]
    if (length := sum(map(len, texts))) > limits.text_characters:
        message = f"the messages have {length} characters, at most {limits.text_characters} are taken"
        raise ApiError(400, message, code="context_length_exceeded", param="messages")
    system = texts.pop(0) if messages[0].role in ("system", "developer") else None
    spoken = messages[int(system is not None) :]
    if [one.role for one in spoken] != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        message = (
            "expected at most one system message, then user and assistant messages by turns, the last one the user's"
        )
        found = ", ".join(one.role for one in messages[:20])
        raise ApiError(400, f"{message}; found {found}", param="messages")
    urls, first_urls = [url for one in messages for url in one.urls()], spoken[0].urls()
    if len(urls) > 1 or urls != first_urls:
        message = "a conversation is about one video or image, which the first user message names"
        raise ApiError(400, f"{message}; found {len(urls)}, {len(first_urls)} of them there", param="messages")
    turns = tuple(Turn(*pair) for pair in zip(texts[::2], [*texts[1::2], None], strict=True))
    return system, turns, (urls[0] if urls else None)


# ---- replies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """The result of a completion. text: the whole answer. reason: "stop", or "length" if max_tokens ended it.

    prompt_tokens: number of text and visual tokens in the prompt. cut_tokens: number removed by the context rule.
    """

    text: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cut_tokens: int = 0

    def usage(self) -> dict[str, int]:
        """Return OpenAI's usage object. If tokens were cut, it has the additional field `cut_tokens`."""
        read, written = self.prompt_tokens, self.completion_tokens
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {**usage, "cut_tokens": self.cut_tokens} if self.cut_tokens else usage


@dataclass(frozen=True)
class Reply:
    """Builder of the JSON objects of one reply, which share an id."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, end: Finished) -> dict[str, Any]:
        """Return the object of a reply that is not streamed."""
        message = {"role": "assistant", "content": end.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": end.usage()}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        """Return an event with a piece of the answer. reason: why the answer ended, in its last chunk."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self, end: Finished) -> str:
        """Return the event with the usage, which clients may request as the last one."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": end.usage()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event with the value as JSON."""
    return f"data: {json.dumps(value)}\n\n"


def api_error(error: Exception) -> ApiError:
    """Convert any exception into an error for the client. Unexpected ones are also logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NobodyWaits):
        error = BusyError("the server is ending: try again in a moment")
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="server_overloaded")
    code = "memory" if out_of_memory(error) else None
    status = 503 if isinstance(error, EngineError) else 400 if isinstance(error, UserError) else 500
    return ApiError(status, explain(error, NEED_LESS), code=code)
