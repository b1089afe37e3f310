"""OpenAI's chat completion objects: the request, checked and converted to one for the engine, and the replies.

Fields of a request that would change the answer and that this engine does not support are refused, not ignored. An
error reveals nothing about this machine: no paths, no tracebacks.
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
MAX_MESSAGES, MAX_PARTS = 1000, 100  # chosen here
PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL: dict[str, Any] = {  # taken with this value, or null
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
    num_frames: int | None = Field(None, ge=1)  # beyond OpenAI's


@dataclass(frozen=True)
class Asked:
    """The content of one request. url: of its video or image; num_frames: None for the model's usual number."""

    turns: tuple[Turn, ...]
    system: str | None
    url: str | None
    num_frames: int | None
    decoding: Decoding
    stream: bool
    include_usage: bool


def parse_request(body: bytes, *, model: str, usual: Decoding, limits: Limits) -> Asked:
    """Parse a request. model: the name served here; usual: the settings for omitted fields. Raises ApiError."""
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
    try:  # one beam: an answer can then be streamed and stopped, and it is the same whether it is streamed or not
        decoding = replace(
            usual,
            num_beams=1,
            max_new_tokens=longest or min(usual.max_new_tokens, limits.new_tokens),
            temperature=wanted.temperature or 0.0,
            top_p=usual.top_p if wanted.top_p is None else wanted.top_p,
        )
    except UserError as error:  # more new tokens than the context rule has room for
        raise ApiError(400, str(error), param="max_tokens") from None
    include_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
    return Asked(turns, system, url, wanted.num_frames, decoding, bool(wanted.stream), include_usage)


def _conversation(messages: list[_Message], limits: Limits) -> tuple[str | None, tuple[Turn, ...], str | None]:
    """Return (system sentence, turns, URL). User and assistant alternate; the first user message names the medium."""
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
        read, written = self.prompt_tokens, self.completion_tokens
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {**usage, "cut_tokens": self.cut_tokens} if self.cut_tokens else usage


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


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event with JSON in it."""
    return f"data: {json.dumps(value)}\n\n"


def api_error(error: Exception) -> ApiError:
    """Turn any failure of a request into an error for the client. A defect of ours is also logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NobodyWaits):
        error = BusyError("the server is ending: try again in a moment")
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="server_overloaded")
    code = "memory" if out_of_memory(error) else None
    status = 503 if isinstance(error, EngineError) else 400 if isinstance(error, UserError) else 500
    return ApiError(status, explain(error, NEED_LESS), code=code)
