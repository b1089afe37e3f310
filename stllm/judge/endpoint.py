"""A judge behind an OpenAI-compatible endpoint: one chat completion for each call.

openai's client repeats requests (429, 5xx, timeouts, broken connections), with growing pauses or those that the server
asks for. `_Http` below it adds a limit of time for the whole reply, and says which failures are worth repeating. A
judge that refuses a system message, `max_tokens` or the temperature is asked without it from then on; the refused
requests count like all others.
"""

import asyncio
import json
import logging
import re
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai

from stllm.common.errors import UserError
from stllm.judge.prompts import Messages, without_system

log = logging.getLogger(__name__)

NUM_CHARACTERS = 120  # of a server's words in a message
ADVICE = {
    401: "it does not accept the key: name the environment variable that holds the right one with --api-key-env",
    403: "the key may not use this model or endpoint: use another key (--api-key-env), --model or --base-url",
    404: "it knows no such path or model: check --base-url (it usually ends in /v1) and --model",
}
CUT_OFF = ("length", "model_length", "max_tokens", "max_output_tokens")  # finish reasons of different servers

# What a judge may refuse, and how its server words that: vLLM, TGI, LM Studio and llama.cpp quote the chat template.
SYSTEM, MAX_TOKENS, TEMPERATURE = "system", "max_tokens", "temperature"
REFUSALS = {
    SYSTEM: r"\bsystem\b.{0,40}\b(role|message|prompt|instruction)|\brole.{0,60}\bsystem\b|developer instruction"
    r"|roles must alternate|only .{0,20}user.{0,30} roles",
    MAX_TOKENS: r"max_completion_tokens|max_tokens.{0,20}not support|unsupported.{0,20}max_tokens",
    TEMPERATURE: r"temperature.*(unsupported|not support|not allowed|not permitted|only|deprecated|strictly positive)"
    r"|(unsupported|not support|not allowed|not permitted|deprecated).*temperature",
}
WITHOUT = {
    SYSTEM: "the judge takes no system message, so the instructions go into the user's message",
    MAX_TOKENS: "the judge takes max_completion_tokens in place of max_tokens",
    TEMPERATURE: "the judge refuses --temperature, so it uses its own",
}


@dataclass(frozen=True)
class Reply:
    """A judge's reply, or the reason why there is none (error).

    model: the exact id that the server returned. cut: whether the reply was stopped at the limit of tokens.
    attempts: the number of requests it took.
    """

    text: str = ""
    model: str | None = None
    cut: bool = False
    attempts: int = 0
    error: str | None = None


class Stopped(UserError):
    """Nothing more can come of this endpoint now: the whole run stops, and what is finished stays."""


class Endpoint:
    """An OpenAI-compatible server and a model there.

    timeout: seconds for a whole reply, however slowly it arrives.
    """

    def __init__(
        self, *, base_url: str, model: str, api_key: str, timeout: float, temperature: float, max_tokens: int | None
    ) -> None:
        self.base_url = base_url
        self._settings: dict[str, Any] = {"model": model, "temperature": temperature}
        if max_tokens is not None:
            self._settings["max_tokens"] = max_tokens
        http = _Http(base_url, timeout)
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=timeout, http_client=http)
        self._refused: set[str] = set()  # keys of REFUSALS that this judge does not take

    async def reply(self, messages: Messages, max_attempts: int) -> Reply:
        """Ask, with at most so many requests. Raises Stopped when no item can be asked any more."""
        attempts = 0
        while True:
            body = {**self._settings, "messages": without_system(messages) if SYSTEM in self._refused else messages}
            if MAX_TOKENS in self._refused:
                body["max_completion_tokens"] = body.pop("max_tokens")
            if TEMPERATURE in self._refused:
                del body["temperature"]
            try:
                response = await self._client.post(
                    "/chat/completions",
                    cast_to=httpx.Response,
                    body=body,
                    options={"max_retries": max_attempts - attempts - 1},
                )
            except openai.APIConnectionError as error:  # of `_Http.send`; timeouts, too
                return Reply(error=str(error.__cause__), attempts=attempts + _num_requests(error.request))
            except openai.APIStatusError as error:
                attempts += _num_requests(error.request)
                failure = error.response.extensions["failure"]
                if isinstance(failure, Stopped):
                    raise failure from None
                if isinstance(failure, _Fault) and attempts < max_attempts:  # openai's client waits two minutes at most
                    pause = error.response.headers.get("retry-after", "")
                    raise Stopped(
                        f"{failure} and asks for a pause {f'of {pause} s' if pause.isdigit() else f'until {pause}'}: "
                        "run the same command again after that"
                    ) from None
                if not isinstance(failure, _Unsupported):
                    return Reply(error=str(failure), attempts=attempts)
                if failure.part not in self._refused:
                    log.warning("%s", failure)
                    self._refused.add(failure.part)
                if attempts >= max_attempts:
                    error_ = f"{failure}: raise --max-retries, which left no request for that"
                    return Reply(error=error_, attempts=attempts)
            else:
                found: Reply = response.extensions["reply"]
                model = found.model or self._settings["model"]
                return replace(found, model=model, attempts=attempts + _num_requests(response.request))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class _Fault(Exception):
    """A request that failed and is worth repeating."""


class _Unsupported(Exception):
    """A part of the request (a key of REFUSALS) that the judge does not take."""

    def __init__(self, part: str, said: str) -> None:
        super().__init__(f"{WITHOUT[part]} ({said})")
        self.part = part


class _Http(openai.DefaultAsyncHttpxClient):
    """The HTTP client below openai's, which repeats a request when `send` raises, or as `x-should-retry` says.

    The extensions of a response hold the `reply` or, for an error status, the `failure` that it means.
    """

    def __init__(self, base_url: str, seconds: float) -> None:
        super().__init__(timeout=seconds)
        self._server, self._seconds = base_url, seconds
        self._warned: set[str] = set()

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request once. Raises _Fault for what is neither a chat completion nor an error status."""
        try:
            # httpx's own timeout is for each piece of a reply; this one is for all of it.
            response = await asyncio.wait_for(super().send(request, **options), self._seconds)
            if response.is_success:
                response.extensions["reply"] = _reply(response.content)
                return response
        except (asyncio.TimeoutError, httpx.TimeoutException):
            fault = _Fault(f"no whole reply within {self._seconds:g} s (--timeout)")
        except httpx.HTTPError as error:
            fault = _Fault(f"the endpoint cannot be reached ({_short(str(error) or type(error).__name__)})")
        except _Fault as error:
            fault = error
        else:
            failure = response.extensions["failure"] = self._failure(response)
            response.headers["x-should-retry"] = str(isinstance(failure, _Fault)).lower()
            if isinstance(failure, _Fault):
                self._warn(failure)
            return response
        self._warn(fault)
        raise fault

    def _warn(self, fault: _Fault) -> None:
        """Log each kind of fault once, so that a person sees why nothing moves."""
        kind = str(fault).partition(" (")[0].partition(":")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s: such requests are sent again, up to --max-retries times", fault)

    def _failure(self, response: httpx.Response) -> Exception:
        """What an error status means: _Fault, _Unsupported, Stopped, or another exception for this item."""
        status, body = response.status_code, _json(response.content)
        error = body.get("error", body) if isinstance(body, dict) else None
        message, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (None, None)
        words = str(message or response.text or response.reason_phrase or "no words")
        said = _short(words)
        if status in (400, 422, 500):
            sent = json.loads(response.request.content)
            sent = {*sent, *(message["role"] for message in sent["messages"])}
            for part, pattern in REFUSALS.items():
                if part in sent and re.search(pattern, words[:400].lower()):  # some servers repeat the whole request
                    return _Unsupported(part, said)
        if status in ADVICE:
            return Stopped(f"{self._server} answered {status} ({said}): {ADVICE[status]}")
        if code == "insufficient_quota":
            return Stopped(f"{self._server} answered {status} ({said}): the account has nothing left; top it up")
        if code == "content_filter":
            return Exception(f"refused by the server's content filter ({said})")
        if status in (408, 409, 429) or status >= 500:
            return _Fault(f"the endpoint answered {status} ({said})")
        return Exception(f"the endpoint rejects the request with {status} ({said})")


def _reply(content: bytes) -> Reply:
    """Read a chat completion, whatever the server called its type. Raises _Fault for anything else."""
    body = _json(content)
    if body is None:
        start = content[:NUM_CHARACTERS].decode("utf-8", "replace")
        kind = "HTML" if start.lstrip().lower().startswith(("<!doctype", "<html")) else "no JSON"
        raise _Fault(f"the endpoint answered {kind} in place of a chat completion: {_short(start)!r}")
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        reason, model = str(choice.get("finish_reason")).lower(), body.get("model")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Fault(
            f"the endpoint answered no chat completion: {_short(content.decode(errors='replace'))!r}"
        ) from None
    if refusal or reason == "content_filter":
        return Reply(error=f"refused by the judge ({_short(str(refusal or reason))})")
    cut = reason in CUT_OFF
    if isinstance(text, list):  # pieces, as some servers put it
        reasoning = reasoning or any(isinstance(part, dict) and part.get("type") == "thinking" for part in text)
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if isinstance(text, str) and text.strip():
        return Reply(text, model if isinstance(model, str) else None, cut)
    if reasoning or cut:
        return Reply(error="the judge spent all its tokens on reasoning and gave no answer: raise --max-tokens")
    raise _Fault("the endpoint answered an empty message")


def _num_requests(request: httpx.Request) -> int:
    """The number of times that openai's client sent this request: it counts the repetitions in a header."""
    return int(request.headers.get("x-stainless-retry-count", 0)) + 1


def _json(content: bytes) -> Any:
    """What the bytes hold; None for no JSON, nesting too deep, or a number too long to read."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _short(words: str) -> str:
    """The words in one line of at most NUM_CHARACTERS."""
    text = " ".join(words.split())
    return text if len(text) <= NUM_CHARACTERS else f"{text[: NUM_CHARACTERS - 3]}..."
