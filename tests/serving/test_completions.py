"""Parsing of JSON requests, and error messages for wrong ones."""

import json
from typing import Any

import pytest

from stllm.conversation.decoding import Decoding
from stllm.processors.templates import Turn
from stllm.serving.completions import ChatRequest, parse_request
from stllm.serving.limits import ApiError, Limits
from tests.helpers.serving import user

LIMITS = Limits(text_characters=200, frames=32, new_tokens=100)
USUAL = Decoding(num_beams=5, max_new_tokens=300, repetition_penalty=1.5)
ANSWER = {"role": "assistant", "content": "a ball"}


def parse(*messages: Any, **fields: Any) -> ChatRequest:
    body = {"model": "tiny", "messages": list(messages), **fields}
    return parse_request(json.dumps(body).encode(), model="tiny", usual=USUAL, limits=LIMITS)


def test_parsing_a_conversation() -> None:
    system = {"role": "system", "content": "Be brief."}
    asked = parse(system, user("What moves?", "data:x"), ANSWER, user("Where?"), stream=True, num_frames=8)
    assert asked.turns == (Turn("What moves?", "a ball"), Turn("Where?"))
    assert (asked.system, asked.url, asked.num_frames) == ("Be brief.", "data:x", 8)
    assert asked.stream and not asked.include_usage
    assert asked.decoding == Decoding(num_beams=1, max_new_tokens=100, repetition_penalty=1.5)


def test_without_a_system_message_the_default_is_used() -> None:
    assert parse(user("What?")).system is None
    assert parse({"role": "developer", "content": ""}, user("What?")).system == ""


def test_parsing_optional_fields() -> None:
    asked = parse(user("What?"), max_completion_tokens=7, temperature=0.5, top_p=0.3, stream_options=None)
    assert asked.decoding == Decoding(1, max_new_tokens=7, temperature=0.5, top_p=0.3, repetition_penalty=1.5)
    assert parse(user("?"), stream=True, stream_options={"include_usage": True}).include_usage


def test_texts_of_one_message_are_lines() -> None:
    parts = [{"type": "text", "text": "What"}, {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    asked = parse({"role": "user", "name": "x", "content": [*parts, {"type": "text", "text": "moves?"}]})
    assert asked.turns == (Turn("What\nmoves?"),)
    assert asked.url == "u"


def test_fields_without_effect_are_accepted() -> None:
    parse(user("What?"), user="me", n=1, tools=[], stop=None, response_format={"type": "text"}, seed=None)


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"n": 2}, 400, "n is not supported"),
        ({"tools": [{}]}, 400, "tools is not supported"),
        ({"stop": "x"}, 400, "stop is not supported"),
        ({"seed": 3}, 400, "seed is not supported"),
        ({"temprature": 1}, 400, r"unknown field 'temprature'.*did you mean 'temperature'\?"),
        ({"temperature": 3}, 400, "temperature: .*less than or equal to 2"),
        ({"temperature": "warm"}, 400, "temperature: .*number"),
        ({"max_tokens": 0}, 400, "max_tokens: .*greater than or equal to 1"),
        ({"max_tokens": 101}, 400, "max_tokens is 101, at most 100 are taken"),
        ({"num_frames": 33}, 400, "num_frames is 33, at most 32 are taken"),
        ({"model": "gpt"}, 404, "'gpt' is not served here, but 'tiny' is"),
        ({"messages": []}, 400, "messages: .*at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, r"messages\.0\.role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, r"messages\.0\.content"),
        ({"messages": [ANSWER]}, 400, "by turns, the last one the user's; found assistant"),
        ({"messages": [user("a"), user("b")]}, 400, "by turns.*found user, user"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "by turns"),
        ({"messages": [user("a"), ANSWER]}, 400, "by turns"),
        ({"messages": [user("a"), ANSWER, user("b", "u")]}, 400, "the first user message names; found 1, 0 of them"),
        ({"messages": [{**user("a", "u"), "role": "system"}, user("b")]}, 400, "the first user message names"),
        ({"messages": [user("a" * 201)]}, 400, "have 201 characters, at most 200"),
        ({"messages": [user("\ud800")]}, 400, "the request is not as expected"),
    ],
)
def test_bad_requests_are_refused_with_a_sentence(fields: dict[str, Any], status: int, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        parse(**{"messages": [user("What?")], **fields})
    assert caught.value.status == status
    error = caught.value.body()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "messages": "hello"}',
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny"}',
    ],
)
def test_bodies_that_are_not_requests_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="the request is") as caught:
        parse_request(body, model="tiny", usual=USUAL, limits=LIMITS)
    assert caught.value.status == 400
