"""Fixtures of the demo's tests: uploaded clips, a tiny model, and sessions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stllm.conversation.chat import Chat
from stllm.serving.limits import PageLimits
from stllm.web.handlers import Handlers
from stllm.web.service import Service
from tests.conversation.test_chat import new_chat
from tests.helpers.videos import write_video

CONTROLS = (6, 1, 0, 8)  # frames, beams, temperature, tokens


@pytest.fixture(scope="package")
def chat() -> Chat:
    return new_chat()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of uploads with two clips, a text file named like a video, and an image."""
    from PIL import Image

    for name, count in (("one", 20), ("two", 31)):
        (tmp_path / "abc123").mkdir(exist_ok=True)
        write_video(tmp_path / "abc123" / f"{name}.mp4", num_frames=count, size=(64, 48))
    (tmp_path / "abc123" / "text.mp4").write_text("no video at all\n" * 9)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "abc123" / "picture.png")
    return tmp_path / "abc123"


@pytest.fixture
def handlers(chat: Chat, folder: Path) -> Iterator[Handlers]:
    service = Service(chat, PageLimits(), folder.parent)
    yield Handlers(service)
    service.jobs.close()


def last(shown: list[dict[str, Any]], name: str) -> Any:
    """Return the last value of this part of the page."""
    return [one[name] for one in shown if name in one][-1]
