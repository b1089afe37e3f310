"""The HTTP application of `stllm serve`: /v1/chat/completions, /v1/models and /health. It keeps no client state."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat
from stllm.conversation.requests import EngineError, Media
from stllm.conversation.requests import Request as ModelRequest
from stllm.media.reading import NobodyWaits, ReadingPool
from stllm.serving.completions import ChatRequest, Finished, Reply, api_error, event, parse_request
from stllm.serving.jobs import BusyError, End, Job, Jobs, Stage
from stllm.serving.limits import ApiError, Bodies, Limits, fetch_medium, split_medium

HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # the Host header: a name and a port
BODIES = 8  # request bodies of the largest size that may arrive at once, or more smaller ones; our choice
GONE = Response(status_code=499)  # sent if the client has disconnected
RETRY_SECONDS = 2  # value of Retry-After if the queue is full

Step = str | Finished


class Server:
    """A model with its queue, and the handlers of the endpoints.

    name: the model's name for clients. media_root: folder whose files clients may name; None: clients may name no file.
    folder: folder for media that clients send; None for the system's temporary folder. jobs: the queue; None for a new
    one.
    """

    def __init__(
        self,
        chat: Chat,
        name: str,
        media_root: Path | None = None,
        limits: Limits | None = None,
        folder: Path | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        self.chat, self.name, self.media_root, self.folder = chat, name, media_root, folder
        self.limits = limits or Limits()
        self.jobs = jobs or Jobs(self.limits)
        self.bodies = Bodies(self.limits.body_bytes, BODIES * self.limits.body_bytes, self.limits.body_seconds)
        self._model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "stllm"}

    async def health(self, request: Request, sent: ExitStack) -> Response:
        """Return the status, the number of requests in the queue and the number of places."""
        busy = {"requests": self.jobs.num_inside, "places": self.jobs.places}
        return JSONResponse({"status": "ok", "model": self.name, **busy})

    async def models(self, request: Request, sent: ExitStack) -> Response:
        """Return the list of models, which has one entry."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request, sent: ExitStack) -> Response:
        """Return the description of the model. Raises ApiError 404 for another name."""
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"the only model here is {self.name!r}", code="model_not_found")
        return JSONResponse(self._model)

    async def completions(self, request: Request, sent: ExitStack) -> Response:
        """Answer a chat completion request, at once or as a stream. sent: stack that is closed after the response."""
        address = request.client and request.client.host
        try:
            self.jobs.check_room(address)
        except BusyError:
            await self.bodies.read(request, keep=False)  # otherwise the client may not receive the refusal
            raise
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A browser lets a web page of another site send simple content types here without asking this server.
            raise ApiError(415, "expected JSON: send the header Content-Type: application/json")
        if (body := await self.bodies.read(request)) is None:
            most = self.limits.media_bytes >> 20
            message = f"the request is too large: at most {most} MiB of video or image are taken"
            raise ApiError(413, message, code="request_too_large")
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Step | End]()

        def tell(item: Step | End) -> None:
            with suppress(RuntimeError):  # the event loop is closed, since the server is ending
                loop.call_soon_threadsafe(news.put_nowait, item)

        job: Job[Step] = self.jobs.admit(tell, address)  # only now, so that slow senders take no place in the queue
        sent.callback(job.give_up)
        asked = await anyio.to_thread.run_sync(self._begin, body, job)
        del body

        async def give_up_when_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.give_up()

        watch = asyncio.create_task(give_up_when_gone())
        try:
            step = await _next(news)
            while not asked.stream and isinstance(step, str):
                step = await _next(news)
        finally:
            watch.cancel()
        if step is None:
            return GONE
        if isinstance(step, Finished) and not asked.stream:
            return JSONResponse(Reply(self.name).completion(step))
        events = _events(news, step, Reply(self.name), asked.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _begin(self, body: bytearray, job: Job[Step]) -> ChatRequest:
        """Parse the request and start its job. The medium is written to a file that is removed after the job."""
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
    """Return the next item of a job, or None at its end. Raises the job's exception."""
    item = await news.get()
    if isinstance(item, End) and item.error is not None:
        raise item.error
    return None if isinstance(item, End) else item


async def _events(
    news: asyncio.Queue[Step | End], step: Step | None, reply: Reply, include_usage: bool
) -> AsyncIterator[str]:
    """Yield the events of a streamed answer. step: the job's first item. A later error is sent as an event, too."""
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


def check_host(request: Request, hosts: list[str] | None) -> None:
    """Raise ApiError unless the request's Host header is one of these names. None: any name is allowed.

    This prevents DNS rebinding: a web page whose own host name resolves to this machine.
    """
    named = HOST.fullmatch(request.headers.get("host", ""))
    if hosts is not None and (named is None or named[1].lower() not in hosts):
        raise ApiError(400, f"invalid Host header: this server answers to {', '.join(hosts)}")


@dataclass(frozen=True)
class ApiRoute:
    """ASGI application of one endpoint. Exceptions become OpenAI's error objects.

    respond: the handler. It gets the request, and a stack that is closed after the response, even if sending fails.
    hosts: allowed names in the Host header; None: any name.
    """

    respond: Callable[[Request, ExitStack], Awaitable[Response]]
    hosts: list[str] | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (the ASGI interface)."""
        request = Request(scope, receive)
        with ExitStack() as sent:
            try:
                check_host(request, self.hosts)
                response = await self.respond(request, sent)
            except ClientDisconnect:
                response = GONE
            except Exception as error:
                response = _error_response(api_error(error))
            await response(scope, receive, send)


def build_app(server: Server, hosts: list[str] | None = None) -> Starlette:
    """Build the application. hosts: allowed names in the Host header; None: any name."""

    async def unknown(request: Request, error: Exception) -> Response:
        """Answer a request for an unknown path or method."""
        assert isinstance(error, HTTPException)
        offered = "GET /health, GET /v1/models, POST /v1/chat/completions"
        answer = ApiError(error.status_code, f"{error.detail}: this server offers {offered}")
        try:
            check_host(request, hosts)
        except ApiError as refusal:
            answer = refusal
        return _error_response(answer)

    return Starlette(
        routes=[
            Route("/health", ApiRoute(server.health, hosts), methods=["GET"]),
            Route("/v1/models", ApiRoute(server.models, hosts), methods=["GET"]),
            Route("/v1/models/{name:path}", ApiRoute(server.model, hosts), methods=["GET"]),
            Route("/v1/chat/completions", ApiRoute(server.completions, hosts), methods=["POST"]),
        ],
        exception_handlers={HTTPException: unknown},
        lifespan=server.jobs.lifespan,
    )


def _error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


# ---- answering a request


def answer_steps(
    chat: Chat, reading: ReadingPool, limits: Limits, asked: ChatRequest, path: Path | None, stop: Event
) -> Generator[str | Finished | Stage, None, None]:
    """Yield pieces of the answer's text and at the end `Finished`; before a step, yield the `Stage` it needs.

    path: path of the request's medium; None without one. stop: set when the client has left. Raises ApiError.
    """
    media = None if path is None else Media(str(path), num_frames=asked.num_frames)
    request = ModelRequest(asked.turns, media, asked.system)
    try:
        request.check()
        seen = None
        if media is not None and (seen := chat.recall(media)) is None:
            stamp = chat.stamp(media)
            yield Stage.READING
            clip = reading.read(partial(limits.read, chat.read, media), Path(media.path), stop)
            yield Stage.MODEL
            seen = chat.see(media, clip, stamp)
            del clip
        yield Stage.ANSWER
        prepared = chat.prepare(request, asked.decoding, seen)
        if asked.stream:
            with closing(chat.stream_prepared(prepared, asked.decoding, stop)) as pieces:
                ids = (yield from pieces)[0].tolist()
        else:
            ids = chat.ids([prepared], asked.decoding, stop)[0]
    except (NobodyWaits, EngineError):
        raise
    except UserError as error:  # the client must not see the path of the medium
        text = " ".join(str(error).split())
        raise ApiError(400, text if path is None else text.replace(str(path), "the video or image")) from None
    processor, num_tokens = chat.processor, len(ids)
    text = str(processor.tokenizer.decode(ids, skip_special_tokens=True))
    ended = processor.eos_token_id in ids[-1:] or processor.end_sym in text
    reason = "length" if num_tokens >= asked.decoding.max_new_tokens and not ended else "stop"
    yield Finished(processor.clean(text), reason, prepared.length, num_tokens, prepared.cut.total)
