"""A judge's ledger: resuming, refusal of other settings, and recomputed scores without a network."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.helpers.judge_server import Answer, FakeJudge, fails, fair, judge_server, says
from tests.helpers.judging import judge, ledger, questions, results, vcgbench_lines, write


def test_a_rerun_asks_only_for_missing_items(tmp_path, server) -> None:
    write(tmp_path / "pred.json", questions())
    server.behave = lambda request, number: says("Hm.") if '"what 2?"' in str(request) else fair(request)
    assert judge("qa", tmp_path, url=server.url) == 0
    assert results(tmp_path)["failed_items"] == {"2_0": "the reply cannot be read: it states no score"}
    assert next(line for line in ledger(tmp_path) if line["key"] == "2_0")["reply"] == "Hm."
    server.behave = fair
    server.requests.clear()
    assert judge("qa", tmp_path, url=server.url) == 0
    assert len(server.requests) == 1
    assert results(tmp_path)["counts"] == {"total": 6, "scored": 6, "failed": 0, "unanswered": 0}
    before = (tmp_path / "out" / "qa.ledger.jsonl").read_bytes()
    assert judge("qa", tmp_path, url=server.url) == 0
    assert (len(server.requests), (tmp_path / "out" / "qa.ledger.jsonl").read_bytes()) == (1, before)


def test_the_item_of_an_incomplete_line_is_asked_again(tmp_path, server) -> None:
    write(tmp_path / "pred.json", questions())
    assert judge("qa", tmp_path, "--concurrency", "1", url=server.url) == 0
    path, whole = tmp_path / "out" / "qa.ledger.jsonl", results(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    assert judge("qa", tmp_path, "--offline") == 0
    assert results(tmp_path)["counts"]["failed"] == 1
    assert judge("qa", tmp_path, url=server.url) == 0
    assert (results(tmp_path), len(server.requests)) == (whole, 7)
    assert len(ledger(tmp_path)) == 6


def test_new_predictions_can_be_added_but_changed_ones_are_refused(tmp_path, server, capsys) -> None:
    lines = vcgbench_lines()
    write(tmp_path / "pred.json", lines)
    assert judge("detail", tmp_path, url=server.url) == 0
    lines[2] = {**lines[2], "error": None, "prediction": "a cat"}
    write(tmp_path / "pred.json", lines)
    assert judge("detail", tmp_path, url=server.url) == 0
    assert results(tmp_path, "detail")["counts"]["scored"] == len(server.requests) == 3
    before = (tmp_path / "out" / "detail.results.json").read_bytes()
    write(tmp_path / "pred.json", [{**lines[0], "prediction": "a bird"}, *lines[1:]])
    assert judge("detail", tmp_path, url=server.url) == 1
    assert "scores of other predictions: item generic-0 has other texts now" in capsys.readouterr().err
    write(tmp_path / "pred.json", lines[1:])
    assert judge("detail", tmp_path, url=server.url) == 1
    assert "item generic-0 is not there any more" in capsys.readouterr().err
    assert ((tmp_path / "out" / "detail.results.json").read_bytes(), len(server.requests)) == (before, 3)


@pytest.mark.parametrize(
    ("options", "model", "words"),
    [
        ([], "n", "another judge (--model): it was 'm' and is now 'n'"),
        (["--temperature", "1"], "m", "another --temperature: it was 0.0 and is now 1.0"),
        (["--max-tokens", "9"], "m", "another --max-tokens: it was None and is now 9"),
        (["--prompts", "own.yaml"], "m", "another digest of the instructions (--prompts)"),
    ],
)
def test_resuming_a_ledger_with_other_settings_is_refused(
    tmp_path, server, capsys, monkeypatch, options, model, words
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("version: own\nqa: {user: '{question} {answer} {pred}'}")
    write(tmp_path / "pred.json", questions(2))
    assert judge("qa", tmp_path, url=server.url) == 0
    assert judge("qa", tmp_path, *options, url=server.url, model=model) == 1
    assert words in capsys.readouterr().err
    assert len(server.requests) == 2


def test_a_ledger_without_scores_is_started_anew(tmp_path, server) -> None:
    write(tmp_path / "pred.json", questions(2))
    server.behave = lambda request, number: fails(400, "no such model")
    assert judge("qa", tmp_path, url=server.url, model="typo") == 1
    server.behave = fair
    assert judge("qa", tmp_path, url=server.url) == 0
    assert [line["error"] for line in ledger(tmp_path)] == [None, None]


def test_two_processes_do_not_write_to_one_ledger(tmp_path, server, capsys) -> None:
    write(tmp_path / "pred.json", questions(2))
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".qa.ledger.jsonl.lock"):
        assert judge("qa", tmp_path, url=server.url) == 1
    assert "another process writes to it" in capsys.readouterr().err
    assert not server.requests


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("number", "old", "new", "why"),
    [
        (2, '"key"', '"kee"', "found an unusable 'key'"),
        (2, '"name": "0_0"', '"name": 3', "found an unusable 'name'"),
        (2, '"cat"', DEEP, "found "),
        (3, '"attempts": 1', f'"attempts": {"9" * 5000}', "found "),
        (3, '"attempts": 1', '"attempts": [1]', "found an unusable 'attempts'"),
        (1, '"num_items": 2', f'"num_items": {"9" * 400}', "found an unusable 'num_items'"),
        (1, '"temperature": 0.0', '"temperature": 1e999', "found an unusable 'temperature'"),
        (1, '{"axis"', '[{"axis"', "found "),
    ],
)
def test_a_damaged_ledger_is_reported_and_not_changed(tmp_path, server, capsys, number, old, new, why) -> None:
    write(tmp_path / "pred.json", questions(2))
    assert judge("qa", tmp_path, "--concurrency", "1", url=server.url) == 0
    path = tmp_path / "out" / "qa.ledger.jsonl"
    lines = path.read_text().splitlines()
    index = number - 1
    assert old in lines[index]
    lines[index] = lines[index].replace(old, new)
    path.write_text("\n".join(lines) + "\n")
    damaged = path.read_bytes()
    for options in ([], ["--offline"], ["--compare", str(path)]):
        assert judge("qa", tmp_path, *options, url=None if options else server.url) == 1
        error = capsys.readouterr().err
        assert f"line {number}: {why}" in error and "not a line of a judge's ledger; restore the file" in error
    assert (path.read_bytes(), len(server.requests)) == (damaged, 2)


def test_ids_with_unpaired_surrogates_stay_distinct(tmp_path, server) -> None:
    """Unpaired surrogates are possible in JSON."""
    ids = ("\ud800", "\udfff", "a")  # of `stllm evaluate`, whose ids are keys as they are
    records = [{**record, "id": id_, "task": ""} for record, id_ in zip(questions(3), ids, strict=True)]
    write(tmp_path / "pred.json", records)
    for _ in range(2):
        assert judge("qa", tmp_path, "--export-items", str(tmp_path / "items"), url=server.url) == 0
    assert len({line["key"] for line in ledger(tmp_path)}) == len(server.requests) == 3
    assert results(tmp_path)["counts"]["scored"] == 3
    assert len(list((tmp_path / "items" / "qa").iterdir())) == 3
    server.behave = lambda request, number: says("Hm.")
    (tmp_path / "out" / "qa.ledger.jsonl").unlink()
    assert judge("qa", tmp_path, url=server.url) == 1
    assert len(results(tmp_path)["failed_items"]) == 3


@pytest.mark.slow
def test_a_judge_run_killed_twice_gives_the_same_results(tmp_path) -> None:
    """After SIGKILL and a rerun, results are equal, and only requests that were in flight are repeated."""

    def slow(request: dict[str, Any], number: int) -> Answer:
        answer = fair(request)
        answer.delay = 0.05
        return answer

    write(tmp_path / "pred.json", questions(60))
    path = tmp_path / "out" / "qa.ledger.jsonl"
    with judge_server(slow) as server:
        for num_lines in (8, 20):
            process = start(tmp_path, server)
            while process.poll() is None and (not path.exists() or len(path.read_bytes().splitlines()) < num_lines):
                time.sleep(0.01)
            assert process.poll() is None  # it is in the middle
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert start(tmp_path, server).wait() == 0
        assert len(server.requests) <= 60 + 2 * 4
        whole = tmp_path / "whole"
        whole.mkdir()
        write(whole / "pred.json", questions(60))
        assert start(whole, server).wait() == 0
    assert (tmp_path / "out" / "qa.results.json").read_bytes() == (whole / "out" / "qa.results.json").read_bytes()


def start(folder: Path, server: FakeJudge) -> subprocess.Popen[bytes]:
    """Start the command in another process, with four items at a time."""
    command = ["judge", "qa", "--pred-path", str(folder / "pred.json"), "--output-dir", str(folder / "out")]
    judge = ["--base-url", server.url, "--model", "m", "--concurrency", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "stllm", *command, *judge], env=environment)


def test_offline_gives_the_same_scores_without_requests(tmp_path) -> None:
    write(tmp_path / "pred.json", vcgbench_lines())
    with judge_server(lambda request, number: fails(400) if '"r?"' in str(request) else fair(request)) as server:
        assert judge("detail", tmp_path, url=server.url) == 0
    path = tmp_path / "out" / "detail.results.json"
    online = path.read_bytes()
    named = ["--pred-path", str(tmp_path / "pred.json")]
    for options in ([], named, [*named, "--model", "m", "--base-url", server.url]):
        path.unlink()
        assert judge("detail", tmp_path, "--offline", *options) == 0
        assert path.read_bytes() == online


def test_offline_parses_the_replies_again(tmp_path) -> None:
    """A newer parser may find scores in replies that an older one could not parse."""
    write(tmp_path / "pred.json", questions(3))
    with judge_server() as server:
        assert judge("qa", tmp_path, url=server.url) == 0
    path = tmp_path / "out" / "qa.ledger.jsonl"
    first, *items = path.read_text().splitlines()
    given_up = [json.dumps({**json.loads(line), "parsed": None, "error": "cannot be read"}) for line in items]
    path.write_text("\n".join([first, *given_up]) + "\n")
    assert judge("qa", tmp_path, "--offline") == 0
    assert results(tmp_path)["counts"]["scored"] == 3


def test_offline_refuses_other_predictions_and_settings(tmp_path, server, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pred.json", questions(3))
    assert judge("qa", tmp_path, "--concurrency", "1", url=server.url) == 0  # the ledger's first is item 1
    write(tmp_path / "pred.json", questions(3, pred="bird"))
    Path("own.yaml").write_text("version: own\nqa: {user: '{question} {answer} {pred}'}")
    for options, words in {
        ("--pred-path", "pred.json"): "item 1_0 has other texts now",
        ("--model", "n"): "another judge (--model)",
        ("--prompts", "own.yaml"): "another digest of the instructions",
    }.items():
        assert judge("qa", tmp_path, "--offline", *options) == 1
        assert words in capsys.readouterr().err


def test_offline_counts_items_that_were_never_asked(tmp_path, capsys) -> None:
    write(tmp_path / "pred.json", questions(6))
    with judge_server(lambda request, number: fair(request) if number < 3 else fails(401)) as server:
        assert judge("qa", tmp_path, "--concurrency", "1", url=server.url) == 1
    assert judge("qa", tmp_path, "--offline") == 0
    assert results(tmp_path)["counts"] == {"total": 6, "scored": 2, "failed": 4, "unanswered": 0}
    assert "failed: 4 that were never asked" in capsys.readouterr().out
    assert judge("qa", tmp_path, "--offline", "--pred-path", str(tmp_path / "pred.json")) == 0
    assert list(results(tmp_path)["failed_items"].values()) == ["not asked yet"] * 4


def test_without_a_ledger_there_is_nothing_to_score(tmp_path, capsys) -> None:
    assert judge("qa", tmp_path, "--offline") == 1
    assert "there is no such ledger; judge the axis first" in capsys.readouterr().err
