"""`stllm serve` with OpenAI's client: answers, streams, errors, a full queue, disconnecting clients."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from torch import Tensor

from stllm.conversation.chat import Chat, Request
from stllm.conversation.requests import Media, Prepared
from stllm.processors.templates import Turn
from stllm.serving.app import Server
from stllm.serving.limits import Limits
from tests.conversation.test_chat import new_chat
from tests.helpers.serving import MODEL, Endless, client_of, data_url, serving, user, wait_until
from tests.helpers.videos import write_video

LIMITS = Limits(media_bytes=200_000, media_seconds=5, new_tokens=400)
QUESTIONS = ["what moves first", "which color is the square", "how many times does the object move", "what is it"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("media")
    return [write_video(folder / f"{count}.mp4", num_frames=count) for count in (20, 31)]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return new_chat()


@pytest.fixture(scope="module")
def server(chat: Chat, clips: list[Path]) -> Server:
    return Server(chat, MODEL, media_root=clips[0].parent, limits=LIMITS)


@pytest.fixture(scope="module")
def address(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(server) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return client_of(address)


@pytest.fixture(autouse=True)
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Iterator[Path]:
    """Return the folder of uploads. After each test it must be empty, and the queue, too."""
    monkeypatch.setattr(server, "folder", tmp_path / "uploads")
    (tmp_path / "uploads").mkdir()
    yield tmp_path / "uploads"
    wait_until(lambda: not server.jobs.num_inside)
    assert not list((tmp_path / "uploads").iterdir())


def complete(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": list(messages), "max_tokens": 8, **fields})


def test_an_answer_equals_the_chats(client: openai.OpenAI, chat: Chat, clips: list[Path]) -> None:
    for clip in clips:
        for url in (data_url(clip), clip.name, f"file://{clip}"):
            found = complete(client, user(QUESTIONS[0], url))
            assert found.choices[0].message.content == chat.ask(clip, QUESTIONS[0]).text
            assert found.model == MODEL
    prepared = chat.prepare(Request((Turn(QUESTIONS[0]),), Media(str(clips[0]))))
    assert prepared.visual is not None
    found = complete(client, user(QUESTIONS[0], clips[0].name), max_tokens=3)
    assert found.usage.prompt_tokens == len(prepared.ids) - 1 + len(prepared.visual)
    assert found.usage.completion_tokens == 3
    assert found.choices[0].finish_reason == "length"
    fewer = complete(client, user(QUESTIONS[0], clips[0].name), extra_body={"num_frames": 2})
    assert found.usage.prompt_tokens - fewer.usage.prompt_tokens == 4 * 4  # four frames less
    assert fewer.choices[0].message.content == chat.ask(clips[0], QUESTIONS[0], num_frames=2).text


def test_streamed_pieces_join_to_the_answer(client: openai.OpenAI, chat: Chat, clips: list[Path]) -> None:
    chunks = list(
        complete(client, user(QUESTIONS[1], data_url(clips[0])), stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == chat.ask(clips[0], QUESTIONS[1]).text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 8)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_its_mark(address: str, clips: list[Path]) -> None:
    body = {"model": MODEL, "messages": [user("what", clips[0].name)], "stream": True, "max_tokens": 2}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = reply.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


def test_turns_and_a_system_message_are_in_the_prompt(client: openai.OpenAI, chat: Chat, clips: list[Path]) -> None:
    turns = (Turn(QUESTIONS[0], "a ball"), Turn(QUESTIONS[1]))
    messages = [user(QUESTIONS[0], data_url(clips[0])), {"role": "assistant", "content": "a ball"}, user(QUESTIONS[1])]
    media = Media(str(clips[0]))
    for system in (None, "watch the object move"):
        before = [] if system is None else [{"role": "system", "content": system}]
        expected = chat.answer([Request(turns, media, system)])[0].text
        assert complete(client, *before, *messages).choices[0].message.content == expected


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-38, 1e-6])
def test_a_tiny_temperature_is_greedy(client: openai.OpenAI, clips: list[Path], temperature: float) -> None:
    answers = [
        complete(client, user(QUESTIONS[0], clips[0].name), temperature=value).choices[0].message.content
        for value in (0, temperature)
    ]
    assert answers[0] == answers[1]


def test_a_text_under_the_media_root_is_not_quoted(client: openai.OpenAI, clips: list[Path]) -> None:
    secret = clips[0].parent / "secret.mp4"
    secret.write_text("password: 1234\n" * 9)
    with pytest.raises(openai.BadRequestError, match="found text, expected") as caught:
        complete(client, user("what", secret.name))
    assert "password" not in str(caught.value)


def test_requests_with_an_image_and_without_media(client: openai.OpenAI, chat: Chat, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture)
    found = complete(client, user(QUESTIONS[0], data_url(picture, "image/png"), kind="image_url"))
    assert found.choices[0].message.content == chat.ask(picture, QUESTIONS[0]).text
    assert complete(client, user(QUESTIONS[0])).choices[0].message.content == chat.ask(None, QUESTIONS[0]).text


def test_concurrent_clients_get_their_own_answers(address: str, chat: Chat, clips: list[Path]) -> None:
    asked = [(clip, question) for clip in clips for question in QUESTIONS] * 2
    expected = [chat.ask(clip, question).text for clip, question in asked]
    assert len(set(expected)) > 2

    def ask(number: int) -> str:
        clip, question = asked[number]
        found = complete(client_of(address), user(question, data_url(clip)), stream=number % 2 == 1)
        if number % 2 == 0:
            return str(found.choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in found)

    with ThreadPoolExecutor(2) as clients:
        assert list(clients.map(ask, range(len(asked)))) == expected


def test_html_in_a_question_is_text(client: openai.OpenAI, chat: Chat, clips: list[Path]) -> None:
    question = "<script>alert(1)</script> what & **why** {text} ${x} <visual> </Video>"
    found = complete(client, user(question, data_url(clips[0])))
    assert found.choices[0].message.content == chat.ask(clips[0], question).text


def test_models_and_health(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "stllm"
    with pytest.raises(openai.NotFoundError, match="the only model here is 'tiny'"):
        client.models.retrieve("gpt")
    health = httpx.get(f"{address}/health", timeout=60).json()
    assert health == {"status": "ok", "model": MODEL, "requests": 0, "places": 17}


TEXT = "data:video/mp4;base64,aGVsbG8gd29ybGQsIHRoaXMgaXMgbm8gdmlkZW8="


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"messages": [user(" ", "20.mp4")]}, openai.BadRequestError, "the question is empty"),
        (
            {"messages": [user("what", TEXT)]},
            openai.BadRequestError,
            "the video or image: found text, expected a video",
        ),
        ({"messages": [user("what", "data:video/mp4;base64,")]}, openai.BadRequestError, "the file is empty"),
        ({"messages": [user("what", "data:,x")]}, openai.BadRequestError, "not of the form data:video/mp4;base64"),
        ({"messages": [user("what", "../../secret.mp4")]}, openai.NotFoundError, "no such file under this server's"),
        ({"messages": [user("what", "file:///etc/passwd")]}, openai.NotFoundError, "no such file under this server's"),
        ({"messages": [user("what", "http://127.0.0.1/x")]}, openai.BadRequestError, "nothing from the network"),
        ({"messages": [user("what " * 600, "20.mp4")]}, openai.BadRequestError, "the language model has 512 positions"),
        ({"messages": [user("what", "20.mp4")], "n": 2}, openai.BadRequestError, "n is not supported"),
        ({"messages": [user("what")], "model": "gpt"}, openai.NotFoundError, "'gpt' is not served here"),
    ],
)
def test_refused_requests_get_openai_errors(client, uploads: Path, clips, fields, kind, words: str) -> None:
    for stream in (False, True):
        with pytest.raises(kind, match=words) as caught:
            complete(client, **fields, stream=stream)
        assert set(caught.value.body) == {"message", "type", "param", "code"}
        for place in (uploads, clips[0].parent, Path.cwd()):
            assert str(place) not in str(caught.value)


def test_large_long_and_unknown_media_are_refused(client: openai.OpenAI, tmp_path: Path) -> None:
    long = write_video(tmp_path / "long.mp4", num_frames=151)
    with pytest.raises(openai.BadRequestError, match=r"the video lasts 6\.0 s, at most 5\.0 s are taken"):
        complete(client, user("what", data_url(long)))
    for num_bytes, status in ((201_000, 400), (5_000_000, 413)):
        with pytest.raises(openai.APIStatusError, match="MiB") as caught:
            complete(client, user("what", f"data:video/mp4;base64,{'A' * (num_bytes * 4 // 3)}"))
        assert caught.value.status_code == status


def test_unknown_paths_methods_types_and_hosts_are_refused(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    assert httpx.get(url, timeout=60).status_code == 405
    assert (
        httpx.get(f"{address}/v1/nothing", timeout=60)
        .json()["error"]["message"]
        .startswith("Not Found: this server offers")
    )
    assert httpx.get(f"{address}/../../etc/passwd", timeout=60).status_code == 404
    plain = httpx.post(
        url, content=b"{}", headers={"content-type": "text/plain"}, timeout=60
    )  # what a foreign page could send
    assert (plain.status_code, "application/json" in plain.json()["error"]["message"]) == (415, True)
    hosts = ("evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "")
    for path, host in [*product(["health"], hosts), ("v1/nothing", hosts[0]), ("v1/chat/completions", hosts[0])]:
        foreign = httpx.get(f"{address}/{path}", headers={"host": host}, timeout=60)
        assert foreign.status_code == 400
        assert foreign.json()["error"]["message"] == "invalid Host header: this server answers to 127.0.0.1"
    assert httpx.get(f"{address}/health", headers={"host": "127.0.0.1:99"}, timeout=60).status_code == 200


def test_a_request_that_does_not_arrive_times_out(chat: Chat) -> None:
    import socket
    from urllib.parse import urlsplit

    server = Server(chat, MODEL, limits=replace(LIMITS, body_seconds=0.2))
    with serving(server) as address:
        with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert b"408" in connection.recv(1000)
        wait_until(lambda: not server.jobs.num_inside)


def test_an_unexpected_error_reveals_nothing_about_the_machine(client, chat: Chat, clips, monkeypatch, caplog) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(f"in {clips[0]}")

    with monkeypatch.context() as patch:
        patch.setattr(chat, "prepare", fails)
        with pytest.raises(openai.InternalServerError, match="the server failed on this request") as caught:
            complete(client, user("what", clips[0].name))
        assert str(clips[0].parent) not in str(caught.value)
        assert "a request failed" in caplog.text
        patch.setattr(chat, "prepare", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(openai.InternalServerError, match="not enough memory for this: send a smaller num_frames"):
            complete(client, user("what", clips[0].name))
    assert complete(client, user("what", clips[0].name)).choices


def test_an_error_during_a_stream_ends_it(client, chat: Chat, clips, monkeypatch) -> None:
    def broken(*_: Any) -> Iterator[str]:
        yield "a "
        raise MemoryError

    monkeypatch.setattr(chat, "stream_prepared", broken)
    chunks = iter(complete(client, user("what", clips[0].name), stream=True))
    assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "a "]
    with pytest.raises(openai.APIError, match="not enough memory"):
        next(chunks)


@pytest.fixture
def slow(clips: list[Path], uploads: Path) -> Iterator[tuple[Server, Endless, str]]:
    """Start a server with one place, and a model that generates for minutes."""
    chat = new_chat("minigpt4")
    endless = Endless(chat, seconds=0.1)
    server = Server(chat, MODEL, media_root=clips[0].parent, limits=replace(LIMITS, waiting=0), folder=uploads)
    with serving(server) as address:
        yield server, endless, address


def test_a_full_queue_refuses_at_once_and_a_leaving_client_frees_its_place(slow, clips, uploads: Path) -> None:
    server, endless, address = slow
    stream = complete(client_of(address), user("what", data_url(clips[0])), stream=True, max_tokens=400)
    next(iter(stream))
    assert len(list(uploads.glob("request-*/*"))) == 1
    with pytest.raises(openai.InternalServerError, match="all 1 places are taken") as caught:
        complete(client_of(address), user("what", f"data:video/mp4;base64,{'A' * 200_000}"))
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "2"
    stream.close()
    wait_until(lambda: not server.jobs.num_inside)
    assert not list(uploads.iterdir())
    assert endless.steps < 300
    endless.seconds = 0
    assert complete(client_of(address), user("what", "20.mp4")).usage.completion_tokens == 8


def test_a_disconnecting_client_ends_its_answer(slow) -> None:
    server, endless, address = slow
    impatient = client_of(address).with_options(timeout=2)
    with pytest.raises(openai.APITimeoutError):
        complete(impatient, user("what", "20.mp4"), max_tokens=400)
    wait_until(lambda: not server.jobs.num_inside)
    assert 0 < endless.steps < 300


def test_a_client_that_leaves_the_queue_is_never_answered(clips: list[Path]) -> None:
    chat = new_chat("minigpt4")
    endless = Endless(chat, seconds=0.1)
    server = Server(chat, MODEL, media_root=clips[0].parent, limits=replace(LIMITS, waiting=1))
    answered: list[str] = []
    original = chat.batches._generate

    def generate(prepared: list[Prepared], *rest: Any, **more: Any) -> Tensor:
        answered.extend(one.request.turns[0].question for one in prepared)
        return original(prepared, *rest, **more)

    chat.batches._generate = generate
    with serving(server) as address:
        stream = complete(client_of(address), user("first", "20.mp4"), stream=True, max_tokens=400)
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            complete(client_of(address).with_options(timeout=1), user("second", "20.mp4"))
        wait_until(lambda: server.jobs.num_inside == 1)
        stream.close()
        endless.seconds = 0
        complete(client_of(address), user("third", "20.mp4"))
    assert answered == ["first", "third"]


def test_one_client_cannot_take_all_places(chat: Chat) -> None:
    server = Server(chat, MODEL, limits=replace(LIMITS, waiting=3))
    with serving(server) as address, ThreadPoolExecutor(5) as threads:
        other = client_of(address).with_options(default_headers={"X-Forwarded-For": "192.0.2.1"})
        with chat.lock:
            replies = [threads.submit(complete, client_of(address), user(QUESTIONS[0])) for _ in range(4)]
            wait_until(lambda: server.jobs.num_inside == 4)
            with pytest.raises(openai.InternalServerError, match="all 4 places are taken"):
                complete(client_of(address), user(QUESTIONS[0]))
            replies.append(threads.submit(complete, other, user(QUESTIONS[0])))
            wait_until(lambda: server.jobs.num_inside == 5)
        assert all(reply.result().choices for reply in replies)


def test_waiting_questions_are_answered_in_one_batch(clips: list[Path]) -> None:
    chat = new_chat()
    server, sizes = Server(chat, MODEL, media_root=clips[0].parent, limits=LIMITS), []
    generate = chat.batches._generate

    def counted(prepared: Sequence[Prepared], *rest: Any, **more: Any) -> Tensor:
        sizes.append(len(prepared))
        return generate(prepared, *rest, **more)

    chat.batches._generate = counted
    expected = [chat.ask(clips[0], question, num_beams=1).text for question in QUESTIONS]
    with serving(server) as address, ThreadPoolExecutor(4) as threads:
        with chat.lock:
            replies = [threads.submit(complete, client_of(address), user(QUESTIONS[0], "20.mp4"))]
            wait_until(lambda: sizes == [1])
            replies += [
                threads.submit(complete, client_of(address), user(question, "20.mp4")) for question in QUESTIONS[1:]
            ]
            wait_until(lambda: len(chat.batches._waiting) == 3)
        assert [reply.result().choices[0].message.content for reply in replies] == expected
    assert sizes == [1, 3]


def test_ending_the_server_ends_the_answer(clips: list[Path]) -> None:
    chat = new_chat("minigpt4")
    endless = Endless(chat, seconds=0.05)
    server = Server(chat, MODEL, media_root=clips[0].parent, limits=LIMITS)
    with serving(server) as address:
        stream = iter(complete(client_of(address), user("what", "20.mp4"), stream=True, max_tokens=400))
        next(stream)
    assert endless.steps < 400
    assert server.jobs.num_inside == 0
