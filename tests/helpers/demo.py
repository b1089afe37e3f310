"""The demo as it is served, on a free port, with the tiny engine of the conversation tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
