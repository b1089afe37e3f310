"""Small files that take a minute to decode: decoding ends with the client, with the server, or at the time limit."""

import os
import re
import signal
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from stllm.conversation.chat import Chat
from stllm.media.reading import ReadingPool
from stllm.serving.app import Server
from stllm.serving.limits import Limits, PageLimits
from stllm.web.app import build_app
from stllm.web.service import Service
from tests.attacks.conftest import Run
from tests.helpers import memory
from tests.helpers.demo import uploaded
from tests.helpers.serving import MODEL, client_of, data_url, running, serving, user, wait_until
from tests.helpers.videos import write_video

SOON = 5.0  # seconds; a tenth of a second without other work on the machine

SERVER = """
import sys
from stllm.serving import listening
from tests.conversation.test_chat import new_chat

listening.load_chosen = lambda *_, **__: new_chat("minigpt4")
from stllm.cli import main
sys.exit(main(["serve", "--ckpt-path", "tiny", "--port", "0"]))
"""


def write_slow_gif(path: Path, side: int = 6000, num_frames: int = 200) -> Path:
    """Write a gif with frames of one pixel on a large canvas, which is composed again for each frame."""
    control = b"\x21\xf9\x04" + bytes([2 << 2, 4, 0, 0, 0])  # the canvas is cleared after the frame
    frames = (
        control + b"," + struct.pack("<HHHHB", at, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\0" for at in range(num_frames)
    )
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    path.write_bytes(head + b"".join(frames) + b";")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_slow_gif(folder / "slow.gif")
    write_video(folder / "clip.mp4", num_frames=20)
    return folder


@pytest.fixture(scope="module")
def server(chat: Chat, place: Path) -> Server:
    return Server(chat, MODEL, media_root=place, folder=place)


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with serving(server) as address:
        yield address


def complete(address: str, url: str, **options: Any) -> Any:
    with client_of(address).with_options(**options) as client:
        return client.chat.completions.create(model=MODEL, messages=[user("what", url)], max_tokens=2)


def decoding() -> list[int]:
    """Return the ids of child processes that are decoding."""
    found = []
    for process in memory.descendants(os.getpid()):
        with suppress(OSError):
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            found += [process] if state == "R" else []
    return found


def test_a_client_that_leaves_ends_the_decoding(address: str, server: Server, place: Path) -> None:
    complete(address, "clip.mp4")  # the processes run
    with pytest.raises(openai.APITimeoutError):
        complete(address, data_url(place / "slow.gif", "image/gif"), timeout=2)
    wait_until(lambda: not server.jobs.num_inside, SOON)
    wait_until(lambda: not decoding(), SOON)
    assert not list(place.glob("request-*"))


def test_others_are_answered_while_a_slow_file_is_decoded(address: str, server: Server, place: Path) -> None:
    with ThreadPoolExecutor(1) as clients:
        slow = clients.submit(complete, address, "slow.gif", timeout=60)
        wait_until(lambda: server.jobs.num_inside == 1)
        for _ in range(3):
            assert complete(address, data_url(place / "clip.mp4")).choices
        wait_until(lambda: bool(decoding()))
        for process in decoding():  # one that is killed, as by the system when memory runs out, takes nothing along
            os.kill(process, signal.SIGKILL)
        with pytest.raises(openai.BadRequestError, match="the video or image: the process that decoded it died"):
            slow.result()
    assert complete(address, data_url(place / "clip.mp4")).choices


def test_decoding_has_a_time_limit(chat: Chat, place: Path) -> None:
    with serving(Server(chat, MODEL, media_root=place, limits=Limits(read_seconds=1))) as address:
        with pytest.raises(openai.BadRequestError, match="could not be decoded within 1 s, the limit of this server"):
            complete(address, "slow.gif")
        assert complete(address, "clip.mp4").choices


def test_clips_read_in_another_process_are_equal(chat: Chat, place: Path) -> None:
    from functools import partial
    from threading import Event

    from stllm.conversation.requests import Media

    pool = ReadingPool(1, seconds=60)
    media = Media(str(place / "clip.mp4"))
    found = pool.read(partial(Limits().read, chat.read, media), Path(media.path), Event())
    expected = chat.read(media)
    assert found.digest == expected.digest
    assert (found.times, found.indices, found.info) == (expected.times, expected.indices, expected.info)
    pool.close()


def test_leaving_the_demo_ends_the_decoding(chat: Chat, tmp_path: Path, place: Path) -> None:
    service = Service(chat, PageLimits(read_seconds=30), tmp_path)
    with running(build_app(service, local=True)) as address:
        api = f"{address}/gradio_api"
        data = [uploaded(f"{address}/", place / "slow.gif"), "what", [], 6, 1, 0, 8]
        called = httpx.post(f"{api}/call/ask", json={"data": data}, timeout=60).json()["event_id"]
        with httpx.stream("GET", f"{api}/call/ask/{called}", timeout=60):
            wait_until(lambda: service.jobs.num_inside == 1)
        wait_until(lambda: not service.jobs.num_inside, SOON)
        wait_until(lambda: not decoding(), SOON)


@pytest.mark.slow
@pytest.mark.skipif(not memory.STATUS.exists(), reason="processes are looked for in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_the_server_ends_the_decoding(run: Run, place: Path, tmp_path: Path, number: int) -> None:
    process = run(SERVER, tmp_path)
    assert process.stdout is not None
    found = re.search(r"(http://\S+)/v1", process.stdout.readline())
    assert found is not None, process.communicate()

    def ask() -> None:
        body = {"model": "tiny", "messages": [user("what", data_url(place / "slow.gif", "image/gif"))]}
        with suppress(httpx.HTTPError):
            httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(2) as clients:
        for _ in range(2):
            clients.submit(ask)
        wait_until(lambda: len(list(tmp_path.glob("stllm-serve-*/request-*/medium"))) == 2)
        processes = memory.descendants(process.pid)
        assert len(processes) == 3
        process.send_signal(number)
        with ThreadPoolExecutor(1) as reader:  # what Python itself does at its end may take longer
            assert process.stderr is not None
            last = reader.submit(process.stderr.readline).result(SOON)
        assert last == ("" if number == signal.SIGKILL else "interrupted\n")
        assert process.communicate(timeout=60) == ("", "")  # the last process has closed its end, too
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    wait_until(lambda: not any(Path(f"/proc/{one}").exists() for one in processes), SOON)
    assert number == signal.SIGKILL or not list(tmp_path.glob("stllm-serve-*"))
