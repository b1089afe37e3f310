"""The demo as it is served, on a free port, with the tiny engine of the conversation tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stllm.conversation.chat import Chat
from stllm.web.command import open_page
from stllm.web.limits import Limits


@contextmanager
def served(chat: Chat, folder: Path, limits: Limits | None = None) -> Iterator[str]:
    """The address of the running page."""
    page = open_page(chat, limits or Limits(), folder, host="127.0.0.1", port=None)
    try:
        yield str(page.local_url)
    finally:
        page.close(verbose=False)
