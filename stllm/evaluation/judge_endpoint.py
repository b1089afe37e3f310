"""A judge behind an OpenAI-compatible endpoint: one chat completion at a time, asked again while that can help.

429, 5xx, timeouts, broken connections and replies that are no chat completion are asked again after a pause that grows
(exponential, with jitter) or that the server names (Retry-After), at most so many times. A judge that refuses a system
message, `max_tokens` or the temperature is asked without it from then on; the refused requests count like all others.
Keys and paths that the server does not accept stop the whole run.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from stllm.common.errors import UserError
from stllm.common.json_text import loads
from stllm.evaluation.judge_prompts import Messages, without_system

LONGEST_PAUSE = 300.0  # seconds that a server may ask for; a longer pause ends the run, which can be continued
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
class Backoff:
    """The pause before the n-th repetition: random, at most first * 2**n seconds and never more than longest."""

    first: float = 1.0
    longest: float = 60.0


BACKOFF = Backoff()


@dataclass(frozen=True)
class Reply:
    """A judge's reply.

    model: the exact id that the server returned. cut: whether the reply was stopped at the limit of tokens.
    attempts: the number of requests it took.
    """

    text: str
    model: str
    cut: bool
    attempts: int


class Stopped(UserError):
    """Nothing more can come of this endpoint now: the whole run stops, and what is finished stays."""


class AskFailed(Exception):
    """No reply to this item; str() says why in a sentence."""

    def __init__(self, message: str, attempts: int) -> None:
        super().__init__(message)
        self.attempts = attempts


class _Refused(Exception):
    """The server will not answer this item, however often it is asked."""


class _Transient(Exception):
    """Asking again may help. pause: seconds that the server asks for, if it does."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class _Adapted(_Transient):
    """The request is changed to what the judge takes, and sent again at once."""


class Endpoint:
    """An OpenAI-compatible server and a model there.

    timeout: seconds for a whole reply, however slowly it arrives. max_retries: further requests that an item may take,
    for whatever reason. on_fault: is called with a description of each fault after which the request is sent again.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str,
        timeout: float,
        max_retries: int,
        temperature: float,
        max_tokens: int | None = None,
        backoff: Backoff | None = None,
        on_fault: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.base_url, self.model, self.timeout, self.max_retries = base_url, model, timeout, max_retries
        self._settings: dict[str, Any] = {"model": model, "temperature": temperature}
        if max_tokens is not None:
            self._settings["max_tokens"] = max_tokens
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0)
        backoff = backoff or BACKOFF
        self._pause = wait_random_exponential(multiplier=backoff.first, max=backoff.longest)
        self._on_fault, self._sleep = on_fault, sleep
        self._refused: frozenset[str] = frozenset()  # keys of REFUSALS that this judge does not take
        self._open_at = 0.0  # the moment until which the server asked all of us to wait

    async def reply(self, messages: Messages, max_attempts: int | None = None) -> Reply:
        """The reply, after as many attempts as it takes. Raises AskFailed for this item, Stopped for all of them."""
        limit = max_attempts or self.max_retries + 1
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Transient),
            stop=stop_after_attempt(limit),
            wait=self._wait,
            sleep=self._sleep,
            reraise=True,
        )
        attempts = 0
        try:
            async for attempt in retrying:
                with attempt:
                    attempts = attempt.retry_state.attempt_number
                    text, model, cut = await self._ask(messages)
        except _Adapted as error:
            raise AskFailed(f"{error}: raise --max-retries, which left no request for that", attempts) from error
        except (_Transient, _Refused) as error:
            raise AskFailed(str(error), attempts) from error
        return Reply(text, model, cut, attempts)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: what the server asked for, or else the growing pause."""
        error = state.outcome.exception() if state.outcome else None
        self._on_fault(str(error))
        return self._pause(state) if not isinstance(error, _Transient) or error.pause is None else error.pause

    async def _ask(self, messages: Messages) -> tuple[str, str, bool]:
        """One request: the reply's text, the model's exact id, and whether the reply was cut off."""
        if (rest := self._open_at - time.monotonic()) > 0:
            await self._sleep(rest)
        refused, settings = self._refused, dict(self._settings)
        if SYSTEM in refused:
            messages = without_system(messages)
        if MAX_TOKENS in refused:
            settings["max_completion_tokens"] = settings.pop("max_tokens")
        if TEMPERATURE in refused:
            del settings["temperature"]
        create = self._client.chat.completions.with_raw_response.create
        try:
            # The client's own timeout is for each piece of a reply; this one is for all of it.
            response = await asyncio.wait_for(create(messages=messages, **settings), self.timeout)  # type: ignore[arg-type]
        except (asyncio.TimeoutError, openai.APITimeoutError):
            raise _Transient(f"no whole reply within {self.timeout:g} s (--timeout)") from None
        except openai.APIStatusError as error:
            words = _words(error)[:400].lower()  # some servers repeat the whole request further on
            for part, pattern in REFUSALS.items():
                sent = part in settings or (part == SYSTEM and messages[0]["role"] == "system")
                if sent and error.status_code in (400, 422, 500) and re.search(pattern, words):
                    self._refused |= {part}
                    raise _Adapted(f"{WITHOUT[part]} ({_said(error)})", pause=0.0) from None
            raise self._of_status(error) from None
        except openai.APIConnectionError as error:
            raise _Transient(f"the endpoint cannot be reached ({_short(error.__cause__ or error)})") from None
        return self._read(response.http_response.content)

    def _of_status(self, error: openai.APIStatusError) -> Exception:
        """What to do about a status: stop, ask again, or give this item up."""
        status, said = error.status_code, _said(error)
        if status in ADVICE:
            return Stopped(f"{self.base_url} answered {status} ({said}): {ADVICE[status]}")
        if error.code == "insufficient_quota":
            return Stopped(f"{self.base_url} answered {status} ({said}): the account has nothing left; top it up")
        if error.code == "content_filter":
            return _Refused(f"refused by the server's content filter ({said})")
        if status in (408, 409, 429) or status >= 500:
            pause = retry_after(error.response.headers)
            if pause is not None and pause > LONGEST_PAUSE:
                return Stopped(
                    f"{self.base_url} answered {status} and asks for a pause of {pause:.0f} s ({said}): run the same "
                    "command again after that"
                )
            if pause is not None:
                self._open_at = max(self._open_at, time.monotonic() + pause)
            return _Transient(f"the endpoint answered {status} ({said})", pause)
        return _Refused(f"the endpoint rejects the request with {status} ({said})")

    def _read(self, content: bytes) -> tuple[str, str, bool]:
        """Text and model of a chat completion, and whether it was cut off, whatever the server called its type."""
        try:
            body = loads(content)
        except (ValueError, RecursionError):
            start = content[:NUM_CHARACTERS].decode("utf-8", "replace")
            kind = "HTML" if start.lstrip().lower().startswith(("<!doctype", "<html")) else "no JSON"
            raise _Transient(f"the endpoint answered {kind} in place of a chat completion: {_short(start)!r}") from None
        try:
            choice = body["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
            reason, model = choice.get("finish_reason"), body.get("model")
            reasoning = message.get("reasoning_content") or message.get("reasoning")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Transient(f"the endpoint answered no chat completion: {_short(content)!r}") from None
        if refusal or reason == "content_filter":
            raise _Refused(f"refused by the judge ({_short(refusal or reason)})")
        cut = str(reason).lower() in CUT_OFF
        if isinstance(text, list):  # pieces, as some servers put it
            reasoning = reasoning or any(isinstance(part, dict) and part.get("type") == "thinking" for part in text)
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if not isinstance(text, str) or not text.strip():
            if reasoning or cut:
                raise _Refused("the judge spent all its tokens on reasoning and gave no answer: raise --max-tokens")
            raise _Transient("the endpoint answered an empty message")
        return text, model if isinstance(model, str) and model else self.model, cut


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        moment = parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, moment.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _said(error: openai.APIStatusError) -> str:
    """The server's own words about an error, in short."""
    return _short(_words(error))


def _words(error: openai.APIStatusError) -> str:
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return str(message or error.response.text or error.response.reason_phrase or "no words")


def _short(words: Any) -> str:
    """One line of at most so many characters."""
    text = " ".join((words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)).split())
    text = text or type(words).__name__
    return text if len(text) <= NUM_CHARACTERS else f"{text[: NUM_CHARACTERS - 3]}..."
