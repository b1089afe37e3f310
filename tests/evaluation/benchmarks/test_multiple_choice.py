"""Right or wrong: the official rule by its golden cases, the strict one beside it, and where the two part."""

import json
from pathlib import Path
from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stllm.evaluation.benchmarks.multiple_choice import chosen_option, gold_option, official_match, strict_match

CASES = json.loads((Path(__file__).parents[2] / "golden" / "sampling.json").read_text())["mvbench_match"]
OPTIONS = ["to the left", "To the right.", "upwards"]
WORDS = st.text(alphabet="abcdefghij ", min_size=3).map(str.strip).filter(lambda text: len(text) > 2)
CANDIDATES = st.lists(WORDS, min_size=2, max_size=6, unique=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["pred"] or "empty")
def test_the_official_rule_has_the_published_verdicts(case) -> None:
    assert official_match(case["pred"], case["gt"]) == case["correct"]


@pytest.mark.parametrize("prediction", ["", "(", "(.", ")", "...", ".)"])
def test_what_says_nothing_is_officially_right_everywhere_and_strictly_wrong(prediction) -> None:
    assert all(official_match(prediction, gold_option(OPTIONS, option)) for option in OPTIONS)
    assert not any(strict_match(prediction, OPTIONS, option) for option in OPTIONS)


@pytest.mark.parametrize(
    ("prediction", "number"),
    [
        ("(B) To the right.", 1),
        ("(B", 1),
        ("(B)", 1),
        ("(b).", 1),
        ("B", 1),
        ("B. to the right", 1),
        ("b: upwards", 1),
        ("((B) to the right", 1),  # the prompt's bracket, and the model's own
        ("(B to the right", 1),
        ("C upwards.", 2),
        ("(to the left", 0),
        ("TO THE LEFT.", 0),
        (" upwards ", 2),
        ("(upwards", 2),
        ("", None),
        ("(", None),
        ("(D) downwards", None),  # there is no such option
        ("D", None),
        ("(AB) x", None),
        ("A person goes up", None),  # an article
        ("C to the left", None),  # letter and text disagree
        ("the answer is (A)", None),
        ("left", None),
        ("to the left or upwards", None),
        ("I think A", None),
        ("(1)", None),
        ("А", None),  # a Cyrillic letter
    ],
)
def test_the_strict_rule_wants_a_letter_or_a_whole_text(prediction, number) -> None:
    assert chosen_option(prediction, OPTIONS) == number
    assert [strict_match(prediction, OPTIONS, option) for option in OPTIONS] == [
        place == number for place in range(len(OPTIONS))
    ]


def test_an_option_in_brackets_is_found_by_its_text() -> None:
    assert chosen_option("(none)", ["(none)", "some"]) == 0


def test_of_options_that_stand_there_twice_either_is_right() -> None:
    twice = ["left", "right", "left"]
    assert gold_option(twice, "left") == "(C) left"  # the official script takes the last one
    assert strict_match("(A)", twice, "left") and strict_match("(C)", twice, "left")
    assert not strict_match("(B)", twice, "left")


def test_an_answer_that_is_no_candidate_has_no_letter() -> None:
    with pytest.raises(ValueError, match="max"):
        gold_option(["left", "right"], "up")


@given(candidates=CANDIDATES, data=st.data())
def test_the_gold_option_as_it_stands_is_right_by_both_rules_and_another_strictly_wrong(candidates, data) -> None:
    answer, other = data.draw(st.permutations(candidates))[:2]
    gold, wrong = gold_option(candidates, answer), gold_option(candidates, other)
    assert official_match(gold, gold) and strict_match(gold, candidates, answer)
    assert not official_match(wrong, gold) and not strict_match(wrong, candidates, answer)


@given(candidates=CANDIDATES, number=st.integers(0, 25))
def test_a_letter_alone_names_the_option_of_that_place(candidates, number) -> None:
    expected = number if number < len(candidates) else None
    for form in ("({})", "({}", "{}", "{}.", "{})"):
        assert chosen_option(form.format(ascii_uppercase[number]), candidates) == expected


@given(candidates=CANDIDATES, prediction=st.text(max_size=20))
def test_no_prediction_is_strictly_right_for_two_options(candidates, prediction) -> None:
    assert sum(strict_match(prediction, candidates, option) for option in candidates) <= 1


@given(prediction=st.text(max_size=20), gold=st.sampled_from(["(a) x", "(B) y"]))
def test_the_official_rule_never_looks_at_case(prediction, gold) -> None:
    assert official_match(prediction, gold) == official_match(prediction.lower(), gold.upper())
