"""Arriving requests: slow senders take no places, and large bodies need limited memory and time."""

import base64
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from stllm.conversation.chat import Chat
from stllm.serving import listening
from stllm.serving.app import Server
from stllm.serving.limits import Limits, split_medium
from tests.helpers import memory
from tests.helpers.serving import MODEL, connected, serving, user, wait_until

MEBIBYTE = 1 << 20
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture
def server(chat: Chat, tmp_path: Path) -> Server:
    return Server(chat, MODEL, limits=Limits(waiting=1), folder=tmp_path)


@pytest.fixture
def address(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(listening, "HEADER_SECONDS", 0.5)
    with serving(server) as address:
        yield address


def post(address: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers, timeout=60)


def test_slow_requests_take_no_places_in_the_queue(address: str, server: Server) -> None:
    body = json.dumps({"model": MODEL, "messages": [user("what")], "max_tokens": 2}).encode()
    with ExitStack() as stack:
        for _ in range(40):
            connection = stack.enter_context(closing(connected(address)))
            connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        wait_until(lambda: server.bodies.num_bytes == 40)
        assert httpx.get(f"{address}/health", timeout=60).json()["requests"] == 0
        assert post(address, body).status_code == 200
    wait_until(lambda: server.bodies.num_bytes == 0)


def test_a_hundred_aborted_requests_leave_nothing(address: str, server: Server, tmp_path: Path) -> None:
    url = f"data:video/mp4;base64,{base64.b64encode(os.urandom(300_000)).decode()}"
    body = json.dumps({"model": MODEL, "messages": [user("what", url)], "max_tokens": 2}).encode()
    for at in range(100):  # half of them have been sent whole
        with closing(connected(address)) as connection:
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode())
            connection.sendall(body if at % 2 else body[:200_000])
    wait_until(lambda: not server.bodies.num_bytes and not server.jobs.num_inside)
    assert not list(tmp_path.iterdir())


def test_headers_have_a_time_limit(address: str) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for sent in (b"", b"G", whole[:-2]):
        with closing(connected(address)) as connection:
            connection.sendall(sent)
            assert connection.recv(1000) == b""
    with closing(connected(address)) as connection:
        for piece in (whole, whole[:9], whole[9:], whole[:-2]):  # the last one is never finished
            connection.sendall(piece)
            time.sleep(0.2)
        replies = b""
        while more := connection.recv(1000):
            replies += more
        assert replies.count(b"200 OK") == 2


def test_the_total_size_of_arriving_bodies_is_limited(
    address: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.bodies, "most_together", MEBIBYTE)
    with closing(connected(address)) as connection:
        connection.sendall(f"{HEAD}Content-Length: 1000000\r\n\r\n{'x' * 900_000}".encode())
        wait_until(lambda: server.bodies.num_bytes == 900_000)
        reply = post(address, b"x" * 200_000)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "server_overloaded")
        assert post(address, b"{}").status_code == 400
    wait_until(lambda: server.bodies.num_bytes == 0)


@pytest.mark.slow  # it measures memory and seconds, too
@pytest.mark.skipif(not memory.STATUS.exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["messages", "parts", "numbers", "marks", "opened"])
def test_many_tiny_values_take_little_memory_and_time(address: str, kind: str) -> None:
    start = f'{{"model": "{MODEL}", "messages": ['
    tiny = {
        "messages": '{"role":"user","content":"a"},',
        "parts": '{"role":"user","content":[{"type":"text","text":"a"}]},',
        "numbers": "1,",
        "marks": '"data:",',
        "opened": "[",
    }[kind]
    body = (start + tiny * (40 * MEBIBYTE // len(tiny))).encode()
    with memory.peak_below(200), ThreadPoolExecutor(1) as pool:
        sent = pool.submit(post, address, body)
        slowest = 0.0
        while not sent.done():
            before = time.monotonic()
            httpx.get(f"{address}/health", timeout=30)
            slowest = max(slowest, time.monotonic() - before)
    assert sent.result().status_code == 413
    assert slowest < 1.5


def test_the_number_of_messages_and_parts_is_limited(address: str) -> None:
    many = [{"role": "user", "content": "a"}] * 1001
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 101}]
    for messages, words in ((many, "at most 1000 items"), (parts, "a message has 101 parts")):
        reply = post(address, json.dumps({"model": MODEL, "messages": messages}).encode())
        assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True)


@pytest.mark.slow  # it measures memory and seconds, which other work on the machine changes
@pytest.mark.skipif(not memory.STATUS.exists(), reason="memory is read from /proc")
def test_a_large_medium_needs_limited_memory(address: str) -> None:
    content = os.urandom(40 * MEBIBYTE)
    url = b"data:video/mp4;base64," + base64.b64encode(content)
    body = json.dumps({"model": MODEL, "messages": [user("what", "URL")]}).encode().replace(b"URL", url)
    del url, content
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    pieces = (body[at : at + MEBIBYTE] for at in range(0, len(body), MEBIBYTE))  # of one body httpx makes two copies
    with memory.peak_below(100):
        reply = httpx.post(f"{address}/v1/chat/completions", content=pieces, headers=headers, timeout=60)
    assert "neither video nor image" in reply.json()["error"]["message"]


@pytest.mark.parametrize("escaped", [False, True])
def test_a_split_medium_has_the_same_content(escaped: bool, tmp_path: Path) -> None:
    from stllm.serving.limits import fetch_medium

    limits = Limits(text_characters=10)
    content = os.urandom(3 * MEBIBYTE + 1)
    url = "data:video/mp4;base64," + base64.b64encode(content).decode()
    body = json.dumps({"a": "data: not this", "url": url, "b": 'x"data:'})
    words, medium = split_medium(bytearray((body.replace("/", "\\/") if escaped else body).encode()), limits)
    found = json.loads(words)
    assert (found["a"], found["b"]) == ("data: not this", 'x"data:')
    path = fetch_medium(found["url"], medium, folder=tmp_path, root=None, limits=limits)
    assert path.read_bytes() == content
