"""The web application: /v1/chat/completions, /v1/models, /health. It keeps no state of a client between requests."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat
from stllm.conversation.requests import Media
from stllm.conversation.requests import Request as Question
from stllm.media.reading import NobodyWaits, ReadingPool
from stllm.serving.completions import Asked, Finished, Reply, api_error, event, model_object, parse_request
from stllm.serving.jobs import BusyError, End, Job, Jobs, Stage
from stllm.serving.limits import ApiError, Bodies, Limits, fetch_medium, split_medium

HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # the Host header: a name and a port
BODIES = 8  # of the largest size that may arrive at once, chosen here; smaller ones are as many as fit
GONE = Response(status_code=499)  # nobody reads it
RETRY_SECONDS = 2  # suggested to clients that were refused for want of room

Step = str | Finished
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


@dataclass
class Server:
    """One engine and its queue.

    name: of the model. media_root: the folder of which clients may name files, or None.
    folder: where the media of requests are written; None: the system's folder for temporary files.
    reading: the processes that read media; None: new ones, which start with the first request.
    """

    chat: Chat
    name: str
    media_root: Path | None = None
    limits: Limits = field(default_factory=Limits)
    folder: Path | None = None
    reading: ReadingPool | None = None

    def __post_init__(self) -> None:
        self.jobs = Jobs(1 + self.limits.waiting, self.reading or ReadingPool(seconds=self.limits.read_seconds))
        self.bodies = Bodies(self.limits.body_bytes, BODIES * self.limits.body_bytes, self.limits.body_seconds)
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """Report that the server is up, and how busy it is."""
        return JSONResponse(
            {"status": "ok", "model": self.name, "requests": self.jobs.num_inside, "places": self.jobs.places}
        )

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [model_object(self.name, self._created)]})

    async def model(self, request: Request) -> Response:
        """Describe the one model, or answer 404."""
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"the only model here is {self.name!r}", code="model_not_found")
        return JSONResponse(model_object(self.name, self._created))

    async def completions(self, request: Request) -> Response:
        """Answer a chat completion request, whole or as a stream."""
        try:
            self.jobs.check_room()
        except BusyError:
            await self.bodies.read(request, keep=False)  # so that the client reads the refusal
            raise
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A page elsewhere on the web can have a browser send any other type here unasked.
            raise ApiError(415, "expected JSON: send the header Content-Type: application/json")
        if (body := await self.bodies.read(request)) is None:
            most = self.limits.media_bytes >> 20
            message = f"the request is too large: at most {most} MiB of video or image are taken"
            raise ApiError(413, message, code="request_too_large")
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Step | End]()

        def tell(item: Step | End) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server ends, and nobody waits for news
                loop.call_soon_threadsafe(news.put_nowait, item)

        job: Job[Step] = self.jobs.admit(tell)  # not before, so that slow senders hold no places
        streams = False
        try:
            asked = await anyio.to_thread.run_sync(self._begin, body, job)
            del body
            watch = asyncio.create_task(_give_up_when_gone(request, job))
            try:
                step = await _next(news)
                if not asked.stream:
                    while isinstance(step, str):
                        step = await _next(news)
                    return GONE if step is None else JSONResponse(Reply(self.name).completion(step))
            finally:
                watch.cancel()
            if step is None:
                return GONE
            streams = True
            return EventStream(_events(news, step, Reply(self.name), asked.include_usage), job)
        finally:
            if not streams:
                job.give_up()

    def _begin(self, body: bytearray, job: Job[Step]) -> Asked:
        """Begin to answer the request. Its medium is written to a file, which is removed at the end of the job."""
        words, medium = split_medium(body, self.limits)
        asked = parse_request(words, model=self.name, usual=self.chat.decoding, limits=self.limits)
        path = None
        if asked.url is not None:
            place = TemporaryDirectory(prefix="request-", dir=self.folder, ignore_cleanup_errors=True)
            folder = Path(job.resources.enter_context(place))
            path = fetch_medium(asked.url, medium, folder=folder, root=self.media_root, limits=self.limits)
        job.start(partial(answer_steps, self.chat, self.jobs.reading, self.limits, asked, path))
        return asked


async def _next(news: asyncio.Queue[Step | End]) -> Step | None:
    """Return the next news of a job, None at its end. Raises what the job raised."""
    item = await news.get()
    if isinstance(item, End) and item.error is not None:
        raise item.error
    return None if isinstance(item, End) else item


class EventStream(StreamingResponse):
    """A stream of server-sent events. It gives up its job when it ends, for whatever reason."""

    def __init__(self, events: AsyncIterator[str], job: Job[Step]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, until they end or the client has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.give_up()


async def _events(
    news: asyncio.Queue[Step | End], step: Step | None, reply: Reply, include_usage: bool
) -> AsyncIterator[str]:
    """Yield the chunks of an answer. step: its first news. An error in the middle is sent as an event, too."""
    yield reply.chunk({"role": "assistant", "content": ""})
    try:
        while isinstance(step, str):
            yield reply.chunk({"content": step})
            step = await _next(news)
    except Exception as error:
        yield event(api_error(error).body())
        return
    if step is not None:
        yield reply.chunk({}, step.reason)
        if include_usage:
            yield reply.usage_chunk(step)
        yield "data: [DONE]\n\n"


async def _give_up_when_gone(request: Request, job: Job[Step]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.give_up()


def build_app(server: Server, hosts: list[str] | None = None) -> Starlette:
    """Build the application.

    hosts: names of this server that requests may use, so that a web page elsewhere whose name is made to point to this
    machine reaches nothing; None: any.
    """

    def answers(endpoint: Endpoint) -> Endpoint:
        """Wrap an endpoint so that its failures become OpenAI's error objects."""

        async def answer(request: Request) -> Response:
            try:
                named = HOST.fullmatch(request.headers.get("host", ""))
                if hosts is not None and (named is None or named[1].lower() not in hosts):
                    raise ApiError(400, f"invalid Host header: this server answers to {', '.join(hosts)}")
                return await endpoint(request)
            except ClientDisconnect:
                return GONE
            except Exception as error:
                return _error_response(api_error(error))

        return answer

    async def unknown(request: Request, error: Exception) -> Response:
        """Answer requests for unknown paths and methods."""
        assert isinstance(error, HTTPException)
        offered = "GET /health, GET /v1/models, POST /v1/chat/completions"
        return _error_response(ApiError(error.status_code, f"{error.detail}: this server offers {offered}"))

    return Starlette(
        routes=[
            Route("/health", answers(server.health)),
            Route("/v1/models", answers(server.models)),
            Route("/v1/models/{name:path}", answers(server.model)),
            Route("/v1/chat/completions", answers(server.completions), methods=["POST"]),
        ],
        exception_handlers={HTTPException: unknown},
        lifespan=server.jobs.lifespan,
    )


def _error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


# ---- the engine's part


def answer_steps(
    chat: Chat, reading: ReadingPool, limits: Limits, asked: Asked, path: Path | None, stop: Event
) -> Generator[str | Finished | Stage, None, None]:
    """Yield pieces of text, and `Finished` last. path: of the request's medium. Raises ApiError."""
    media = None if path is None else Media(str(path), num_frames=asked.num_frames)
    request = Question(asked.turns, media, asked.system)
    try:
        request.check()
        seen = None
        if media is None or (seen := chat.recall(media)) is not None:
            yield Stage.MODEL
        else:
            stamp = chat.stamp(media)
            yield Stage.READING
            clip = reading.read(partial(limits.read, chat.read, media), Path(media.path), stop)
            yield Stage.MODEL
            seen = chat.see(media, clip, stamp)
            del clip
        prepared = chat.prepare(request, asked.decoding, seen)
        with closing(chat.stream_prepared(prepared, asked.decoding, stop)) as pieces:
            ids = yield from pieces  # (1, A)
    except NobodyWaits:
        raise
    except UserError as error:  # its message must not reveal where the medium is stored on this machine
        text = " ".join(str(error).split())
        raise ApiError(400, text if path is None else text.replace(str(path), "the video or image")) from None
    processor, num_tokens = chat.processor, ids.shape[1]
    text = str(processor.tokenizer.decode(ids[0], skip_special_tokens=True))
    ended = int(ids[0, -1]) == processor.eos_token_id or processor.end_sym in text
    reason = "length" if num_tokens >= asked.decoding.max_new_tokens and not ended else "stop"
    yield Finished(processor.clean(text), reason, prepared.length, num_tokens, prepared.cut.total)
