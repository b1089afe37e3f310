"""The language model behind an engine: equal token ids, concurrent requests, and error messages."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
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
from tests.helpers.serving import running, wait_until

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


def test_concurrent_requests_are_limited(engine, processor):
    engine.seconds = 0.1
    with connected(engine, max_in_flight=4) as remote:
        engine.most_inside = 0
        futures = [remote.submit(embeds, GREEDY, processor.stopping()) for embeds in prompts(10)]
        assert all(future.result(60) for future in futures)
    assert engine.most_inside == 4


def test_sampling_settings_are_sent_to_the_engine(engine, processor):
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
def test_settings_that_an_engine_lacks_are_refused(engine, processor, decoding, message):
    with connected(engine) as remote, pytest.raises(UserError, match=message):
        remote.submit(prompts(1)[0], decoding, processor.stopping())


def test_temporary_failures_of_the_engine_are_retried(engine, processor):
    with connected(engine) as remote:
        expected = remote.submit(prompts(1)[0], GREEDY, processor.stopping()).result(60)
        shutting_down = replied(choice(token_ids=expected[:1], finish_reason="abort"))  # as vLLM at SIGTERM
        engine.replies = iter([refusal(503, "starting"), refusal(500, "out of blocks"), shutting_down])
        assert remote.submit(prompts(1)[0], GREEDY, processor.stopping()).result(60) == expected


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (refusal(500, "out of blocks"), EngineError, "failed with status 500: out of blocks; start it"),
        (refusal(404, "The model `lm` does not exist."), EngineError, "does not exist"),
        (refusal(401, "Unauthorized"), EngineError, "VLLM_API_KEY"),
        (refusal(400, "prompt_embeds hidden_size 64 does not match", "prompt_embeds"), EngineError, "does not match"),
        (refusal(400, "too long", "input_tokens"), RequestError, "the engine refused the prompt: too long"),
        (HTMLResponse("<html>Sign in"), EngineError, "a reply of another form"),
    ],
)
def test_a_failure_is_reported_as_one_sentence(engine, processor, reply, kind, message):
    with connected(engine) as remote:
        engine.replies = iter([reply] * 3)
        with pytest.raises(UserError, match=message) as caught:
            remote.submit(prompts(1)[0], GREEDY, processor.stopping()).result(60)
        assert type(caught.value) is kind
        engine.replies = iter([reply] * 3)
        with pytest.raises(UserError, match=message):
            list(remote.stream(prompts(1)[0], GREEDY, processor.stopping(), Event()))


def test_an_unreachable_engine_is_reported(processor):
    remote = RemoteLanguageModel("http://127.0.0.1:9/v1/", num_retries=0)
    try:
        with pytest.raises(UserError, match=r"the engine at http://127.0.0.1:9 cannot be reached .*vllm serve DIR"):
            remote.find_model()
    finally:
        remote.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_requests_end_when_the_engine_shuts_down(processor, monkeypatch, streamed):
    """The engine behaves like vLLM at SIGTERM: its port is closed, and accepted requests get no reply."""
    monkeypatch.setattr("stllm.conversation.remote.WATCH_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        remote = RemoteLanguageModel(f"http://127.0.0.1:{listener.getsockname()[1]}", num_retries=0)
        arguments = (prompts(1)[0], GREEDY, processor.stopping())
        if streamed:
            future: Future[Any] = pool.submit(lambda: list(remote.stream(*arguments, Event())))
        else:
            future = remote.submit(*arguments)
        with listener.accept()[0]:
            listener.close()
            with pytest.raises(EngineError, match="broke off its answer"):
                future.result(60)
        remote.close()


def test_a_slow_engine_is_reported(engine, processor):
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


def test_a_cancelled_answer_ends_at_the_engine(engine, processor):
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
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FakeEngine]]:
    """Start an engine with the language model of the embedded checkpoint; yield its address, too."""
    folder = tmp_path_factory.mktemp("engine") / "lm"
    assert main(["convert", str(FOLDER), "--to", str(folder), "--format", "language-model"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    engine = FakeEngine(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    with engine_server(engine) as url:
        yield url, engine


def test_chat_answers_are_the_same_with_and_without_an_engine(tiny, capsys):
    path, question = find_examples()[0]
    words = ["chat", "--device", "cpu", "--video", str(path), "--question", question, "--question", "Why?", "--json"]
    assert main([*words, "--num-beams", "1"]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*words, "--engine", tiny[0]]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for key in ("answer", "visual_tokens", "frame_times", "cut_tokens"):
        assert [line[key] for line in found] == [line[key] for line in expected], key
    assert main([*words[:-1], "--engine", tiny[0], "--stream"]) == 0
    assert capsys.readouterr().out.splitlines() == [line["answer"] for line in expected]


def test_the_layers_of_the_language_model_are_not_loaded(tiny):
    chat = load_chat(FOLDER, device="cpu", engine=tiny[0])
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
        (["--engine", "http://me:secret@127.0.0.1:9/v1/"], 1, "the engine at http://127.0.0.1:9 cannot be reached"),
        (["--engine", "me:secret@localhost:8000"], 1, "--engine: found 'localhost:8000', expected a URL"),
        (["--engine", "http://[::1"], 1, "--engine: found 'http://[::1', expected a URL"),
        (["--engine", "http://h:99999"], 1, "--engine: found 'http://h:99999', expected a URL"),
        (["--engine", ""], 1, "--engine: found '', expected a URL"),
        (["--evidence", "chart.png"], 2, "--evidence needs the whole language model"),
    ],
)
def test_chat_refuses_in_one_sentence(tiny, capsys, monkeypatch, more, code, message):
    monkeypatch.setattr("stllm.conversation.remote.NUM_RETRIES", 0)
    path, question = find_examples()[0]
    words = ["chat", "--device", "cpu", "--video", str(path), "--question", question, "--engine", tiny[0]]
    assert main([*words, *more]) == code
    err = capsys.readouterr().err
    assert message in err and "secret" not in err


def choice(**changed: Any) -> dict[str, Any]:
    return {"index": 0, "text": "red", "token_ids": [300], "finish_reason": None, **changed}


def replied(*choices: Any) -> Response:
    return JSONResponse({"choices": choices})


def streamed(*events: Any) -> Response:
    """Return a streamed response that ends without [DONE]."""
    lines = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return Response("".join(f"data: {line}\n\n" for line in lines), media_type="text/event-stream")


FORM = "gave a reply of another form"
LIKELY = {"logprobs": {"top_logprobs": [{"a": float("nan")}]}}


@pytest.mark.parametrize(
    ("before", "reply", "message"),
    [
        (0, Response(json.dumps({"choices": [LIKELY]})), FORM),  # comparing the models
        (0, replied({"logprobs": {"top_logprobs": [{"a": "likely"}]}}), FORM),
        (0, replied(choice()), FORM),
        (2, replied({"index": 0, "text": "red"}), FORM + ' (\'{"choices":[{"index":0'),  # no token ids
        *((2, replied(choice(token_ids=ids)), FORM) for ids in (["a"], [-1], [10**12], [1.5], {"1": 2}, [3] * 10_000)),
        (2, replied("red"), FORM),
        (2, replied(), FORM),
        (2, JSONResponse([1]), FORM),
        (2, Response(status_code=204), FORM),
        (2, Response('{"choices": [' + " " * 2000), FORM),  # longer than is read of it
        (2, replied(choice(finish_reason="abort")), "broke off its answer"),
        (2, replied(choice(finish_reason="length")), "cut the answer after 1 of 300 tokens"),
        (3, streamed({"choices": [choice(finish_reason="length")]}), "cut the answer after 1 of 300 tokens"),
        (3, streamed({"choices": [choice()]}), "broke off its answer"),
        (3, streamed({"choices": [choice(finish_reason="abort")]}), "broke off its answer"),
        (3, streamed({"error": {"message": "out of blocks"}}), "failed: out of blocks"),
        (3, streamed({"choices": [choice()]}, "{no"), FORM),
        *((3, streamed({"choices": [choice(**{name: None})]}), FORM) for name in ("text", "token_ids")),
        (3, streamed({"choices": None}), FORM),
        (3, streamed(*[{"choices": [choice(token_ids=[])]}] * 400), FORM),  # of 300 tokens at most
        (3, streamed(*[{"choices": []}] * 400), FORM),
    ],
)
def test_a_malformed_reply_is_reported_as_one_sentence(tiny, capsys, monkeypatch, before, reply, message):
    """before: number of valid replies before this one. Two compare the models; with 3, the answer is streamed."""
    url, engine = tiny
    monkeypatch.setattr("stllm.conversation.remote.MAX_REPLY", 1000 if b"  " in reply.body else 1 << 20)
    monkeypatch.setattr("stllm.conversation.remote.NUM_RETRIES", 0)
    engine.replies = iter([*[None] * min(before, 2), reply])
    path, question = find_examples()[0]
    words = ["chat", "--device", "cpu", "--video", str(path), "--question", question, "--engine", url]
    assert main([*words, *(["--stream"] if before == 3 else [])]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not any(word in lines[0] for word in ("unexpected", "--debug", "NoneType", "Error"))


@pytest.mark.parametrize("reply", [[], {}, [1], None, {"data": []}, {"data": ["lm"]}, {"data": [{"id": 5}]}])
def test_a_malformed_list_of_models_is_reported_as_one_sentence(capsys, reply):
    async def models(request: Request) -> Response:
        return JSONResponse(reply)

    with running(Starlette(routes=[Route("/v1/models", models)])) as url:
        assert main(["chat", "--device", "cpu", "--engine", url]) == 1
    assert f"the engine at {url} {FORM} (" in (err := capsys.readouterr().err) and "unexpected" not in err


def test_credentials_in_the_url_are_sent_and_invalid_keys_are_refused(tiny, capsys, monkeypatch):
    url, engine = tiny
    path, question = find_examples()[0]
    words = ["chat", "--device", "cpu", "--video", str(path), "--question", question]
    assert main([*words, "--engine", url.replace("//", "//me:secret@")]) == 0
    assert engine.keys[-1] == "Basic bWU6c2VjcmV0"
    monkeypatch.setenv("VLLM_API_KEY", "kľúč")
    assert main([*words, "--engine", url]) == 1
    assert "VLLM_API_KEY holds characters that no key has" in capsys.readouterr().err
