"""Parsing of judges' replies: clear ones, ambiguous ones, and hostile ones."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stllm.evaluation.axes import AXES
from stllm.judge.parser import CutOff, Unparsable, Verdict, parse_reply

SCORES = st.integers(0, 50).map(lambda tenths: tenths / 10)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("", "no score"),
        ("I'm sorry, but I can't help with that.", "no score"),
        ("There are 3 dogs.", "no score"),
        ("{'grade': 'good'}", "no score"),
        ("Score: 8/10", "no score"),
        ("score: 80%", "no score"),
        ("score: 4e0", "no score"),
        ("score: 1+2", "no score"),
        ("{'score': True}", "no number"),
        ("{'score': None}", "no number"),
        ("{'score': 'good'}", "no number"),
        ("{'score': 3} {'score': 4}", "more than one score"),
        ("Score: 3. No, score: 4.", "more than one score"),
        ("score: 3 or 4", "more than one score"),
        ("score: 3-4", "more than one score"),
        ("Score: 2\n{'score': 4}", "more than one score"),
        ("score: -1", "not from 0 to 5"),
        ("{'score': 6}", "not from 0 to 5"),
        ("{'score': 5.01}", "not from 0 to 5"),
        ('{"score": NaN}', "not from 0 to 5"),
        ("{'score': 1e999}", "not from 0 to 5"),
        (f"{{'score': {'9' * 400}}}", "not from 0 to 5"),
        ("9" * 30_000, "30000 characters"),
        ("{'score': __import__('os').getpid()}", "its score is no number"),
    ],
)
def test_other_replies_are_unparsable(reply, why) -> None:
    with pytest.raises(Unparsable, match=why):
        parse_reply(reply, "detail")


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("{'score': 4}", "no yes or no"),
        ("{'pred': 'maybe', 'score': 4}", "neither yes nor no"),
        ("{'pred': 'yes', 'score': 4} {'pred': 'no', 'score': 4}", "more than one yes or no"),
        ("4", "no yes or no"),
    ],
)
def test_without_a_decision_the_axis_qa_has_no_verdict(reply, why) -> None:
    with pytest.raises(Unparsable, match=why):
        parse_reply(reply, "qa")


@given(score=SCORES, pred=st.sampled_from(["yes", "no"]), before=st.sampled_from(["", "Sure!\n", "```json\n"]))
def test_all_forms_of_a_verdict_are_parsed(score, pred, before) -> None:
    fields = {"pred": pred, "score": score}
    for text in (
        str(fields),
        json.dumps(fields),
        str(fields).replace("'score'", "''score'"),
        f"pred: {pred}, score: {score}",
    ):
        assert parse_reply(f"{before}{text}", "qa") == Verdict(score, pred)


@given(one=SCORES, two=SCORES)
def test_two_different_scores_are_unparsable(one, two) -> None:
    replies = (f"{{'score': {one}}} {{'score': {two}}}", f"score: {one}\nscore: {two}")
    for reply in replies:
        if one == two:
            assert parse_reply(reply, "detail").score == one
        else:
            with pytest.raises(Unparsable):
                parse_reply(reply, "detail")


@given(
    reply=st.text() | st.text(alphabet="{}'\"[]():,. score0123456789-+/epryn\n", max_size=200),
    axis=st.sampled_from(AXES),
)
def test_any_reply_gives_a_score_in_range_or_is_unparsable(reply, axis) -> None:
    try:
        verdict = parse_reply(reply, axis)
    except Unparsable:
        return
    assert 0 <= verdict.score <= 5
    assert (verdict.pred in ("yes", "no")) == (axis == "qa")


CASES = [json.loads(line) for line in Path(__file__).with_name("replies.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=[f"{case['axis']}: {case['reply'][:40]!r}" for case in CASES])
def test_replies_are_parsed_as_annotated(case) -> None:
    """Each case is a judge's reply with a verdict annotated by a person; null if there is none."""
    if case["read"] is None:
        with pytest.raises(Unparsable):
            parse_reply(case["reply"], case["axis"], cut=case.get("cut", False))
    else:
        pred, score = case["read"]
        assert parse_reply(case["reply"], case["axis"], cut=case.get("cut", False)) == Verdict(score, pred)


@pytest.mark.parametrize(
    "reply", ["<think>It may be 4", "<|channel|>analysis<|message|>4", "[THINK]4", "analysisWe see 4"]
)
def test_unfinished_reasoning_is_reported(reply) -> None:
    with pytest.raises(CutOff, match="raise --max-tokens"):
        parse_reply(reply, "detail")


def test_reasoning_does_not_count_towards_the_length_limit() -> None:
    assert parse_reply(f"<think>{'hm ' * 50_000}</think>{{'score': 3}}", "detail") == Verdict(3)


PIECES = ["{'", "'{'", "|", "*", "_", "|\n", "---|\n", "a|b\n", "I rate a ", "final ", "<think ", "{score:", "#", " "]
PIECES += ["{", "(", "score "]
HOSTILE = [piece * (19_000 // len(piece)) for piece in PIECES] + ["{" + "[" * 9_000 + "}", "score" + " " * 15_000]


@pytest.mark.parametrize("reply", HOSTILE, ids=lambda reply: repr(reply[:12]))
def test_hostile_replies_are_parsed_quickly(reply) -> None:
    start = time.process_time()
    with pytest.raises(Unparsable):
        parse_reply(reply, "qa")
    assert time.process_time() - start < 5  # quadratic patterns took 20 to 60 s
