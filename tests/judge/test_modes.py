"""Many kinds of judges with `stllm judge`: each gives verdicts, or an error that says what to do."""

import json
from collections import Counter
from typing import Any

import pytest

from tests.helpers.judge_server import Answer, FakeJudge, judge_by_name, judge_server, says
from tests.helpers.judging import judge, ledger, questions, results, write
from tests.judge.test_parser import CASES


@pytest.fixture
def server():
    """Start a fake judge whose behaviour is selected by the model's name."""
    with judge_server(judge_by_name) as judge:
        yield judge


def most_asked(server: FakeJudge) -> int:
    """Return the largest number of requests for one item."""
    return max(Counter(text[text.index("Question:") :] for text in server.user_texts()).values())


@pytest.mark.parametrize("axis", ["qa", "detail"])
@pytest.mark.parametrize(
    ("model", "num_asked"),
    [
        ("good", 1),
        ("half-think", 1),
        ("thinking-tag", 1),
        ("channels", 1),
        ("mistral", 1),
        ("note", 1),
        ("parts", 1),
        ("router", 1),
        ("new-parameters", 3),
        ("no-system", 2),
        ("no-system-500", 2),
        ("no-system-o1", 2),
        ("no-system-422", 2),
    ],
)
def test_every_kind_of_judge_gives_scores_with_few_requests(tmp_path, server, axis, model, num_asked) -> None:
    write(tmp_path / "pred.json", questions(4))
    assert judge(axis, tmp_path, "--max-tokens", "64", url=server.url, model=model) == 0
    found = results(tmp_path, axis)
    assert found["counts"] == {"total": 4, "scored": 4, "failed": 0, "unanswered": 0}
    assert (found["mean"], found["accuracy"]) == (0.0, 0.0 if axis == "qa" else None)
    assert most_asked(server) <= num_asked


@pytest.mark.parametrize(
    "model", ["cut-think", "cut-without-tag", "cut-tag-alone", "empty-reasoning", "null-reasoning", "parts-reasoning"]
)
def test_unfinished_reasoning_is_never_scored(tmp_path, server, capsys, model) -> None:
    write(tmp_path / "pred.json", questions(4))
    assert judge("qa", tmp_path, url=server.url, model=model) == 1
    found = results(tmp_path)
    assert (found["mean"], found["accuracy"], found["counts"]["failed"]) == (None, None, 4)
    assert all("raise --max-tokens" in reason for reason in found["failed_items"].values())
    assert "raise --max-tokens" in capsys.readouterr().out
    assert most_asked(server) == 1  # it would be cut off again
    (tmp_path / "out" / "qa.results.json").unlink()
    assert judge("qa", tmp_path, "--offline") == 1
    assert results(tmp_path) == found


def test_raising_max_tokens_continues_a_ledger_and_lowering_does_not(tmp_path, server, capsys) -> None:
    def thinks(request: dict[str, Any], number: int) -> Answer:
        if request["max_tokens"] < 512 and "what 2?" in str(request):
            return says("<think>Let me see", finish_reason="length")
        return says("<think>It differs.</think>{'pred': 'no', 'score': 1}")

    server.behave = thinks
    write(tmp_path / "pred.json", questions(4))
    assert judge("qa", tmp_path, "--max-tokens", "128", url=server.url) == 0
    assert list(results(tmp_path)["failed_items"]) == ["2_0"]
    server.requests.clear()
    assert judge("qa", tmp_path, "--max-tokens", "512", url=server.url) == 0
    assert (len(server.requests), results(tmp_path)["counts"]["scored"]) == (1, 4)
    assert judge("qa", tmp_path, "--max-tokens", "128", url=server.url) == 1
    assert "another --max-tokens: it was 512 and is now 128" in capsys.readouterr().err


@pytest.mark.parametrize(("max_retries", "num_scored"), [(0, 0), (1, 1), (2, 2)])
def test_requests_refused_for_their_parameters_count_as_retries(tmp_path, server, max_retries, num_scored) -> None:
    write(tmp_path / "pred.json", questions(2))
    options = ("--max-tokens", "64", "--max-retries", str(max_retries), "--concurrency", "1")
    code = judge("qa", tmp_path, *options, url=server.url, model="new-parameters")
    found = results(tmp_path)
    assert (code, found["counts"]["scored"]) == (int(num_scored == 0), num_scored)
    assert all("raise --max-retries" in reason for reason in found["failed_items"].values())
    assert most_asked(server) <= max_retries + 1


def test_a_refused_parameter_is_omitted_afterwards(tmp_path, server, caplog) -> None:
    write(tmp_path / "pred.json", questions(6))
    assert judge("qa", tmp_path, "--concurrency", "1", url=server.url, model="no-system") == 0
    assert len(server.requests) == 7
    first, second = (request["messages"] for request in server.requests[:2])
    assert second == [{"role": "user", "content": f"{first[0]['content']}\n\n{first[1]['content']}"}]
    assert caplog.text.count("the judge takes no system message") == 1
    assert [request["messages"][0]["role"] for request in server.requests] == ["system"] + ["user"] * 6


def test_new_parameters_replace_the_old_ones(tmp_path, server, caplog) -> None:
    write(tmp_path / "pred.json", questions(2))
    options = ("--max-tokens", "64", "--concurrency", "1")
    assert judge("qa", tmp_path, *options, url=server.url, model="new-parameters") == 0
    assert sorted(server.requests[-1]) == ["max_completion_tokens", "messages", "model"]
    assert server.requests[-1]["max_completion_tokens"] == 64
    assert "the judge refuses --temperature" in caplog.text


def test_routes_of_one_model_count_as_one_judge(tmp_path, server) -> None:
    write(tmp_path / "pred.json", questions(4))
    assert judge("qa", tmp_path, "--concurrency", "1", url=server.url, model="router") == 0
    assert results(tmp_path)["judge"] == "family/judge-70b"
    assert [line["model"] for line in ledger(tmp_path)] == [f"family/judge-70b:{route}" for route in "baba"]


def test_a_requested_route_is_part_of_the_judges_name(tmp_path, server) -> None:
    server.behave = lambda request, number: says("{'pred': 'no', 'score': 1}", model=request["model"])
    write(tmp_path / "pred.json", questions(2))
    assert judge("qa", tmp_path, url=server.url, model="family/judge:8b") == 0
    assert results(tmp_path)["judge"] == "family/judge:8b"


def test_routes_to_different_models_are_refused_with_advice(tmp_path, server, capsys) -> None:
    server.behave = lambda request, number: says("{'pred': 'no', 'score': 1}", model=f"family/{'ab'[number % 2]}")
    write(tmp_path / "pred.json", questions(4))
    assert judge("qa", tmp_path, "--concurrency", "1", url=server.url, model="router") == 1
    error = capsys.readouterr().err
    assert "family/b made the scores so far, and the server now replies as family/a: ask for one exact model" in error
    assert results(tmp_path)["counts"]["scored"] == 1


@pytest.mark.parametrize("axis", ["qa", "correctness"])
def test_replies_in_a_ledger_are_parsed_as_annotated(tmp_path, server, axis) -> None:
    """Run `--offline` on a ledger with all cases; the exported items have the verdicts."""
    cases = {str(number): case for number, case in enumerate(CASES) if case["axis"] == axis}
    write(tmp_path / "pred.json", [{"id": "x", "question": "q?", "answer": "a", "pred": "p"}])
    assert judge("qa", tmp_path, url=server.url, model="good") == 0
    run, line = (json.loads(text) for text in (tmp_path / "out" / "qa.ledger.jsonl").read_text().splitlines())
    run["run"].update(axis=axis, num_items=len(cases))
    common = {**line, "axis": axis, "parsed": None}
    lines = [
        {**common, "key": key, "name": key, "reply": case["reply"], **({"cut": True} if case.get("cut") else {})}
        for key, case in cases.items()
    ]
    path = tmp_path / "out" / f"{axis}.ledger.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in (run, *lines)))
    assert judge(axis, tmp_path, "--offline", "--export-items", str(tmp_path / "items")) == 0
    read = {file.stem: json.loads(file.read_text())[0] for file in (tmp_path / "items" / axis).iterdir()}
    wanted = {
        key: dict(zip(("pred", "score"), case["read"], strict=True)) for key, case in cases.items() if case["read"]
    }
    if axis != "qa":
        wanted = {key: {"score": verdict["score"]} for key, verdict in wanted.items()}
    assert read == wanted
    assert set(results(tmp_path, axis)["failed_items"]) == set(cases) - set(wanted)
