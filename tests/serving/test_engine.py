"""`stllm serve --engine`: concurrent answers that equal those without an engine, and a failing engine."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stllm import load_chat
from stllm.cli import main
from stllm.conversation import remote
from stllm.conversation.chat import FOLDER, find_examples
from stllm.serving.app import Server
from tests.helpers.engine_server import FakeEngine, engine_server, refusal
from tests.helpers.serving import MODEL, client_of, data_url, serving, user, wait_until


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    folder = tmp_path_factory.mktemp("engine") / "lm"
    assert main(["convert", str(FOLDER), "--to", str(folder), "--format", "language-model"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return FakeEngine(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, engine_server(engine) as url:
        patch.setattr(remote, "NUM_RETRIES", 0)
        yield Server(load_chat(FOLDER, device="cpu", engine=url), MODEL)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with serving(server) as address:
        yield client_of(address)


def ask(client: openai.OpenAI, path: Path, question: str) -> str | None:
    reply = client.chat.completions.create(model=MODEL, messages=[user(question, data_url(path))], temperature=0)
    return reply.choices[0].message.content


def test_several_answers_are_generated_concurrently(client: openai.OpenAI, engine: FakeEngine) -> None:
    asked = list(find_examples())[:6]
    here = load_chat(FOLDER, device="cpu")
    expected = [here.ask(path, question, num_beams=1).text for path, question in asked]
    engine.seconds, engine.most_inside = 0.3, 0
    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(lambda one: ask(client, *one), asked)) == expected
    engine.seconds = 0
    assert engine.most_inside > 1


def test_an_answer_is_streamed(client: openai.OpenAI) -> None:
    path, question = find_examples()[5]
    pieces = client.chat.completions.create(
        model=MODEL, messages=[user(question, data_url(path))], stream=True, temperature=0
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == load_chat(FOLDER, device="cpu").ask(path, question, num_beams=1).text


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_gives_status_503(
    client: openai.OpenAI, engine: FakeEngine, server: Server, caplog, stream
) -> None:
    """The engine's address is logged, but not sent to the client."""
    path, question = find_examples()[0]
    engine.replies = iter([refusal(500, "out of blocks"), refusal(400, "too long", "input_tokens")])
    messages = [user(question, data_url(path))]
    with pytest.raises(openai.InternalServerError, match="the engine, which writes the answers, failed") as caught:
        client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
    assert caught.value.status_code == 503
    assert server.chat.engine is not None
    assert server.chat.engine.address not in str(caught.value)
    assert f"{server.chat.engine.address} failed with status 500: out of blocks" in caplog.text
    with pytest.raises(openai.BadRequestError, match="the engine refused the prompt: too long"):
        ask(client, path, question)
    wait_until(lambda: not server.jobs.num_inside)
