"""Uploads to the demo: removal of leftovers, allowed senders, and time limits."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from stllm.conversation.chat import Chat
from stllm.serving import listening
from stllm.serving.limits import PageLimits
from tests.helpers.demo import served
from tests.helpers.serving import connected, wait_until

FOREIGN: list[dict[str, str]] = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://[", "host": "127.0.0.1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:1"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def url(chat: Chat, folder: Path) -> Iterator[str]:
    with served(chat, folder, PageLimits(media_bytes=1 << 20, upload_seconds=1.5, body_seconds=0.3)) as url:
        yield url


def upload(url: str, content: bytes = b"something", *, field: str = "files", **options: Any) -> httpx.Response:
    files = {field: ("a.mp4", content)}
    return httpx.post(f"{url}gradio_api/upload", files=files, timeout=60, **options)


def half_sent(url: str) -> socket.socket:
    """Start an upload, and send half of it."""
    connection = connected(url)
    head = 'Content-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    connection.sendall(
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{httpx.URL(url).port}\r\nContent-Length: 200000\r\n"
        f"Content-Type: multipart/form-data; boundary=xx\r\n\r\n--xx\r\n{head}{'x' * 100_000}".encode()
    )
    return connection


def files(folder: Path) -> list[Path]:
    """Return the files left by uploads, without the demo's examples, which are in the same folder."""
    return [path for path in folder.rglob("*") if path.is_file() and (path.parent == folder or path.name == "a.mp4")]


def test_aborted_uploads_and_foreign_fields_leave_nothing(url: str, folder: Path) -> None:
    for _ in range(100):
        half_sent(url).close()
    for _ in range(3):
        upload(url, field="others")
    wait_until(lambda: not files(folder), 10)
    path = Path(upload(url).json()[0])
    assert files(folder) == [path]
    with closing(half_sent(url)):  # another that still arrives keeps its file, and does not hold the others'
        wait_until(lambda: len(files(folder)) == 2, 10)
        half_sent(url).close()
        assert upload(url).json() == [str(path)]
        assert len(files(folder)) >= 2
    wait_until(lambda: files(folder) == [path], 10)
    path.unlink()


def test_the_number_of_uploads_is_limited(chat: Chat, tmp_path: Path) -> None:
    with served(chat, tmp_path, PageLimits(folder_files=20)) as url:
        for number in range(40):
            reply = upload(url, str(number).encode())
            if reply.status_code != 200:
                break
        assert reply.status_code == 507 and 5 < number <= 21  # the demo's examples lie there, too


def test_slow_uploads_take_no_room_from_others(chat: Chat, tmp_path: Path) -> None:
    with served(chat, tmp_path, PageLimits(folder_bytes=1_210_000)) as url, ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(closing(half_sent(url)))
        time.sleep(1)  # 1,000,000 bytes have arrived beside the examples of 157,000
        assert upload(url).status_code == 200
        for connection in (stack.enter_context(closing(half_sent(url))) for _ in range(3)):
            connection.sendall(b"x" * 90_000)
        wait_until(lambda: b"507" in connection.recv(1000))


def test_uploads_and_calls_have_a_time_limit(url: str, folder: Path) -> None:
    with closing(half_sent(url)) as connection:
        assert b"408" in connection.recv(1000)
    wait_until(lambda: not files(folder), 10)
    with closing(connected(url)) as connection:
        head = f"POST /gradio_api/call/ask HTTP/1.1\r\nHost: 127.0.0.1:{httpx.URL(url).port}\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b"408" in connection.recv(1000)


def test_a_header_has_a_time_limit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEADER_SECONDS", 0.5)
    with closing(connected(url)) as connection:
        connection.sendall(b"GET /config HTTP/1.1\r\n")
        assert connection.recv(1000) == b""


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_page_of_another_site_cannot_upload(url: str, folder: Path, headers: dict[str, str]) -> None:
    for path, sent in (
        ("gradio_api/upload", {"files": {"files": ("a.mp4", b"something")}}),
        ("gradio_api/call/ask", {"json": {"data": []}}),
        ("gradio_api/queue/join", {"json": {"data": []}}),
    ):
        options: dict[str, Any] = dict(sent)
        assert httpx.post(f"{url}{path}", headers=headers, **options, timeout=60).status_code == 403
    assert not files(folder)


@pytest.mark.parametrize(
    "site", [{"sec-fetch-site": "same-origin", "origin": "https://public.example"}, {"origin": ""}]
)
def test_the_demos_own_page_can_upload(url: str, site: dict[str, str]) -> None:
    headers = {**site, **({"origin": url.rstrip("/")} if not site["origin"] else {})}
    reply = upload(url, headers=headers)
    Path(reply.json()[0]).unlink()
