"""Fixtures of the attacks: a tiny model, and processes that end with their test, even if it fails."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stllm.conversation.chat import Chat
from tests.conversation.test_chat import new_chat

Run = Callable[[str, Path], "subprocess.Popen[str]"]


@pytest.fixture(scope="package")
def chat() -> Chat:
    return new_chat()


@pytest.fixture
def run() -> Iterator[Run]:
    """Start Python on a piece of code, with temporary files under a folder."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str, folder: Path) -> "subprocess.Popen[str]":
        command, environment = [sys.executable, "-c", code], {**os.environ, "TMPDIR": str(folder)}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
