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
import os
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import Future, wait
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

import httpx
import openai
import torch
from torch import Tensor, nn

from stllm.common.errors import UserError, sentence
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
# What a request can raise; not only openai's errors: of a reply in HTML its client returns the text.
FAILURES = (openai.OpenAIError, httpx.HTTPError, AttributeError, LookupError, TypeError, ValueError)
SERVE = (
    "write the checkpoint's language model with `stllm convert CKPT --to DIR --format language-model` and serve that "
    "folder with `vllm serve DIR --enable-prompt-embeds`"
)
TICK = 0.1  # seconds between two looks at whether anybody still waits


class RemoteLanguageModel:
    """The client of one engine. url: with or without `/v1` at its end.

    Close it when it is no longer needed. Methods may be called from any thread.
    """

    def __init__(
        self, url: str, *, max_in_flight: int | None = None, seconds: float = SECONDS, num_retries: int | None = None
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.max_in_flight = max_in_flight or MAX_IN_FLIGHT
        self.model = ""  # its name there, and the server's own name: known after `find_model`
        self.server = ""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--engine {url}: expected the address of a server, such as http://127.0.0.1:8000")
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=os.environ.get(API_KEY) or "none",
            timeout=openai.Timeout(seconds, connect=10.0),
            max_retries=NUM_RETRIES if num_retries is None else num_retries,
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
        """Find the name of the engine's model. Raises UserError for an engine that does not answer."""

        async def find() -> None:
            try:
                model = (await self._client.models.list()).data[0]
                self.model, self.server = model.id, getattr(model, "owned_by", None) or "unknown"
            except FAILURES as error:
                raise self._failure(error) from error

        self._run(find()).result()

    def compare(self, embedding: nn.Module) -> None:
        """Compare the engine's model with the checkpoint's, of which `embedding` is the token embedding.

        The same few tokens are sent as ids and as our embeddings: the next token must have the same probability.
        Raises UserError for an engine that takes no embeddings, or holds another model.
        """
        assert isinstance(embedding.weight, Tensor)
        table = embedding.weight.detach()
        rows = torch.linspace(3, table.shape[0] - 1, NUM_PROBES, device=table.device).long()  # 0 to 2: special tokens

        async def ask() -> tuple[dict[str, float], dict[str, float]]:
            question: Any = {"model": self.model, "max_tokens": 1, "temperature": 0, "logprobs": 5}
            try:
                by_ids = await self._client.completions.create(**question, prompt=rows.tolist())
                question["extra_body"] = {"prompt_embeds": encoded(table[rows])}
                by_embeds = await self._client.completions.create(**question, prompt=None)
                one, other = (dict(reply.choices[0].logprobs.top_logprobs[0]) for reply in (by_ids, by_embeds))
                return one, other
            except openai.BadRequestError as error:
                raise UserError(
                    f"the engine at {self.url} does not take this checkpoint's embeddings, {table.shape[1]} numbers "
                    f"each: {_words(error)}; {SERVE}"
                ) from error
            except FAILURES as error:
                raise self._failure(error) from error

        one, other = self._run(ask()).result()
        token = max(one, key=one.__getitem__)
        if abs(one[token] - other.get(token, -torch.inf)) > TOLERANCE:
            raise UserError(
                f"the engine at {self.url} holds another language model than this checkpoint: after the same "
                f"{NUM_PROBES} tokens, sent as ids and as embeddings, its next token differs; {SERVE}"
            )

    # ---- answers ----------------------------------------------------------------------------------------------------

    def submit(self, embeds: Tensor, decoding: Decoding, stopping: dict[str, Any]) -> "Future[list[int]]":
        """Send a prompt's embeddings, (S, D), and return at once. The future gives the new ids, with the one that ends.

        stopping: what `PromptProcessor.stopping` gives. Cancelling the future ends the request. It raises RequestError
        for a prompt that the engine refuses, and EngineError for an engine that fails.
        """
        body = self._body(embeds, decoding, stopping)

        async def ask() -> list[int]:
            async with self._places:
                try:
                    choice = (await self._client.completions.create(**body)).choices[0]
                    return list(choice.token_ids)
                except FAILURES as error:
                    raise self._failure(error) from error

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
            reason = None
            try:
                async with self._places:
                    async for chunk in await self._client.completions.create(**body, stream=True):
                        for choice in chunk.choices:
                            ids.extend(choice.token_ids)
                            pieces.put(choice.text)
                            reason = choice.finish_reason or reason
                if reason is None:
                    raise ValueError("its stream broke off")
            except FAILURES as error:
                raise self._failure(error) from error
            finally:
                pieces.put(None)

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
            "prompt": None,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature if samples else 0.0,
            "top_p": decoding.top_p if samples else 1.0,
            "stop": stopping["stop_strings"],
            "extra_body": {
                "prompt_embeds": encoded(embeds),
                "stop_token_ids": [stopping["eos_token_id"]],
                "return_token_ids": True,
            },
        }

    def _run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _failure(self, error: Exception) -> UserError:
        """Put an error of openai's client into a sentence."""
        again = "start it (vllm serve DIR --enable-prompt-embeds), then give the same command again"
        if isinstance(error, openai.APITimeoutError):
            return EngineError(f"the engine at {self.url} did not answer in time: {again}, or with a shorter answer")
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return EngineError(f"the engine at {self.url} cannot be reached ({cause}): {again}")
        if isinstance(error, openai.APIStatusError):
            code = error.status_code
            if code in (400, 413, 422) and "prompt_embeds" not in _words(error):
                return RequestError(f"the engine refused the prompt: {_words(error)}")
            if code in (401, 403):
                return EngineError(f"the engine at {self.url} wants a key: name it in the variable {API_KEY}")
            return EngineError(f"the engine at {self.url} failed with status {code}: {_words(error)}; {again}")
        return EngineError(f"the engine at {self.url} gave no answer of its protocol ({sentence(error)}): {again}")


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
