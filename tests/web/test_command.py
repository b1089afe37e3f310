"""`stllm demo` as a command: where it says it is, what it leaves behind, and a port that is taken."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from stllm.cli import main
from stllm.conversation.chat import Chat
from stllm.serving import listening


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, chat: Chat, tmp_path: Path) -> Iterator[Path]:
    """The engine is there at once, temporary folders lie in the one given, Ctrl-C is heard in the background, too."""
    monkeypatch.setattr(listening, "load_chat", lambda *_, **__: chat)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended, interrupted = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield tmp_path
    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGINT, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_uploaded_is_gone_when_it_ends(quick: Path, capsys, number: int) -> None:
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


def test_a_port_that_is_taken_is_said(quick: Path, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--ckpt-path", "d", "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: 127.0.0.1:{port} cannot be taken (Address already in use): name another --port, or a --host of this "
        "machine\n"
    )
    assert not list(quick.glob("stllm-demo-*"))
