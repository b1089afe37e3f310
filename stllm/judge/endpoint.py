"""A judge behind an OpenAI-compatible endpoint: several items at a time, one chat completion per item.

openai's client retries requests (429, 5xx, timeouts, broken connections), with growing pauses or those that the server
requests. `_JudgeHttp` adds a time limit for the whole reply, and decides which failures are retried. If a judge refuses
a system message, `max_tokens` or the temperature, later requests omit it. Refused requests count towards --max-retries.
"""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai

from stllm.common.errors import UserError
from stllm.common.files import server_address
from stllm.common.jsonl import loads
from stllm.judge.items import JudgeItem, Messages, PromptSet, without_system
from stllm.judge.ledger import JudgeReply, Ledger, verdict_of
from stllm.judge.parser import CutOff, Unparsable

log = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NUM_REASKS = 2  # further requests for an item if a reply has no score
MAX_FAILED_IN_A_ROW = 10  # after so many failed items, asking stops
NUM_CHARACTERS = 120  # characters of a server's text that a message quotes
ADVICE = {
    401: "it does not accept the key: name the environment variable that holds the right one with --api-key-env",
    403: "the key may not use this model or endpoint: use another key (--api-key-env), --model or --base-url",
    404: "it knows no such path or model: check --base-url (it usually ends in /v1) and --model",
}
CUT_OFF = ("length", "model_length", "max_tokens", "max_output_tokens")  # finish reasons of different servers

# part of a request that a judge may refuse -> pattern of the server's error message
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

AGAIN, ITEM, RUN = "again", "item", "run"


@dataclass(frozen=True)
class _Failure:
    """A failed request. why: the reason.

    kind: AGAIN if a retry may help; ITEM if this item cannot be judged; RUN if no item can be judged; a key of REFUSALS
    if the judge does not accept that part of the request.
    """

    kind: str
    why: str


class Endpoint:
    """An OpenAI-compatible server and one of its models.

    settings: fields of every request: `model`, `temperature` and optionally `max_tokens`. base_url: None for OpenAI.
    api_key_env: environment variable with the key. By default, OPENAI_API_KEY is sent to OpenAI only, and no key to
    other servers. timeout: seconds for a whole reply. Attribute address: the URL without password, used in error
    messages.
    Raises UserError for an invalid URL, and for a key that is missing or malformed.
    """

    def __init__(
        self, settings: dict[str, Any], *, base_url: str | None, api_key_env: str | None, timeout: float
    ) -> None:
        url = base_url or OPENAI_URL
        self.address = server_address(url, "--base-url")
        name = api_key_env or (OPENAI_KEY if base_url is None else None)
        key = "none" if name is None else os.environ.get(name, "").strip()
        if not key:
            raise UserError(
                f"the environment variable {name} is not set: put the endpoint's key into it, name another with "
                "--api-key-env, or the URL of a server of your own with --base-url"
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {name} holds characters that no key has: copy the key anew")
        http = _JudgeHttp(self.address, timeout)
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, http_client=http)
        self._settings = settings
        self._refused: set[str] = set()  # keys of REFUSALS that this judge does not accept

    async def ask(
        self,
        items: Sequence[JudgeItem],
        ledger: Ledger,
        prompts: PromptSet,
        *,
        concurrency: int,
        max_attempts: int,
        done: Callable[[], Any],
    ) -> str | None:
        """Have all items judged, `concurrency` at a time. Return the reason for stopping early, or None.

        max_attempts: maximum number of requests per item. done: function that is called after each item.
        """
        axis = ledger.run.axis
        waiting = iter(items)  # shared by the workers; each takes the next item
        num_failed = 0  # consecutive failures

        def is_final(item: JudgeItem, reply: JudgeReply) -> bool:
            """Check whether asking again is useless: there is a verdict, no reply, or a reply that was cut off."""
            try:
                return reply.reply is None or bool(verdict_of(item, axis, reply.reply, cut=reply.cut))
            except Unparsable as fault:
                return isinstance(fault, CutOff)

        async def work() -> None:
            nonlocal num_failed
            for item in waiting:
                messages = prompts.messages(axis, item)
                attempts = 0
                for _ in range(NUM_REASKS + 1):
                    reply = await self._reply(messages, max_attempts - attempts)
                    attempts += reply.attempts
                    if attempts >= max_attempts or is_final(item, reply):
                        break
                entry = ledger.append(item, replace(reply, attempts=attempts))
                done()
                num_failed = 0 if entry.is_scored else num_failed + 1
                if num_failed >= MAX_FAILED_IN_A_ROW:
                    raise UserError(
                        f"{num_failed} items in a row failed (the last one: {entry.outcome}): correct that, or check "
                        f"that the judge at {self.address} works, then run the command again"
                    )

        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(items)))]
        try:
            await asyncio.gather(*workers)
        except UserError as stop:  # the ledger raises it, too, if another judge replies
            return str(stop)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._client.close()
        return None

    async def _reply(self, messages: Messages, max_attempts: int) -> JudgeReply:
        """Request a reply from the judge, at most `max_attempts` times. Raises UserError if no item can be judged."""
        attempts = 0
        while True:
            body = {**self._settings, "messages": without_system(messages) if SYSTEM in self._refused else messages}
            if MAX_TOKENS in self._refused:
                body["max_completion_tokens"] = body.pop("max_tokens")
            if TEMPERATURE in self._refused:
                del body["temperature"]
            options: Any = {"max_retries": max_attempts - attempts - 1}
            try:
                response = await self._client.post(
                    "/chat/completions", cast_to=httpx.Response, body=body, options=options
                )
            except openai.APIStatusError as error:
                response = error.response
            outcome: JudgeReply | _Failure = response.extensions["outcome"]
            # openai's client counts its retries in a header
            attempts += int(response.request.headers.get("x-stainless-retry-count", 0)) + 1
            if isinstance(outcome, JudgeReply):
                return replace(outcome, model=outcome.model or self._settings["model"], attempts=attempts)
            if outcome.kind == RUN:
                raise UserError(outcome.why)
            if outcome.kind == AGAIN and attempts < max_attempts:  # openai's client waits two minutes at most
                pause = response.headers.get("retry-after", "")
                pause = f"of {pause} s" if pause.isdigit() else f"until {pause or 'later'}"
                raise UserError(f"{outcome.why} and asks for a pause {pause}: run the same command again after that")
            if outcome.kind in (AGAIN, ITEM):
                return JudgeReply(error=outcome.why, attempts=attempts)
            if outcome.kind not in self._refused:
                log.warning("%s", outcome.why)
                self._refused.add(outcome.kind)
            if attempts >= max_attempts:
                too_few = f"{outcome.why}: raise --max-retries, which left no request for that"
                return JudgeReply(error=too_few, attempts=attempts)


class _JudgeHttp(openai.DefaultAsyncHttpxClient):
    """HTTP client for openai's client. It decides about retries by the header `x-should-retry` of a response.

    `outcome` in the extensions of each response is a JudgeReply or a _Failure.
    """

    def __init__(self, server: str, seconds: float) -> None:
        super().__init__(timeout=seconds)
        self._server, self._seconds = server, seconds
        self._warned: set[str] = set()

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request once. A response that is not a chat completion gets an error status if it has none."""
        response = httpx.Response(503, request=request)
        outcome: JudgeReply | _Failure
        try:
            # httpx's own timeout applies to each chunk of a reply; this one to the whole reply
            response = await asyncio.wait_for(super().send(request, **options), self._seconds)
            outcome = _reply(response.content) if response.is_success else self._failure(response)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            outcome = _Failure(AGAIN, f"no whole reply within {self._seconds:g} s (--timeout)")
        except httpx.HTTPError as error:
            outcome = _Failure(AGAIN, f"the endpoint cannot be reached ({_short(str(error) or type(error).__name__)})")
        if isinstance(outcome, _Failure):
            if response.is_success:
                response = httpx.Response(503, request=request)
            response.headers["x-should-retry"] = str(outcome.kind == AGAIN).lower()
            beginning = outcome.why.partition(" (")[0].partition(":")[0]
            if outcome.kind == AGAIN and beginning not in self._warned:  # once, to explain a slow progress bar
                self._warned.add(beginning)
                log.warning("%s: such requests are sent again, up to --max-retries times", outcome.why)
        response.extensions["outcome"] = outcome
        return response

    def _failure(self, response: httpx.Response) -> _Failure:
        """Return the kind of failure that a response with an error status stands for."""
        status, body = response.status_code, _json(response.content)
        error = body.get("error", body) if isinstance(body, dict) else None
        message, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (None, None)
        words = str(message or response.text or response.reason_phrase or "no words")
        said = _short(words)
        if status in (400, 422, 500):
            sent = _json(response.request.content) or {"messages": []}  # a redirect may have dropped the body
            sent = {*sent, *(message["role"] for message in sent["messages"])}
            for part, pattern in REFUSALS.items():
                if part in sent and re.search(pattern, words[:400].lower()):  # later text may quote the request
                    return _Failure(part, f"{WITHOUT[part]} ({said})")
        if status in ADVICE:
            return _Failure(RUN, f"{self._server} answered {status} ({said}): {ADVICE[status]}")
        if code == "insufficient_quota":
            return _Failure(RUN, f"{self._server} answered {status} ({said}): the account has nothing left; top it up")
        if code == "content_filter":
            return _Failure(ITEM, f"refused by the server's content filter ({said})")
        if status in (408, 409, 429) or status >= 500:
            return _Failure(AGAIN, f"the endpoint answered {status} ({said})")
        return _Failure(ITEM, f"the endpoint rejects the request with {status} ({said})")


def _reply(content: bytes) -> JudgeReply | _Failure:
    """Read a chat completion, whatever content type the server declared."""
    body = _json(content)
    start = _short(content[: 4 * NUM_CHARACTERS].decode("utf-8", "replace"))
    if body is None:
        kind = "HTML" if start.lower().startswith(("<!doctype", "<html")) else "no JSON"
        return _Failure(AGAIN, f"the endpoint answered {kind} in place of a chat completion: {start!r}")
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        reason, model = str(choice.get("finish_reason")).lower(), body.get("model")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError):
        return _Failure(AGAIN, f"the endpoint answered no chat completion: {start!r}")
    if refusal or reason == "content_filter":
        return _Failure(ITEM, f"refused by the judge ({_short(str(refusal or reason))})")
    if isinstance(text, list):  # some servers send a list of parts
        reasoning = reasoning or any(isinstance(part, dict) and part.get("type") == "thinking" for part in text)
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    cut = reason in CUT_OFF
    if isinstance(text, str) and text.strip():
        return JudgeReply(text, model if isinstance(model, str) else None, cut=cut)
    if reasoning or cut:
        return _Failure(ITEM, "the judge spent all its tokens on reasoning and gave no answer: raise --max-tokens")
    return _Failure(AGAIN, "the endpoint answered an empty message")


def _json(content: bytes) -> Any:
    """Parse JSON; None if it is invalid."""
    try:
        return loads(content)
    except ValueError:
        return None


def _short(words: str) -> str:
    """Return the text as one line of at most NUM_CHARACTERS."""
    text = " ".join(words.split())
    return text if len(text) <= NUM_CHARACTERS else f"{text[: NUM_CHARACTERS - 3]}..."
