"""`stllm demo` on the command line: its address, and removal of uploads."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from stllm.cli import main
from stllm.conversation.chat import Chat
from stllm.serving import listening


@pytest.fixture
def quick(own_signals: None, monkeypatch: pytest.MonkeyPatch, chat: Chat, tmp_path: Path) -> Path:
    """Replace loading of the model, and put temporary folders into tmp_path."""
    monkeypatch.setattr(listening, "load_chosen", lambda *_, **__: chat)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_uploads_are_removed_at_the_end(quick: Path, capsys, number: int) -> None:
    uploaded: list[Path] = []

    def use() -> None:
        printed = ""
        while "(Ctrl-C ends it)" not in printed:
            printed += capsys.readouterr().out
            time.sleep(0.05)
        address = printed.partition("The demo is at ")[2].split()[0]
        files = {"files": ("a.mp4", b"something")}
        uploaded.append(Path(httpx.post(f"{address}gradio_api/upload", files=files, timeout=60).json()[0]))
        assert uploaded[0].read_bytes() == b"something" and quick in uploaded[0].parents
        os.kill(os.getpid(), number)

    with ThreadPoolExecutor(1) as browser:
        used = browser.submit(use)
        assert main(["demo", "--ckpt-path", "d", "--port", "0"]) == 130
        used.result()
    assert uploaded and not list(quick.glob("stllm-demo-*"))
