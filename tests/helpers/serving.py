"""`stllm serve` in a thread, with a tiny model, for tests with the official client."""

import base64
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import openai
import torch
import uvicorn

from stllm.conversation.chat import Chat
from stllm.serving.app import Server, build_app
from stllm.serving.listening import TimedProtocol

MODEL = "tiny"


def serving(server: Server) -> AbstractContextManager[str]:
    """Run the server within the block. Yields its address, http://127.0.0.1:PORT."""
    return running(build_app(server, ["127.0.0.1"]))


@contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """Run an application in a thread within the block. Yields its address. options: of uvicorn."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=TimedProtocol, log_level="warning", timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def client_of(address: str) -> openai.OpenAI:
    """Return the official client, without retries."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def connected(address: str) -> socket.socket:
    """Open a connection to the server, to send what no client sends."""
    return socket.create_connection(("127.0.0.1", urlsplit(address).port or 0), timeout=10)


def data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def user(text: str, url: str | None = None, kind: str = "video_url") -> Any:
    """Return a user's message about the video or image of a URL."""
    if url is None:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": text}]}


def wait_until(fulfilled: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition is true. Fails after a time limit."""
    end = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


class Endless:
    """Makes a model's answers as long as allowed, and counts its steps. seconds: the duration of each step."""

    def __init__(self, chat: Chat, seconds: float = 0.02) -> None:
        self.steps = 0
        self.seconds = seconds
        head = chat.model.get_output_embeddings().weight
        with torch.no_grad():
            head.zero_()
            head[chat.processor.tokenizer.encode("red", add_special_tokens=False)[-1]] = 1e-9
        decoder = chat.model.language_model.get_decoder()
        self._hook = decoder.register_forward_pre_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.steps += 1
        time.sleep(self.seconds)
