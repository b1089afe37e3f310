"""A language model behind another server: vLLM, or one that takes embeddings by the same protocol.

This process reads, encodes and embeds; the prompt's embeddings go to `POST /v1/completions` as `prompt_embeds` (base64
of `torch.save`), and token ids come back (vLLM's documentation, "Prompt Embedding Inputs"). The other server decides
which requests run together. Many may be in flight; openai's client sends them from one background thread, and repeats
those that fail for a reason that may pass. Letters: S tokens of a prompt, D width of the language model.
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
SECONDS = 600.0  # for one answer
NUM_RETRIES = 8  # openai's client pauses 0.5 to 8 s: about 40 s in all, in which an engine may restart
API_KEY = "VLLM_API_KEY"  # the environment variable that `vllm serve` reads, too
NUM_PROBES = 8  # tokens of the prompt that compares the models
TOLERANCE = 0.25  # nats; bfloat16 against float32 differs by less, another model by more
WATCH_SECONDS = 60.0  # without a reply, after which the engine is looked at; longer than all pauses between retries
FIND_SECONDS = 10.0  # for the list of models, which waits for no other request
EVENTS_WITHOUT_TOKENS = 16  # of a stream: its end, and what other servers send besides
MAX_REPLY = 64 << 20  # bytes of a reply that is no stream
FAILURES = (openai.OpenAIError, httpx.HTTPError)  # what a request can raise
MALFORMED = (AttributeError, LookupError, TypeError, ValueError)  # what reading a reply of another form raises
SERVE = (
    "write the checkpoint's language model with `stllm convert CKPT --to DIR --format language-model` and serve that "
    "folder with `vllm serve DIR --enable-prompt-embeds`"
)
BROKEN_OFF = ("abort", "error")  # why a choice ends when an engine shuts down: with the tokens so far, and status 200
TICK = 0.1  # seconds between two looks at whether anybody still waits


class _Http(openai.DefaultAsyncHttpxClient):
    """The HTTP client below openai's client; it reads at most `MAX_REPLY` of a reply, which then is no JSON."""

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """Send a request; without `stream`, read the whole reply."""
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
    """The client of one engine. url: with or without `/v1` at its end; a user name and a password in it are used.

    address: the URL without these, so that it may be written down. Close the client when it is no longer needed.
    Methods may be called from any thread. Raises UserError for what is no server's URL, or a malformed key.
    """

    def __init__(
        self, url: str, *, max_in_flight: int | None = None, seconds: float = SECONDS, num_retries: int | None = None
    ) -> None:
        self.address = server_address(url, "--engine").rstrip("/").removesuffix("/v1")
        self.max_in_flight = max_in_flight or MAX_IN_FLIGHT
        self.model = ""  # its name there, and the server's own name: known after `find_model`
        self.server = ""
        self._num_ids = 1 << 31  # of the vocabulary: known after `compare`
        key = os.environ.get(API_KEY, "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {API_KEY} holds characters that no key has: copy the key anew")
        self._client = openai.AsyncOpenAI(
            base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1",
            api_key=key,
            max_retries=NUM_RETRIES if num_retries is None else num_retries,
            http_client=_Http(timeout=openai.Timeout(seconds, connect=10.0)),
        )
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(self.max_in_flight)
        self._thread = Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what is in flight and end the thread."""

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

    # ---- the model there --------------------------------------------------------------------------------------------

    def find_model(self) -> None:
        """Find the name of the engine's model. Raises UserError, and closes the client, if the engine gives none."""

        def names(reply: Any) -> tuple[str, str]:
            model = reply["data"][0]
            return _text(model["id"]), _text(model.get("owned_by") or "unknown")

        async def find() -> tuple[str, str]:
            timeout: Any = {"timeout": FIND_SECONDS}
            return await self._read(self._client.get("/models", cast_to=httpx.Response, options=timeout), names)

        self.model, self.server = self._open(find())

    def compare(self, embedding: nn.Module) -> None:
        """Compare the engine's model with the checkpoint's, of which `embedding` is the token embedding.

        The same few tokens are sent as ids and as our embeddings: the next token must have the same probability.
        Raises UserError, and closes the client, for an engine that takes no embeddings or holds another model.
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
        """Send a prompt's embeddings, (S, D), and return at once. The future gives the new ids, with the one that ends.

        stopping: what `PromptProcessor.stopping` gives. Cancelling the future ends the request. It raises RequestError
        for a prompt that the engine refuses, and EngineError for an engine that fails.
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
        """Answer several prompts at once, and return each one's ids. Setting `stop` ends them all with none."""
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
        """Yield the answer's text as it comes, and return its ids. Setting `stop`, or closing, ends the request."""
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
        """Wait for what comes before the first question; if it fails or is interrupted, close the client."""
        try:
            return self._run(work).result()
        except BaseException:
            self.close()
            raise

    # ---- requests and replies ---------------------------------------------------------------------------------------

    async def _choice(self, body: dict[str, Any], take: Callable[[Any], T]) -> T:
        """Ask for a completion, again if it is broken off, and return what `take` makes of its choice."""

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
        """Await a reply, and give it up once the engine takes no more connections. Raises httpx.ReadError.

        vLLM closes its port when it shuts down, and then waits for requests that nobody answers any more.
        """

        async def refuses() -> bool:
            once = self._client.with_options(max_retries=0, timeout=FIND_SECONDS)
            try:
                await once.get("/models", cast_to=httpx.Response)
            except openai.OpenAIError as error:  # an engine that is busy, or replies with an error, is there
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
        """Return what `take` makes of the reply's JSON. Raises RequestError, EngineError."""
        try:
            response = await request
        except FAILURES as error:
            raise self._failure(error) from error
        try:
            return take(loads(response.content))
        except MALFORMED as error:
            raise self._malformed(response.text) from error

    def _ids(self, choice: Any, most: int) -> list[int]:
        """Return the token ids of a choice. Raises TypeError or ValueError for what are none, or too many."""
        ids = choice["token_ids"]
        if len(ids) > most or not all(type(one) is int and 0 <= one < self._num_ids for one in ids):
            raise ValueError
        return list(ids)

    def _check_length(self, ids: list[int], reason: Any, decoding: Decoding) -> None:
        """Raise RequestError for an answer that was cut because the engine had no room for it."""
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
        """Put an error of openai's client into a sentence."""
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
    """Raise UserError for settings that an engine does not have, or has in another sense."""
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
    """Encode embeddings, (S, D), as the protocol wants them."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # a clone: of a view the whole storage would be written
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _words(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message).strip()[:300]


def _text(value: Any) -> str:
    """Return a text. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError
    return value
