"""Idle connections: clients that go on after a reply, do not read, or do not send."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stllm.serving import listening as protocol
from tests.helpers.serving import connected, running, wait_until

PLACES = 20


def hello(request: Request) -> Response:
    return Response("hello")


def large(request: Request) -> Response:
    return Response(bytes(20 << 20))


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 1)
    app = Starlette(routes=[Route("/", hello), Route("/large", large)])
    with running(app, limit_concurrency=PLACES) as address:
        yield address


def ends(connection: socket.socket) -> bool:
    """Check whether the server closes the connection, possibly after sending data."""
    try:
        while connection.recv(1 << 20):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("rest", [b"x", b"x" * 10])
def test_the_rest_of_a_body_after_the_reply_has_a_time_limit(address: str, rest: bytes) -> None:
    with closing(connected(address)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n")
        assert b"405" in connection.recv(1000)
        connection.sendall(rest)
        assert ends(connection)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux ends it")
def test_an_unread_reply_has_a_time_limit(address: str) -> None:
    with closing(connected(address)) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        time.sleep(4)
        received = 0
        with pytest.raises(ConnectionResetError):
            while True:
                received += len(connection.recv(1 << 20))
                assert received < 20 << 20


def test_idle_connections_are_closed_for_others(address: str) -> None:
    with ExitStack() as stack:
        for _ in range(10 * PLACES):
            stack.enter_context(closing(connected(address)))
        assert httpx.get(address, timeout=60).text == "hello"
    wait_until(lambda: httpx.get(address, timeout=60).text == "hello")
