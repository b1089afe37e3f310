"""`stllm judge` on the command line: scores, averages, exports, instructions, keys and wrong usage."""

import json

import pytest

from stllm.cli import main
from stllm.evaluation.axes import VCGBENCH_AXES
from tests.helpers.judge_server import MODEL, fails, fair, judge_server, says
from tests.helpers.judging import judge, ledger, questions, results, vcgbench_lines, write


def test_videoqa_has_an_accuracy_and_a_mean(tmp_path, server, capsys) -> None:
    write(tmp_path / "pred.json", questions())
    assert judge("qa", tmp_path, url=server.url) == 0
    found = results(tmp_path)
    assert (found["axis"], found["judge"], found["prompt_version"]) == ("qa", MODEL, "stllm-1")
    assert found["accuracy"] == pytest.approx(100 * 4 / 6)
    assert found["mean"] == found["mean_truncated"] == pytest.approx((4 * 5 + 2 * 1) / 6)
    assert found["counts"] == {"total": 6, "scored": 6, "failed": 0, "unanswered": 0}
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["qa", "3.67", "3.67", "66.67", "6", "0", "0"]
    line = next(line for line in ledger(tmp_path) if line["key"] == "1_0")
    assert line == {
        "key": "1_0",
        "name": "1_0",
        "axis": "qa",
        "question": "what 1?",
        "answer": "cat",
        "prediction": "cat",
        "model": MODEL,
        "reply": "{'pred': 'yes', 'score': 5}",
        "parsed": {"score": 5.0, "pred": "yes"},
        "prompt_digest": found["prompt_digest"],
        "attempts": 1,
        "error": None,
    }


def test_fractions_count_in_the_mean_and_not_in_the_truncated_one(tmp_path) -> None:
    write(tmp_path / "pred.json", questions(4))
    scores = iter(("4.8", "0.9", "3", "2.5"))
    with judge_server(lambda request, number: says(f"{{'pred': 'no', 'score': {next(scores)}}}")) as server:
        assert judge("qa", tmp_path, "--concurrency", "1", url=server.url) == 0
    found = results(tmp_path)
    assert (found["mean"], found["mean_truncated"]) == (pytest.approx(11.2 / 4), pytest.approx((4 + 0 + 3 + 2) / 4))


def test_missing_items_are_counted_and_widen_the_bounds(tmp_path, server, capsys) -> None:
    write(tmp_path / "pred.json", vcgbench_lines())
    server.behave = lambda request, number: fails(400) if '"r?"' in str(request) else fair(request)
    assert judge("detail", tmp_path, url=server.url) == 0
    found = results(tmp_path, "detail")
    assert found["counts"] == {"total": 3, "scored": 1, "failed": 1, "unanswered": 1}
    assert (found["mean"], found["accuracy"]) == (5.0, None)
    assert found["bounds"] == {"mean": [pytest.approx(5 / 3), 5.0], "accuracy": None}
    assert found["unanswered_items"] == {"generic-2": "no video"}
    assert list(found["failed_items"]) == ["generic-1"]
    output = capsys.readouterr().out
    assert "over all 3 items, whatever the missing ones are worth: mean 1.67 to 5.00" in output
    assert "unanswered: generic-2: no video" in output


def test_vcgbench_average_comes_with_the_fifth_axis(tmp_path, server, capsys) -> None:
    write(tmp_path / "pred.json", vcgbench_lines())
    for axis in VCGBENCH_AXES:
        assert "VcgBench average" not in capsys.readouterr().out
        assert judge(axis, tmp_path, url=server.url) == 0
    means = {"correctness": 3.0, "detail": 3.0, "context": 3.0, "temporal": 0.0, "consistency": 5.0}
    average = json.loads((tmp_path / "out" / "vcgbench_average.json").read_text())
    assert average["axes"] == means
    assert average["mean"] == average["mean_truncated"] == pytest.approx(14 / 5)
    assert "VcgBench average 2.80 (truncated 2.80)" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["judge", "instructions"])
def test_scores_of_different_judges_or_instructions_are_not_averaged(tmp_path, server, capsys, change) -> None:
    write(tmp_path / "pred.json", vcgbench_lines())
    options: list[str] = []
    for axis in VCGBENCH_AXES:
        if axis == "consistency" and change == "judge":
            server.behave = lambda request, number: says("{'score': 4}", model="another")
        elif axis == "consistency":
            text = "{question1} {question2} {answer} {pred1} {pred2}"
            options = ["--prompts", str(tmp_path / "own.json")]
            (tmp_path / "own.json").write_text(json.dumps({"version": "own", axis: {"user": text}}))
            server.behave = lambda request, number: says("{'score': 4}")
        assert judge(axis, tmp_path, *options, url=server.url) == 0
    assert f"the axes have another {change} each" in capsys.readouterr().err
    assert not (tmp_path / "out" / "vcgbench_average.json").exists()


def test_official_item_files(tmp_path, server) -> None:
    write(tmp_path / "pred.json", vcgbench_lines())
    assert judge("correctness", tmp_path, "--export-items", str(tmp_path / "items"), url=server.url) == 0
    assert judge("consistency", tmp_path, "--export-items", str(tmp_path / "items"), url=server.url) == 0
    names = sorted(path.name for path in (tmp_path / "items" / "correctness").iterdir())
    assert names == ["v_0.json", "v_1.json"]  # of the same video; the unanswered one has none
    assert json.loads((tmp_path / "items" / "correctness" / "v_1.json").read_text()) == [
        {"score": 1.0},
        {"q": "r?", "a": "a cat", "pred": "a dog"},
    ]
    assert json.loads((tmp_path / "items" / "consistency" / "v_0.json").read_text()) == [
        {"score": 5.0},
        {"q1": "q?", "q2": "r?", "a": "a cat", "pred1": "a cat", "pred2": "a cat"},
    ]


def test_custom_instructions_are_sent_and_recorded(tmp_path, server) -> None:
    write(tmp_path / "pred.json", questions(1))
    own = tmp_path / "own.yaml"
    own.write_text("version: official\nqa: {user: 'Q: {question} A: {answer} P: {pred}'}")
    server.behave = lambda request, number: says("{'pred': 'no', 'score': 2}")
    assert judge("qa", tmp_path, "--prompts", str(own), url=server.url) == 0
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Q: what 0? A: cat P: dog"}]
    assert results(tmp_path)["prompt_version"] == "official"


def test_a_key_is_sent_only_to_its_server(tmp_path, server, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-openai")
    monkeypatch.setenv("MY_KEY", "my-secret")
    write(tmp_path / "pred.json", questions(1))
    assert judge("qa", tmp_path, url=server.url) == 0
    assert (
        judge("qa", tmp_path, "--api-key-env", "MY_KEY", "--self-check", "1", url=server.url) == 1
    )  # one answer alone
    write(tmp_path / "pred.json", questions(2))
    assert judge("qa", tmp_path, "--api-key-env", "MY_KEY", url=server.url) == 0
    assert server.keys == ["Bearer none", "Bearer my-secret"]
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"secret" not in written


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--api-key-env", "NOT_SET", "--base-url", "http://localhost/v1"], "variable NOT_SET is not set"),
        ([], "variable OPENAI_API_KEY is not set"),
        (["--base-url", "localhost:8000"], "found 'localhost:8000', expected a URL"),
        (["--base-url", "http://[x/v1"], "found 'http://[x/v1', expected a URL"),
        (["--base-url", "http://localhost:99999/v1"], "found 'http://localhost:99999/v1', expected a URL"),
        (["--api-key-env", "ODD_KEY"], "variable ODD_KEY holds characters that no key has"),
    ],
)
def test_a_missing_key_or_url_is_reported_before_anything_is_written(
    tmp_path, capsys, monkeypatch, options, words
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("ODD_KEY", "kľúč")
    write(tmp_path / "pred.json", questions(1))
    known = ["--pred-path", str(tmp_path / "pred.json"), "--model", "m"]
    assert judge("qa", tmp_path, *known, *options) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "name the predictions with --pred-path"),
        (["--pred-path", "p"], "name the judge with --model"),
        (["--compare", "x", "--pred-path", "p"], "--compare reads two ledgers alone"),
        (["--offline", "--compare", "x"], "do not go together"),
        (["--compare", "x", "--export-items", "y"], "does not go with --compare"),
        (["--pred-path", "p", "--model", "local:x", "--base-url", "http://x"], "does not go with a local: model"),
        (["--pred-path", "p", "--model", "m", "--device", "cpu"], "are for a local: model"),
        (["--pred-path", "p", "--model", "m", "--options", "a=b"], "it has no configuration"),
        (["--pred-path", "p", "--model", "m", "--timeout", "0"], "--timeout"),
        (["--pred-path", "p", "--model", "m", "--self-check", "0"], "--self-check"),
    ],
)
def test_wrong_usage(options, words, capsys) -> None:
    assert main(["judge", "qa", *options]) == 2
    assert words in capsys.readouterr().err
