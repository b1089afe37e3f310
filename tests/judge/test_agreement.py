"""Two judges compared: agreement, kappa and drift against numbers worked out by hand."""

import json
import re

import numpy as np
import pytest

from stllm.judge.agreement import kappa
from tests.helpers.judge_server import judge_server, says, texts_of
from tests.helpers.judging import judge, questions, write

QUADRATIC = (np.arange(6)[:, None] - np.arange(6)) ** 2


def test_kappa_of_two_decisions() -> None:
    """Cohen's example: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no; 70 % agree, 50 % by chance: 0.4."""
    first = np.repeat([1, 1, 0, 0], [20, 5, 10, 15])
    second = np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
    assert kappa(first, second, 1 - np.eye(2)) == pytest.approx(0.4)


def test_kappa_of_scores_weighs_by_the_squared_distance() -> None:
    """Found: (0 + 1 + 0 + 4) / 4. By chance, of all 16 pairs of {0, 1, 4, 5} and {0, 2, 4, 3}: 98 / 16."""
    first, second = np.array([0, 1, 4, 5]), np.array([0, 2, 4, 3])
    squares = [(one - two) ** 2 for one in first for two in second]
    assert kappa(first, second, QUADRATIC) == pytest.approx(1 - (5 / 4) / (sum(squares) / 16))
    assert kappa(first, first, QUADRATIC) == 1
    assert kappa(np.array([0, 5]), np.array([5, 0]), QUADRATIC) == pytest.approx(-1)


def test_kappa_without_room_for_disagreement_is_undefined() -> None:
    assert kappa(np.array([4, 4]), np.array([4, 4]), QUADRATIC) is None


@pytest.fixture
def two_ledgers(tmp_path):
    """Four items judged twice: 5, 1, 4, 0 with yes, no, yes, no, then one point less with the third decision turned."""
    write(tmp_path / "pred.json", questions(4))
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "pred.json", questions(4))
    verdicts = {tmp_path: ("5 yes", "1 no", "4 yes", "1 no"), tmp_path / "other": ("4 yes", "0 no", "3 no", "0 no")}
    for folder, grades in verdicts.items():
        by_question = dict(zip((f"what {number}?" for number in range(4)), grades, strict=True))

        def behave(request, number, by_question=by_question, name=folder.name):
            score, pred = by_question[texts_of(request)["Question"]].split()
            return says(f"{{'pred': '{pred}', 'score': {score}}}", model=name)

        with judge_server(behave) as server:
            assert judge("qa", folder, url=server.url) == 0
    return tmp_path


def test_a_drift_of_one_point(two_ledgers, capsys) -> None:
    capsys.readouterr()
    assert judge("qa", two_ledgers, "--compare", str(two_ledgers / "other" / "out")) == 0
    found = json.loads((two_ledgers / "out" / "qa.comparison.json").read_text())
    assert found["counts"] == {"common": 4, "only_first": 0, "only_second": 0}
    assert [entry["judge"] for entry in found["judges"]] == [two_ledgers.name, "other"]
    assert (found["means"], found["drift"], found["same_instructions"]) == ([2.75, 1.75], 1.0, True)
    assert (found["equal"], found["within_one"]) == (0.0, 1.0)
    assert (found["accuracies"], found["same_decision"]) == ([50.0, 25.0], 0.75)
    assert found["kappa_decisions"] == pytest.approx((0.75 - 0.5) / 0.5)
    first, second = np.array([5, 1, 4, 1]), np.array([4, 0, 3, 0])
    chance = np.mean([(one - two) ** 2 for one in first for two in second])
    assert found["kappa_scores"] == pytest.approx(1 - 1 / chance)
    output = capsys.readouterr().out
    assert "drift +1.00" in output
    assert "accuracy 50.0 and 25.0; same yes or no 75.0%, kappa 0.50" in output


def test_ledgers_that_cannot_be_compared_are_refused(two_ledgers, capsys) -> None:
    other = two_ledgers / "other" / "out" / "qa.ledger.jsonl"
    text = other.read_text()
    other.write_text(text.replace('"prediction": "cat"', '"prediction": "bird"'))
    assert judge("qa", two_ledgers, "--compare", str(other)) == 1
    # two items have that prediction; the one that was judged first is named
    assert re.search("item [12]_0 has other texts", capsys.readouterr().err)
    other.write_text(text.replace('"axis": "qa"', '"axis": "detail"'))
    assert judge("qa", two_ledgers, "--compare", str(other)) == 1
    assert "is of the axis detail" in capsys.readouterr().err
    other.write_text(text.splitlines()[0] + "\n")
    assert judge("qa", two_ledgers, "--compare", str(other)) == 1
    assert "no scored item in common" in capsys.readouterr().err
    assert judge("qa", two_ledgers, "--compare", str(two_ledgers / "absent")) == 1
    assert "there is no such ledger" in capsys.readouterr().err
