"""OpenAI's chat completion request, checked and converted from JSON to a request to the engine.

Fields that would change the answer and that this engine does not support are refused, not ignored.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stllm.common.errors import UserError, unknown_name
from stllm.conversation.decoding import Decoding
from stllm.processors.templates import Turn
from stllm.serving.limits import Limits
from stllm.serving.replies import ApiError

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
        raise ApiError(
            404, f"the model {wanted.model[:100]!r} is not served here, but {model!r} is", code="model_not_found"
        )
    for name, value in (wanted.model_extra or {}).items():
        if name in PASSED_OVER or (name in NEUTRAL and value in (None, NEUTRAL[name])):
            continue
        if name in NEUTRAL:
            raise ApiError(400, f"{name} is not supported by this server: leave it out", param=name)
        known = {*_Body.model_fields, *PASSED_OVER, *NEUTRAL}
        raise ApiError(400, unknown_name("field", name[:100], known), param=name[:100])
    system, turns, url = _conversation(wanted.messages, limits)
    if wanted.num_frames is not None and wanted.num_frames > limits.frames:
        raise ApiError(400, f"num_frames is {wanted.num_frames}, at most {limits.frames} are taken", param="num_frames")
    longest = wanted.max_completion_tokens or wanted.max_tokens
    if longest is not None and longest > limits.new_tokens:
        raise ApiError(400, f"max_tokens is {longest}, at most {limits.new_tokens} are taken", param="max_tokens")
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
    return Asked(
        turns=turns,
        system=system,
        url=url,
        num_frames=wanted.num_frames,
        decoding=decoding,
        stream=bool(wanted.stream),
        include_usage=wanted.stream_options is not None and wanted.stream_options.include_usage,
    )


def _conversation(messages: list[_Message], limits: Limits) -> tuple[str | None, tuple[Turn, ...], str | None]:
    """Return (system sentence, turns, URL). User and assistant alternate; the first user message names the medium."""
    num_parts = max(1 if isinstance(message.content, str) else len(message.content) for message in messages)
    if num_parts > MAX_PARTS:
        raise ApiError(400, f"a message has {num_parts} parts, at most {MAX_PARTS} are taken", param="messages")
    texts = [message.text() for message in messages]
    if sum(map(len, texts)) > limits.text_characters:
        raise ApiError(
            400,
            f"the messages have {sum(map(len, texts))} characters, at most {limits.text_characters} are taken",
            code="context_length_exceeded",
            param="messages",
        )
    system = texts[0] if messages[0].role in ("system", "developer") else None
    spoken = list(zip(messages, texts, strict=True))[int(system is not None) :]
    if [message.role for message, _ in spoken] != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        found = ", ".join(message.role for message in messages[:20])
        raise ApiError(
            400,
            "expected at most one system message, then user and assistant messages by turns, the last one the user's; "
            f"found {found}",
            param="messages",
        )
    urls = [url for message in messages for url in message.urls()]
    if len(urls) > 1 or urls != spoken[0][0].urls():
        raise ApiError(
            400,
            "a conversation is about one video or image, which the first user message names; "
            f"found {len(urls)}, {len(spoken[0][0].urls())} of them there",
            param="messages",
        )
    spoken_texts = [text for _, text in spoken]
    answered = zip(spoken_texts[::2], [*spoken_texts[1::2], None], strict=True)
    return system, tuple(Turn(question, answer) for question, answer in answered), (urls[0] if urls else None)
