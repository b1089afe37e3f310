"""The language model behind an engine: the same ids as here, many requests at once, and failures in a sentence."""

import json
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
import torch
from starlette.responses import HTMLResponse
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from stllm import load_chat
from stllm.cli import main
from stllm.common.errors import UserError
from stllm.conversation.chat import FOLDER, find_examples
from stllm.conversation.decoding import Decoding
from stllm.conversation.remote import RemoteLanguageModel
from stllm.conversation.requests import EngineError, RequestError
from stllm.processors.prompts import PromptProcessor
from tests.conversation.test_chat import new_chat
from tests.helpers.engine_server import FakeEngine, engine_server, refusal
from tests.helpers.serving import wait_until

GREEDY = Decoding(num_beams=1, max_new_tokens=12)


@pytest.fixture(scope="module")
def processor() -> PromptProcessor:
    return new_chat().processor


@pytest.fixture
def engine(processor: PromptProcessor) -> FakeEngine:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=processor.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return FakeEngine(AutoModelForCausalLM.from_config(config).eval(), processor.tokenizer)


@contextmanager
def connected(engine: FakeEngine, **options: Any) -> Iterator[RemoteLanguageModel]:
    with engine_server(engine) as url:
        remote = RemoteLanguageModel(url, **{"num_retries": 2, **options})
        try:
            remote.find_model()
            remote.compare(engine.model.get_input_embeddings())
            yield remote
        finally:
            remote.close()


def prompts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5 + number, 32, generator=generator) for number in range(count)]


def test_answers_have_the_ids_that_generate_gives_here(engine, processor):
    stopping = processor.stopping()
    body = {"max_tokens": 12, "stop": stopping["stop_strings"], "stop_token_ids": [stopping["eos_token_id"]]}
    expected = [engine.generate(embeds, body)[0] for embeds in prompts(6)]
    with connected(engine) as remote:
        futures = [remote.submit(embeds, GREEDY, stopping) for embeds in prompts(6)]
        assert [future.result(60) for future in futures] == expected
        ended = []

        def pieces() -> Iterator[str]:
            ended.append((yield from remote.stream(prompts(1)[0], GREEDY, stopping, Event())))

        assert "".join(pieces()) == engine.text(expected[0])
    assert ended == [expected[0]]
    assert len(set(map(tuple, expected))) > 1


def test_requests_are_in_flight_together_up_to_a_bound(engine, processor):
    engine.seconds = 0.1
    with connected(engine, max_in_flight=4) as remote:
        engine.most_inside = 0
        futures = [remote.submit(embeds, GREEDY, processor.stopping()) for embeds in prompts(10)]
        assert all(future.result(60) for future in futures)
    assert engine.most_inside == 4


def test_sampling_is_passed_on_and_greedy_is_named(engine, processor):
    sampling = Decoding(num_beams=1, max_new_tokens=3, temperature=0.7, top_p=0.5)
    with connected(engine) as remote:
        for decoding in (sampling, GREEDY):
            remote.submit(prompts(1)[0], decoding, processor.stopping()).result(60)
    sampled, greedy = engine.bodies[-2:]
    assert (sampled["temperature"], sampled["top_p"], sampled["max_tokens"]) == (0.7, 0.5, 3)
    assert (greedy["temperature"], greedy["top_p"], greedy["max_tokens"]) == (0, 1, 12)
    assert greedy["stop"] == ["###"] and greedy["stop_token_ids"] == [processor.eos_token_id]


@pytest.mark.parametrize(
    ("decoding", "message"),
    [(Decoding(num_beams=5), "5 beams"), (Decoding(num_beams=1, repetition_penalty=1.5), "repetition penalty of 1.5")],
)
def test_what_an_engine_lacks_is_refused_by_name(engine, processor, decoding, message):
    with connected(engine) as remote, pytest.raises(UserError, match=message):
        remote.submit(prompts(1)[0], decoding, processor.stopping())


def test_an_engine_that_fails_for_a_while_is_asked_again(engine, processor):
    with connected(engine) as remote:
        engine.replies = iter([refusal(503, "starting"), refusal(500, "out of blocks")])
        assert remote.submit(prompts(1)[0], GREEDY, processor.stopping()).result(60)


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (refusal(500, "out of blocks"), EngineError, "failed with status 500: out of blocks; start it"),
        (refusal(404, "The model `lm` does not exist."), EngineError, "does not exist"),
        (refusal(401, "Unauthorized"), EngineError, "VLLM_API_KEY"),
        (refusal(400, "prompt_embeds hidden_size 64 does not match", "prompt_embeds"), EngineError, "does not match"),
        (refusal(400, "too long", "input_tokens"), RequestError, "the engine refused the prompt: too long"),
        (HTMLResponse("<html>Sign in"), EngineError, "no answer of its protocol"),
    ],
)
def test_a_failure_is_one_sentence(engine, processor, reply, kind, message):
    with connected(engine) as remote:
        engine.replies = iter([reply] * 3)
        with pytest.raises(UserError, match=message) as caught:
            remote.submit(prompts(1)[0], GREEDY, processor.stopping()).result(60)
        assert type(caught.value) is kind
        engine.replies = iter([reply] * 3)
        with pytest.raises(UserError, match=message):
            list(remote.stream(prompts(1)[0], GREEDY, processor.stopping(), Event()))


def test_an_engine_that_is_down_is_named(processor):
    remote = RemoteLanguageModel("http://127.0.0.1:9/v1/", num_retries=0)
    try:
        with pytest.raises(UserError, match=r"the engine at http://127.0.0.1:9 cannot be reached .*vllm serve DIR"):
            remote.find_model()
    finally:
        remote.close()
    with pytest.raises(UserError, match="expected the address of a server"):
        RemoteLanguageModel("localhost:8000")


def test_a_slow_engine_ends_in_a_sentence(engine, processor):
    with connected(engine, seconds=0.2, num_retries=0) as remote:
        engine.seconds = 30
        with pytest.raises(UserError, match="did not answer in time"):
            remote.submit(prompts(1)[0], GREEDY, processor.stopping()).result(60)


@pytest.mark.parametrize("kind", ["no embeddings", "another width", "other weights"])
def test_the_wrong_model_is_found_before_the_first_question(engine, kind):
    own = engine.model.get_input_embeddings()
    if kind == "no embeddings":
        engine.takes_embeddings = False
    else:
        own = torch.nn.Embedding(len(own.weight), 16 if kind == "another width" else 32)
    words = {
        "no embeddings": "enable-prompt-embeds",
        "another width": "does not match",
        "other weights": "another lang",
    }
    with engine_server(engine) as url:
        remote = RemoteLanguageModel(url, num_retries=0)
        remote.find_model()
        try:
            with pytest.raises(UserError, match=words[kind]):
                remote.compare(own)
        finally:
            remote.close()


def test_an_answer_that_nobody_wants_ends_at_the_engine(engine, processor):
    long = Decoding(num_beams=1, max_new_tokens=200)
    stop = Event()
    with connected(engine) as remote:
        stream = remote.stream(prompts(1)[0], long, processor.stopping(), stop)
        next(stream)
        stop.set()
        assert list(stream) == []
        closed = remote.stream(prompts(1)[0], long, processor.stopping(), Event())
        next(closed)
        closed.close()
        engine.seconds = 30
        future = remote.submit(prompts(1)[0], long, processor.stopping())
        wait_until(lambda: engine.inside == 1)
        future.cancel()
        with pytest.raises(CancelledError):
            future.result()
        assert engine.abandoned == 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an engine with the language model of the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("engine") / "lm"
    assert main(["convert", str(FOLDER), "--to", str(folder), "--format", "language-model"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with engine_server(FakeEngine(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))) as url:
        yield url


def test_chat_gives_the_answers_that_it_gives_without_an_engine(tiny, capsys):
    path, question = find_examples()[0]
    words = ["chat", "--device", "cpu", "--video", str(path), "--question", question, "--question", "Why?", "--json"]
    assert main([*words, "--num-beams", "1"]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*words, "--engine", tiny]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for key in ("answer", "visual_tokens", "frame_times", "cut_tokens"):
        assert [line[key] for line in found] == [line[key] for line in expected], key
    assert main([*words[:-1], "--engine", tiny, "--stream"]) == 0
    assert capsys.readouterr().out.splitlines() == [line["answer"] for line in expected]


def test_the_layers_of_the_language_model_are_not_loaded(tiny):
    chat = load_chat(FOLDER, device="cpu", engine=tiny)
    held = [name for name in chat.model.state_dict() if name.startswith("language_model.")]
    assert held == ["language_model.model.embed_tokens.weight"]
    assert (chat.decoding.num_beams, chat.decoding.repetition_penalty) == (1, 1)
    path, question = find_examples()[0]
    with pytest.raises(UserError, match="whole language model in this process"):
        chat.evidence(path, question)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--num-beams", "5"], 1, "5 beams were asked for"),
        (["--engine", "http://127.0.0.1:9"], 1, "cannot be reached"),
        (["--evidence", "chart.png"], 2, "--evidence needs the whole language model"),
    ],
)
def test_chat_refuses_in_one_sentence(tiny, capsys, monkeypatch, more, code, message):
    monkeypatch.setattr("stllm.conversation.remote.NUM_RETRIES", 0)
    path, question = find_examples()[0]
    words = ["chat", "--device", "cpu", "--video", str(path), "--question", question, "--engine", tiny]
    assert main([*words, *more]) == code
    assert message in capsys.readouterr().err
