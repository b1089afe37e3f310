"""The demo as it is served, on a free port, with the tiny engine of the conversation tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import httpx
import pytest

from stllm.conversation.chat import Chat, find_examples
from stllm.serving.limits import PageLimits
from stllm.web.app import build_app
from stllm.web.service import Service
from tests.helpers.serving import running


@contextmanager
def served(chat: Chat, folder: Path, limits: PageLimits | None = None) -> Iterator[str]:
    """The address of the running page."""
    service = Service(chat, limits or PageLimits(), folder, [path for path, _ in find_examples()])
    with running(build_app(service, local=True)) as address:
        yield f"{address}/"


def uploaded(url: str, path: Path) -> dict[str, Any]:
    """Upload a file; return it as calls name it."""
    with path.open("rb") as file:
        found = httpx.post(f"{url}gradio_api/upload", files={"files": file}, timeout=60).json()[0]
    return medium(found)


def medium(path: str) -> dict[str, Any]:
    """Return a file of the server's as calls name it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def answer_without_end(chat: Chat, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> Event:
    """Have answers come word by word until their stream is closed; the event is set then."""
    closed = Event()

    def stream(*_: Any) -> Iterator[str]:
        try:
            while True:
                sleep(seconds)
                yield "word "
        finally:
            closed.set()

    monkeypatch.setattr(chat, "stream_prepared", stream)
    return closed
