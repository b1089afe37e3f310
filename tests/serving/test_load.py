"""Fifty questions by eight concurrent clients: all get their own answers, and memory and files are freed."""

import gc
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stllm.serving.app import Server
from tests.conversation.test_chat import QUESTIONS, new_chat
from tests.helpers.serving import MODEL, client_of, data_url, serving, user, wait_until
from tests.helpers.videos import write_video

STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc")
def test_fifty_questions_by_eight_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clips = [write_video(tmp_path / f"{count}.mp4", num_frames=count) for count in range(20, 30)]
    chat = new_chat(cache_bytes=200_000)
    asked = [(clip, f"{QUESTIONS[n % 3]} {n // 30}") for n, clip in enumerate(clips * 5)]
    expected = [chat.ask(clip, question).text for clip, question in asked]
    assert len(set(expected)) >= 20
    server = Server(chat, MODEL)
    with serving(server) as address:

        def ask(number: int) -> str:
            clip, question = asked[number]
            with client_of(address) as client:
                found = client.chat.completions.create(model=MODEL, messages=[user(question, data_url(clip))])
            return str(found.choices[0].message.content)

        def all_at_once() -> list[str]:
            with ThreadPoolExecutor(8) as clients:
                return list(clients.map(ask, range(50)))

        for _ in range(3):  # batches of all sizes have been
            assert all_at_once() == expected
        before = resident_bytes()
        for _ in range(2):
            assert all_at_once() == expected
        wait_until(lambda: not server.jobs.num_inside)
        assert resident_bytes() - before < 30 << 20
    assert chat.cache.num_bytes <= 200_000
    assert not list(tmp_path.glob("request-*"))
