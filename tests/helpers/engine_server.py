"""A stand-in for vLLM: `/v1/completions` with `prompt_embeds`, answered by transformers' `generate`."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.helpers.serving import running

PAUSE = 0.005  # seconds between two tokens of a stream


@dataclass
class FakeEngine:
    """A stand-in for an engine that serves a language model.

    replies: to requests for completions, in their order; None for a real one, as after the last. seconds: that each
    answer takes longer. takes_embeddings: as with `--enable-prompt-embeds`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "lm"
    takes_embeddings: bool = True
    max_model_len: int = 2048
    replies: Iterator[Response | None] = field(default_factory=lambda: iter(()))
    seconds: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of requests for completions
    keys: list[str | None] = field(default_factory=list)  # of the same
    inside: int = 0  # requests being answered
    most_inside: int = 0
    abandoned: int = 0  # streams that nobody read to the end

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "test"}]})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.test"})

    async def server_info(self, request: Request) -> Response:  # as with VLLM_SERVER_DEV_MODE=1
        return JSONResponse({"system_env": {"torch_version": str(torch.__version__)}})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        if (reply := next(self.replies, None)) is not None:
            return reply
        if body["model"] != self.name:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        encoded = body.get("prompt_embeds")
        if encoded is None:
            embeds = self.model.get_input_embeddings()(torch.tensor(body["prompt"]))
        elif not self.takes_embeddings:
            return refusal(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.", "prompt_embeds")
        else:
            embeds = torch.load(io.BytesIO(base64.b64decode(encoded)), weights_only=True)
            if embeds.shape[-1] != self.model.config.hidden_size:
                return refusal(400, f"`prompt_embeds` hidden_size {embeds.shape[-1]} does not match", "prompt_embeds")
        if len(embeds) > self.max_model_len:
            return refusal(400, f"This model's maximum context length is {self.max_model_len} tokens.", "input_tokens")
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            await asyncio.sleep(self.seconds)
            ids, scores = await asyncio.to_thread(self.generate, embeds.to(self.model.dtype), body)
        finally:
            self.inside -= 1
        if body.get("stream"):
            return StreamingResponse(self.events(ids), media_type="text/event-stream")
        choice = {"index": 0, "text": self.text(ids), "finish_reason": "stop", "token_ids": ids}
        if body.get("logprobs"):
            found = scores[0].topk(body["logprobs"])
            names = self.tokenizer.convert_ids_to_tokens(found.indices.tolist())
            choice["logprobs"] = {"top_logprobs": [dict(zip(names, found.values.tolist(), strict=True))]}
        return JSONResponse({"id": "1", "object": "text_completion", "model": self.name, "choices": [choice]})

    def generate(self, embeds: Tensor, body: dict[str, Any]) -> tuple[list[int], Tensor]:
        """Return the new ids, and the log probabilities of each step, (A, vocabulary)."""
        model: Any = self.model
        samples = {"do_sample": True, "temperature": body["temperature"]} if body.get("temperature") else {}
        made = model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            max_new_tokens=body["max_tokens"],
            eos_token_id=body.get("stop_token_ids") or self.tokenizer.eos_token_id,
            pad_token_id=0,
            stop_strings=body.get("stop") or None,
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
            output_logits=True,
            **(samples or {"do_sample": False}),
        )
        return made.sequences[0].tolist(), torch.cat(made.logits).float().log_softmax(-1)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    async def events(self, ids: list[int]) -> AsyncIterator[str]:
        self.abandoned += 1
        for number, token in enumerate(ids):
            new = self.text(ids[: number + 1])[len(self.text(ids[:number])) :]
            reason = "stop" if number == len(ids) - 1 else None
            choice = {"index": 0, "text": new, "token_ids": [token], "finish_reason": reason}
            yield f"data: {json.dumps({'id': '1', 'object': 'text_completion', 'choices': [choice]})}\n\n"
            await asyncio.sleep(PAUSE)
        yield "data: [DONE]\n\n"
        self.abandoned -= 1


def refusal(status: int, message: str, param: str | None = None) -> Response:
    """Return an error in vLLM's words."""
    return JSONResponse({"error": {"message": message, "param": param, "code": status}}, status_code=status)


@contextmanager
def engine_server(engine: FakeEngine) -> Iterator[str]:
    """Run the engine within the block. Yields its address."""
    routes = [
        Route("/version", engine.version),
        Route("/server_info", engine.server_info),
        Route("/v1/models", engine.models),
        Route("/v1/completions", engine.completions, methods=["POST"]),
    ]
    with running(Starlette(routes=routes)) as address:
        yield address
