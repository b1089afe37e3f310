"""Faulty judge servers: every item gets a score or fails, after a limited number of requests."""

import time
from email.utils import formatdate
from typing import Any

import pytest

from stllm.judge.endpoint import MAX_FAILED_IN_A_ROW
from tests.helpers import judging
from tests.helpers.judge_server import MODEL, Answer, FakeJudge, fails, fair, judge_server, says
from tests.helpers.judging import ledger, questions, results, write

NUM_RETRIES = 3
TIMEOUT = 0.7  # seconds, for what never ends; all else has time


def judge(tmp_path, url: str, *more: str, num_items: int = 3) -> tuple[int, dict[str, Any]]:
    """Run the command for items 0, 1, ..., which are all correct. Return its exit code and the results file."""
    write(tmp_path / "pred.json", [{**record, "pred": "cat"} for record in questions(num_items)])
    code = judging.judge("qa", tmp_path, "--max-retries", str(NUM_RETRIES), *more, url=url)
    return code, results(tmp_path)


def timeout(kind: str) -> list[str]:
    """Return a short --timeout for servers whose reply never ends."""
    return ["--timeout", str(TIMEOUT)] if kind in ("hangs", "drips") else []


def asked(server: FakeJudge, number: int) -> int:
    """Return how often item `number` was asked."""
    return sum(f'"what {number}?"' in text for text in server.user_texts())


ALL = NUM_RETRIES + 1
MISBEHAVIOUR = {
    "429 without Retry-After": (fails(429, "slow down"), "answered 429 (slow down)", ALL),
    "429 with Retry-After": (fails(429, "slow down", {"Retry-After": "0.01"}), "answered 429", ALL),
    "500": (fails(500), "answered 500 (broken)", ALL),
    "503 in HTML": (Answer(b"<html>Gateway</html>", 503, content_type="text/html"), "answered 503", ALL),
    "hangs": (Answer(b"", delay=2.0), "no whole reply within 0.7 s", ALL),
    "drips": (Answer(says("{'pred': 'yes', 'score': 5}").body, drip=0.05), "no whole reply within 0.7 s", ALL),
    "HTML": (Answer(b"<!DOCTYPE html><p>Sign in", content_type="text/html"), "answered HTML", ALL),
    "no body": (Answer(b""), "no JSON", ALL),
    "torn JSON": (Answer(says("{'score': 5}").body[:-30]), "no JSON", ALL),
    "breaks off": (Answer(b"{}", headers={"Content-Length": "99"}), "cannot be reached", ALL),
    "no status line": (Answer(b"", headers={"Content-Length": "nonsense"}), "cannot be reached", ALL),
    "no choice": (Answer(b'{"choices": []}'), "no chat completion", ALL),
    "a list": (Answer(b"[1, 2]"), "no chat completion", ALL),
    "an error with 200": (Answer(b'{"error": {"message": "overloaded"}}'), "no chat completion", ALL),
    "an empty message": (says(" "), "empty message", ALL),
    "no message": (says(None), "empty message", ALL),
    "prose without a score": (says("A fine answer."), "cannot be read: it states no score", 3),
    "two scores": (says("{'pred': 'yes', 'score': 3} or {'pred': 'yes', 'score': 4}"), "more than one score", 3),
    "a score out of the scale": (says("{'pred': 'yes', 'score': 50}"), "not from 0 to 5", 3),
    "a refusal": (says(None, refusal="I will not."), "refused by the judge (I will not.)", 1),
    "a filtered reply": (says("", finish_reason="content_filter"), "refused by the judge", 1),
    "a filtered request": (fails(400, "policy", code="content_filter"), "refused by the server", 1),
    "400": (fails(400, "unknown parameter"), "rejects the request with 400 (unknown parameter)", 1),
}


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_an_item_without_a_score_is_listed_as_failed(tmp_path, kind) -> None:
    answer, why, num_asked = MISBEHAVIOUR[kind]

    def behave(request: dict[str, Any], number: int) -> Answer:
        return answer if "what 1?" in str(request) else fair(request)

    with judge_server(behave) as server:
        code, found = judge(tmp_path, server.url, *timeout(kind))
    assert code == 0
    assert found["counts"] == {"total": 3, "scored": 2, "failed": 1, "unanswered": 0}
    assert list(found["failed_items"]) == ["1_0"]
    assert why in found["failed_items"]["1_0"]
    assert (found["mean"], found["accuracy"]) == (5.0, 100.0)
    assert [asked(server, number) for number in range(3)] == [1, num_asked, 1]


@pytest.mark.parametrize("kind", ["429 with Retry-After", "503 in HTML", "hangs", "torn JSON", "two scores"])
def test_temporary_failures_are_retried_until_scored(tmp_path, kind) -> None:
    def behave(request: dict[str, Any], number: int) -> Answer:
        return MISBEHAVIOUR[kind][0] if number <= 2 else fair(request)

    with judge_server(behave) as server:
        code, found = judge(tmp_path, server.url, *timeout(kind), num_items=1)
    assert (code, found["counts"]["scored"]) == (0, 1)
    [entry] = ledger(tmp_path)
    assert (entry["attempts"], entry["parsed"], entry["error"]) == (3, {"score": 5.0, "pred": "yes"}, None)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (fails(401, "bad key"), "answered 401 (bad key): it does not accept the key"),
        (fails(403, "no"), "answered 403"),
        (fails(404, "no such model"), "answered 404 (no such model): it knows no such path or model"),
        (fails(429, "quota", code="insufficient_quota"), "the account has nothing left"),
        (fails(429, "later", {"Retry-After": "3600"}), "answered 429 (later) and asks for a pause of 3600 s"),
        (fails(503, headers={"Retry-After": formatdate(2**34, usegmt=True)}), "asks for a pause until "),
    ],
)
def test_permanent_failures_stop_the_run_at_once(tmp_path, capsys, answer, why) -> None:
    with judge_server(lambda request, number: answer) as server:
        code, found = judge(tmp_path, server.url, "--concurrency", "2", num_items=30)
    assert code == 1
    assert why in capsys.readouterr().err
    assert found["counts"] == {"total": 30, "scored": 0, "failed": 30, "unanswered": 0}
    assert (len(found["failed_items"]), found["mean"]) == (30, None)
    assert len(server.requests) <= 2


def test_the_run_stops_after_some_items_if_the_server_is_gone(tmp_path, capsys) -> None:
    with judge_server() as server:
        pass
    code, found = judge(tmp_path, server.url, "--concurrency", "4", num_items=30)
    error = capsys.readouterr().err
    assert code == 1
    assert f"error: {MAX_FAILED_IN_A_ROW} items in a row failed" in error
    assert "cannot be reached" in error
    assert found["counts"]["failed"] == len(found["failed_items"]) == 30
    num_asked = 30 - list(found["failed_items"].values()).count("not asked yet")
    assert MAX_FAILED_IN_A_ROW <= num_asked < MAX_FAILED_IN_A_ROW + 4  # what the others had begun


def test_requests_to_a_broken_server_are_limited_and_finished_items_kept(tmp_path) -> None:
    def behave(request: dict[str, Any], number: int) -> Answer:
        return fair(request) if number <= 5 else fails(500)

    with judge_server(behave) as server:
        code, found = judge(tmp_path, server.url, "--concurrency", "1", num_items=40)
        assert (code, found["counts"]["scored"]) == (1, 5)
        assert len(server.requests) == 5 + MAX_FAILED_IN_A_ROW * ALL
        server.behave = fair
        code, found = judge(tmp_path, server.url, num_items=40)
    assert (code, found["counts"]["scored"]) == (0, 40)
    assert asked(server, 0) == 1


def test_a_reply_with_another_content_type_is_read(tmp_path) -> None:
    def behave(request: dict[str, Any], number: int) -> Answer:
        return Answer(fair(request).body, content_type="text/plain")

    with judge_server(behave) as server:
        code, found = judge(tmp_path, server.url)
    assert (code, found["judge"], found["counts"]["scored"]) == (0, MODEL, 3)


def test_the_requested_model_name_is_used_if_the_server_gives_none(tmp_path) -> None:
    verdict = [{"type": "text", "text": "{'pred': 'no',"}, {"type": "text", "text": " 'score': 2}"}]
    with judge_server(lambda request, number: says(verdict, model=None)) as server:
        code, found = judge(tmp_path, server.url)
    assert (code, found["judge"], found["mean"]) == (0, "m", 2.0)


def test_replies_of_another_model_under_the_same_name_are_refused(tmp_path, capsys) -> None:
    def behave(request: dict[str, Any], number: int) -> Answer:
        return says("{'pred': 'yes', 'score': 5}", model="old" if number <= 2 else "new")

    with judge_server(behave) as server:
        code, _ = judge(tmp_path, server.url, "--concurrency", "1", num_items=4)
    assert code == 1
    assert "old made the scores so far, and the server now replies as new" in capsys.readouterr().err
    assert [line["model"] for line in ledger(tmp_path)] == ["old", "old"]


def test_the_pause_requested_by_the_server_is_kept(tmp_path, server) -> None:
    times: list[float] = []

    def behave(request: dict[str, Any], number: int) -> Answer:
        times.append(time.monotonic())
        return fails(429, headers={"Retry-After": "0.3"}) if number == 1 else fair(request)

    server.behave = behave
    assert judge(tmp_path, server.url, num_items=1)[0] == 0
    assert times[1] - times[0] >= 0.3


def test_the_request_has_the_configured_settings(tmp_path, server) -> None:
    assert judge(tmp_path, server.url, "--temperature", "0.5", "--max-tokens", "9", num_items=1)[0] == 0
    [request] = server.requests
    assert [message["role"] for message in request.pop("messages")] == ["system", "user"]
    assert request == {"model": "m", "temperature": 0.5, "max_tokens": 9}


def test_an_unpaired_surrogate_in_a_reply_is_kept(tmp_path, server) -> None:
    """A judge that is cut off inside an emoji sends one. It is possible in JSON, but not in UTF-8."""

    def behave(request: dict[str, Any], number: int) -> Answer:
        if "what 1?" in str(request):
            return says(None, refusal="No \ud83d")
        return says("{'pred': 'yes', 'score': 5} \ud83d", model="judge\ud83d")

    server.behave = behave
    code, found = judge(tmp_path, server.url)
    assert (code, found["counts"]["scored"], found["judge"]) == (0, 2, "judge\ud83d")
    assert found["failed_items"] == {"1_0": "refused by the judge (No \ud83d)"}
    assert {line["reply"] for line in ledger(tmp_path)} == {None, "{'pred': 'yes', 'score': 5} \ud83d"}
