"""Serves the demo on a free port, with the tiny model of the conversation tests."""

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
    """Run the page, and return its address."""
    service = Service(chat, limits or PageLimits(), folder, [path for path, _ in find_examples()])
    with running(build_app(service, local=True)) as address:
        yield f"{address}/"


def uploaded(url: str, path: Path) -> dict[str, Any]:
    """Upload a file. Returns the form in which later calls refer to it."""
    with path.open("rb") as file:
        found = httpx.post(f"{url}gradio_api/upload", files={"files": file}, timeout=60).json()[0]
    return medium(found)


def medium(path: str) -> dict[str, Any]:
    """Return the form in which calls refer to a file on the server."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def answer_without_end(chat: Chat, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> Event:
    """Make an answer go on, word by word, until its stream is closed. Returns an event that is set then."""
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
