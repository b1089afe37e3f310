"""An engine: a server, such as vLLM, that runs the language model on prompt embeddings.

This process reads and encodes videos and embeds prompts. It sends the embeddings to `POST /v1/completions` as
`prompt_embeds` (base64 of `torch.save`), and receives token ids (vLLM's documentation, "Prompt Embedding Inputs"). The
engine schedules the requests. openai's client sends many at a time from one background thread, and retries those with
a temporary failure. Letters in shapes: S tokens of a prompt, D width of the language model.
"""

import asyncio
import base64
import io
import logging
import math
import os
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

import httpx
import openai
import torch
from torch import Tensor, nn

from stllm.common.errors import UserError
from stllm.common.files import server_address
from stllm.common.jsonl import loads
from stllm.conversation.decoding import MIN_TEMPERATURE, Decoding
from stllm.conversation.requests import EngineError, RequestError

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_IN_FLIGHT = 64  # requests at once; the engine queues what it cannot run
SECONDS = 600.0  # time limit for one answer
NUM_RETRIES = 8  # openai's client pauses 0.5 to 8 s between them, about 40 s in all, enough to restart an engine
API_KEY = "VLLM_API_KEY"  # environment variable with the key; `vllm serve` reads the same one
NUM_PROBES = 8  # tokens of the prompt that compares the models
TOLERANCE = 0.25  # nats; more than between bfloat16 and float32, less than between two models
WATCH_SECONDS = 60.0  # without a reply for so long, check that the engine is alive; longer than all retries' pauses
FIND_SECONDS = 10.0  # time limit for the list of models, which an engine sends even when busy
EVENTS_WITHOUT_TOKENS = 16  # allowed in a stream: its last event, and extra events of other servers
MAX_REPLY = 64 << 20  # bytes of a reply that is not a stream
FAILURES = (openai.OpenAIError, httpx.HTTPError)  # exceptions of a request
MALFORMED = (AttributeError, LookupError, TypeError, ValueError)  # exceptions of reading a reply of unexpected form
SERVE = (
    "write the checkpoint's language model with `stllm convert CKPT --to DIR --format language-model` and serve that "
    "folder with `vllm serve DIR --enable-prompt-embeds`"
)
BROKEN_OFF = ("abort", "error")  # finish_reason of an incomplete answer when the engine shuts down; the status is 200
TICK = 0.1  # seconds between two checks whether the caller still waits


class _EngineHttp(openai.DefaultAsyncHttpxClient):
    """HTTP client for openai's client that reads at most about `MAX_REPLY` bytes of a reply (truncated JSON fails)."""

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """Send a request. If `stream` is false, also read the reply's body."""
        response = await super().send(request, stream=True, **options)
        if stream:
            return response
        content = bytearray()
        try:
            async for part in response.aiter_raw():
                content += part
                if len(content) > MAX_REPLY:
                    break
        finally:
            await response.aclose()
        return httpx.Response(response.status_code, headers=response.headers, content=bytes(content), request=request)


class RemoteLanguageModel:
    """Client of one engine. Methods may be called from any thread. Close the client when it is no longer needed.

    url: the server's URL, with or without a final `/v1`; it may contain a user name and a password. max_in_flight:
    maximum number of simultaneous requests.
    seconds: time limit for one answer. Attribute address: the URL without user name and password, used in error
    messages.
    Raises UserError for an invalid URL, or a key with invalid characters.
    """

    def __init__(
        self, url: str, *, max_in_flight: int | None = None, seconds: float = SECONDS, num_retries: int | None = None
    ) -> None:
        self.address = server_address(url, "--engine").rstrip("/").removesuffix("/v1")
        self.max_in_flight = max_in_flight or MAX_IN_FLIGHT
        self.model = ""  # names of the model and of the server software; `find_model` sets both
        self.server = ""
        self._num_ids = 1 << 31  # size of the vocabulary; `compare` sets it
        key = os.environ.get(API_KEY, "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {API_KEY} holds characters that no key has: copy the key anew")
        self._client = openai.AsyncOpenAI(
            base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1",
            api_key=key,
            max_retries=NUM_RETRIES if num_retries is None else num_retries,
            http_client=_EngineHttp(timeout=openai.Timeout(seconds, connect=10.0)),
        )
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(self.max_in_flight)
        self._thread = Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel the running requests and end the thread."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

        if self._thread.is_alive():
            self._run(end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # ---- the engine's model -----------------------------------------------------------------------------------------

    def find_model(self) -> None:
        """Ask the engine for its model's name. Raises UserError, and closes the client, if that fails."""

        def names(reply: Any) -> tuple[str, str]:
            model = reply["data"][0]
            return _text(model["id"]), _text(model.get("owned_by") or "unknown")

        async def find() -> tuple[str, str]:
            timeout: Any = {"timeout": FIND_SECONDS}
            return await self._read(self._client.get("/models", cast_to=httpx.Response, options=timeout), names)

        self.model, self.server = self._open(find())

    def compare(self, embedding: nn.Module) -> None:
        """Check that the engine serves the checkpoint's language model. embedding: the checkpoint's token embedding.

        The same few tokens are sent as ids and as embeddings: the next token must have nearly the same probability.
        Raises UserError, and closes the client, if the engine takes no embeddings or serves another model.
        """
        assert isinstance(embedding.weight, Tensor)
        table = embedding.weight.detach()
        self._num_ids = len(table)
        rows = torch.linspace(3, table.shape[0] - 1, NUM_PROBES, device=table.device).long()  # 0 to 2: special tokens

        def likely(choice: Any) -> dict[str, float]:
            found = {_text(token): float(value) for token, value in choice["logprobs"]["top_logprobs"][0].items()}
            if not found or not all(map(math.isfinite, found.values())):
                raise ValueError
            return found

        async def ask() -> None:
            question = {"model": self.model, "max_tokens": 1, "temperature": 0, "logprobs": 5}
            try:
                one = await self._choice({**question, "prompt": rows.tolist()}, likely)
                other = await self._choice({**question, "prompt_embeds": encoded(table[rows])}, likely)
            except UserError as error:
                if isinstance(error.__cause__, openai.BadRequestError):
                    raise UserError(
                        f"the engine at {self.address} does not take this checkpoint's embeddings, {table.shape[1]} "
                        f"numbers each: {_words(error.__cause__)}; {SERVE}"
                    ) from error
                raise
            token = max(one, key=one.__getitem__)
            if abs(one[token] - other.get(token, -torch.inf)) > TOLERANCE:
                raise UserError(
                    f"the engine at {self.address} holds another language model than this checkpoint: after the same "
                    f"{NUM_PROBES} tokens, sent as ids and as embeddings, its next token differs; {SERVE}"
                )

        self._open(ask())

    # ---- answers ----------------------------------------------------------------------------------------------------

    def submit(self, embeds: Tensor, decoding: Decoding, stopping: dict[str, Any]) -> "Future[list[int]]":
        """Send a prompt's embeddings, (S, D), without waiting. The future's result is the new ids, end token included.

        stopping: the result of `PromptProcessor.stopping`. Cancelling the future ends the request. The future raises
        RequestError if the engine refuses the prompt, and EngineError if the engine fails.
        """
        body = self._body(embeds, decoding, stopping)

        async def ask() -> list[int]:
            async with self._places:
                ids, reason = await self._choice(
                    body, lambda choice: (self._ids(choice, decoding.max_new_tokens), choice.get("finish_reason"))
                )
            self._check_length(ids, reason, decoding)
            return ids

        return self._run(ask())

    def complete(
        self, embeds: Sequence[Tensor], decoding: Decoding, stopping: dict[str, Any], stop: Event | None = None
    ) -> list[list[int]]:
        """Answer several prompts at once. Returns each answer's token ids. Raises the errors of `submit`.

        embeds: one (S, D) per prompt. decoding, stopping: see `submit`. Once `stop` is set, all requests are cancelled
        and every list is empty, even that of a finished answer.
        """
        futures = [self.submit(one, decoding, stopping) for one in embeds]
        try:
            while wait(futures, timeout=TICK).not_done:
                if stop is not None and stop.is_set():
                    return [[] for _ in futures]
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def stream(
        self, embeds: Tensor, decoding: Decoding, stopping: dict[str, Any], stop: Event
    ) -> Generator[str, None, list[int]]:
        """Yield the answer's text as it arrives, and return its token ids.

        Setting `stop`, or closing the generator, ends the request.
        """
        body = self._body(embeds, decoding, stopping)
        pieces: SimpleQueue[str | None] = SimpleQueue()
        ids: list[int] = []

        async def ask() -> None:
            reason: str | None = None
            event: Any = None
            num_events = 0

            async def receive() -> None:
                nonlocal reason, event, num_events
                kind = openai.AsyncStream[Any]
                streamed = {**body, "stream": True}
                async for event in await self._client.post(
                    "/completions", cast_to=object, body=streamed, stream=True, stream_cls=kind
                ):
                    num_events += 1
                    if num_events > decoding.max_new_tokens + EVENTS_WITHOUT_TOKENS:
                        raise ValueError
                    for choice in event["choices"]:
                        ids.extend(self._ids(choice, decoding.max_new_tokens - len(ids)))
                        pieces.put(_text(choice["text"]))
                        reason = choice.get("finish_reason") or reason

            try:
                async with self._places:
                    await self._watch(receive())
                if event is None:
                    raise ValueError
                if reason is None or reason in BROKEN_OFF:
                    raise httpx.ReadError("the stream has no end")
            except FAILURES as error:
                raise self._failure(error) from error
            except MALFORMED as error:
                raise self._malformed(str(event or "no event of a stream")) from error
            finally:
                pieces.put(None)
            self._check_length(ids, reason, decoding)

        future = self._run(ask())
        try:
            while not stop.is_set():
                try:
                    piece = pieces.get(timeout=TICK)
                except Empty:
                    continue
                if piece is None:
                    future.result()
                    break
                yield piece
        finally:
            future.cancel()
        return ids

    def _body(self, embeds: Tensor, decoding: Decoding, stopping: dict[str, Any]) -> dict[str, Any]:
        check_decoding(decoding)
        samples = decoding.temperature >= MIN_TEMPERATURE
        return {
            "model": self.model,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature if samples else 0.0,
            "top_p": decoding.top_p if samples else 1.0,
            "stop": stopping["stop_strings"],
            "prompt_embeds": encoded(embeds),
            "stop_token_ids": [stopping["eos_token_id"]],
            "return_token_ids": True,
        }

    def _run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _open(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for one of the first requests, to the engine. If it fails or is interrupted, close the client."""
        try:
            return self._run(work).result()
        except BaseException:
            self.close()
            raise

    # ---- requests and replies ---------------------------------------------------------------------------------------

    async def _choice(self, body: dict[str, Any], take: Callable[[Any], T]) -> T:
        """Request a completion, and return `take(its choice)`. An incomplete answer is requested again."""

        def whole(reply: Any) -> T | None:
            choice = reply["choices"][0]
            return None if choice.get("finish_reason") in BROKEN_OFF else take(choice)

        for _ in range(self._client.max_retries + 1):
            request = self._client.post("/completions", cast_to=httpx.Response, body=body)
            with suppress(httpx.ReadError):
                if (found := await self._watch(self._read(request, whole))) is not None:
                    return found
        raise self._failure(httpx.ReadError("the choice has no end"))

    async def _watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a reply. Raises httpx.ReadError if the engine meanwhile stops accepting connections.

        When vLLM shuts down, it closes its port, but leaves open requests waiting although it no longer answers them.
        """

        async def refuses() -> bool:
            once = self._client.with_options(max_retries=0, timeout=FIND_SECONDS)
            try:
                await once.get("/models", cast_to=httpx.Response)
            except openai.OpenAIError as error:  # an engine that is busy, or replies with an error, is alive
                return isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
            return False

        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([task], timeout=WATCH_SECONDS))[0]:
                if await refuses():
                    raise httpx.ReadError("the engine takes no more connections")
            return task.result()
        finally:
            task.cancel()

    async def _read(self, request: Coroutine[Any, Any, httpx.Response], take: Callable[[Any], T]) -> T:
        """Await a reply, and return `take(its JSON)`. Raises RequestError, EngineError."""
        try:
            response = await request
        except FAILURES as error:
            raise self._failure(error) from error
        try:
            return take(loads(response.content))
        except MALFORMED as error:
            raise self._malformed(response.text) from error

    def _ids(self, choice: Any, most: int) -> list[int]:
        """Return the token ids of a choice. Raises TypeError or ValueError if they are invalid or more than `most`."""
        ids = choice["token_ids"]
        if len(ids) > most or not all(type(one) is int and 0 <= one < self._num_ids for one in ids):
            raise ValueError
        return list(ids)

    def _check_length(self, ids: list[int], reason: Any, decoding: Decoding) -> None:
        """Raise RequestError if the engine ended the answer because its --max-model-len was reached."""
        if reason == "length" and len(ids) < decoding.max_new_tokens:
            raise RequestError(
                f"the engine at {self.address} cut the answer after {len(ids)} of {decoding.max_new_tokens} tokens, as "
                "prompt and answer exceed its --max-model-len: start it with a larger one, or ask for fewer tokens "
                "(--max-new-tokens)"
            )

    def _malformed(self, reply: str) -> EngineError:
        start = " ".join(reply[:200].split())
        return EngineError(
            f"the engine at {self.address} gave a reply of another form ({start[:80]!r}), expected that of vLLM's "
            f"/v1/completions with token ids: check the address, or {SERVE}"
        )

    def _failure(self, error: Exception) -> UserError:
        """Return an error with a clear sentence for an error of openai's client."""
        again = "start it (vllm serve DIR --enable-prompt-embeds), then give the same command again"
        if isinstance(error, openai.APITimeoutError | httpx.TimeoutException):
            return EngineError(
                f"the engine at {self.address} did not answer in time: {again}, or with a shorter answer"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return EngineError(f"the engine at {self.address} cannot be reached ({cause}): {again}")
        if isinstance(error, openai.APIStatusError):
            code = error.status_code
            if code in (400, 413, 422) and "prompt_embeds" not in _words(error):
                return RequestError(f"the engine refused the prompt: {_words(error)}")
            if code in (401, 403):
                return EngineError(f"the engine at {self.address} wants a key: name it in the variable {API_KEY}")
            return EngineError(f"the engine at {self.address} failed with status {code}: {_words(error)}; {again}")
        if isinstance(error, httpx.HTTPError):
            return EngineError(f"the engine at {self.address} broke off its answer: {again}")
        return EngineError(f"the engine at {self.address} failed: {str(error)[:300]}; {again}")


def check_decoding(decoding: Decoding) -> None:
    """Raise UserError for settings that an engine does not support, or interprets differently."""
    if decoding.num_beams > 1:
        raise UserError(
            f"{decoding.num_beams} beams were asked for, but an engine ignores beams for embeddings: take one beam "
            "(--num-beams 1), or leave out --engine"
        )
    if decoding.repetition_penalty != 1:
        raise UserError(
            f"a repetition penalty of {decoding.repetition_penalty} was asked for, but an engine counts the prompt, "
            "too: take 1 (for a benchmark: --options evaluation.repetition_penalty=1), or leave out --engine"
        )


def encoded(embeds: Tensor) -> str:
    """Encode embeddings, (S, D), for `prompt_embeds`: base64 of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # cloned, since torch.save writes the whole storage of a view
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _words(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message).strip()[:300]


def _text(value: Any) -> str:
    """Return the value if it is a str. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError
    return value
