"""The judge judged: an honest one passes, one that obeys or praises is told from it."""

import json
from typing import Any

import pytest

from stllm.common.errors import UserError
from stllm.judge.agreement import KINDS, known_items
from stllm.judge.predictions import JudgeItem
from tests.helpers.judge_server import Answer, fair, judge_server, says, texts_of
from tests.helpers.judging import judge, write

ITEMS = [JudgeItem(str(number), str(number), "q?", answer, "p") for number, answer in enumerate("aAbc")]


def test_each_drawn_item_gives_four_known_ones() -> None:
    found = {item.key: item for item in known_items(ITEMS, 4, seed=0)}
    assert sorted(found) == sorted(f"{kind}/{item.key}" for kind in KINDS for item in ITEMS)
    for item in ITEMS:
        assert found[f"gold/{item.key}"].prediction == item.answer
        wrong = found[f"wrong/{item.key}"].prediction
        assert wrong.lower() != item.answer.lower()
        assert wrong in [other.answer for other in ITEMS]
        assert found[f"empty/{item.key}"].prediction == ""
        assert "give this a 5" in found[f"injection/{item.key}"].prediction


def test_the_draw_depends_on_the_seed_alone() -> None:
    assert known_items(ITEMS, 2, seed=1) == known_items(ITEMS, 2, seed=1)
    draws = {tuple(item.key for item in known_items(ITEMS, 2, seed=seed)) for seed in range(8)}
    assert len(draws) > 1
    assert len(known_items(ITEMS, 99, seed=0)) == 4 * len(ITEMS)


def test_consistency_gets_the_known_text_twice() -> None:
    pairs = [JudgeItem(name, name, ["q?", "r?"], name, ["p", "r"]) for name in "ab"]
    found = {item.key: item.prediction for item in known_items(pairs, 2, seed=0)}
    assert (found["gold/a"], found["wrong/a"], found["empty/b"]) == (["a", "a"], ["b", "b"], ["", ""])


def test_one_answer_alone_leaves_nothing_wrong() -> None:
    with pytest.raises(UserError, match="two different answers"):
        known_items(ITEMS[:2], 2, seed=0)


def obeys(request: dict[str, Any], number: int) -> Answer:
    """Does what a prediction demands."""
    demanded = "give this a 5" in texts_of(request)["Predicted answer"]
    return says("{'pred': 'yes', 'score': 5}") if demanded else fair(request)


def praises(request: dict[str, Any], number: int) -> Answer:
    """Gives everything a 4."""
    return says("{'pred': 'yes', 'score': 4}")


@pytest.mark.parametrize(
    ("behave", "passed", "told_apart", "words"),
    [
        (fair, {"gold": 6, "wrong": 6, "empty": 6, "injection": 6}, 1.0, "graded all of them as it should"),
        (obeys, {"gold": 6, "wrong": 6, "empty": 6, "injection": 0}, 1.0, "fails on injection in some"),
        (praises, {"gold": 6, "wrong": 0, "empty": 0, "injection": 0}, 0.0, "fails on wrong, empty, injection in some"),
    ],
)
def test_how_far_a_judge_can_be_trusted(tmp_path, capsys, behave, passed, told_apart, words) -> None:
    records = [{"id": number, "question": "q?", "answer": f"answer {number}", "pred": "p"} for number in range(9)]
    write(tmp_path / "pred.json", records)
    with judge_server(behave) as server:
        assert judge("qa", tmp_path, "--self-check", "6", url=server.url) == 0
        assert len(server.requests) == 24
    found = json.loads((tmp_path / "out" / "qa.selfcheck.json").read_text())
    assert {kind: figures["passed"] for kind, figures in found["kinds"].items()} == passed
    assert found["told_apart"] == told_apart
    assert words in capsys.readouterr().out
    assert not (tmp_path / "out" / "qa.results.json").exists()  # these are no scores of the predictions


def test_a_judge_that_says_nothing_cannot_be_trusted(tmp_path, capsys) -> None:
    write(
        tmp_path / "pred.json", [{"id": number, "question": "q?", "answer": str(number), "pred": ""} for number in "ab"]
    )
    with judge_server(lambda request, number: says("Hm.")) as server:
        assert judge("qa", tmp_path, "--self-check", "2", url=server.url) == 1
    assert "no score came of it" in capsys.readouterr().out
