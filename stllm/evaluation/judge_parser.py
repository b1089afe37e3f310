"""A judge's reply, read: one score from 0 to 5, and yes or no in the axis qa; anything ambiguous is not read at all.

Understood: a Python dictionary, JSON, either in a fence or between sentences, prose that states exactly one score
("score: 4", "4/5", a bare number), and slips of the quotes as in `{''score': 4.8}`. Nothing is ever evaluated.
"""

import ast
import json
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

from stllm.evaluation.judge_axes import HIGHEST, LOWEST, QA

MAX_NUMBER = 1e9
MAX_LENGTH = 20_000  # characters; a longer reply is no grade
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_BRACES = re.compile(r"\{[^{}]*\}")
_MARKUP = re.compile(r"[*`]+")
_SCALE = re.compile(r"\b(?:from |between )?0(?: ?[-–—] ?| to | and )5\b", re.IGNORECASE)  # "on a scale from 0 to 5"
_OF_FIVE = re.compile(r"(?<![\d.,])(-?\d+(?:\.\d+)?) ?(?:/| out of ) ?5(?![\d%]|[.,]\d)", re.IGNORECASE)
_NUMBER = r"([-+]?\d+(?:\.\d+)?)(?![\w%/+]|[.,]\d| out of )"
_MARKED = re.compile(
    rf"(?:score|rating|grade)d?(?:[^\w\n]{{0,8}}?\b(?:is|of|as|would be))?[^\w\n]{{0,8}}?{_NUMBER}", re.I
)
_ANOTHER = re.compile(r" ?(?:-|–|—|or|to|and) ?\d", re.IGNORECASE)  # "score 3 or 4" is two scores
_BARE = re.compile(rf"\s*{_NUMBER}\.?\s*")
_DECIDED = re.compile(r"pred(?:iction)?[^\w\n]{1,8}(?:is )?[^\w\n]{0,4}(yes|no)\b", re.IGNORECASE)
_FIRST_WORD = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


class Unparsable(ValueError):
    """A reply that states no score, several different ones, or one outside the scale; says which."""


@dataclass(frozen=True)
class Verdict:
    """A score from 0 to 5, and whether the prediction matches (None where that is not asked)."""

    score: float
    pred: str | None = None  # "yes" or "no"


def parse_reply(reply: str, axis: str) -> Verdict:
    """What the reply states. Raises Unparsable."""
    if len(reply) > MAX_LENGTH:
        raise Unparsable(f"a reply of {len(reply)} characters")
    text = _THOUGHTS.sub("", reply)
    found = [fields for group in _BRACES.findall(text) if (fields := _mapping(group)) is not None]
    graded = [fields for fields in found if "score" in fields]
    if graded:
        scores = {_number(fields["score"]) for fields in graded} | _prose_scores(_BRACES.sub(" ", text))
        decisions = {_decision(fields["pred"]) for fields in graded if "pred" in fields}
    else:
        scores, decisions = _prose_scores(text), _prose_decisions(text)
    score = _in_scale(_only(scores, "score"))
    return Verdict(score, _only(decisions, "yes or no") if axis == QA else None)


def _mapping(group: str) -> dict[str, Any] | None:
    """The dictionary that a text is a literal of, in Python or JSON, its keys in lower case; None for any other."""
    for read in (ast.literal_eval, json.loads):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                value = read(group)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return {str(key).strip().lower(): entry for key, entry in value.items()}
    return None


def _number(value: Any) -> float:
    """A number, or a text that is one ("4", "4/5")."""
    if isinstance(value, str):
        match = _BARE.fullmatch(_OF_FIVE.sub(r"\1", value))
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unparsable("its score is no number")
    return float(value) if abs(value) <= MAX_NUMBER else math.inf  # NaN, too; none of them is in the scale


def _decision(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    word = str(value).strip().strip(".!").lower()
    if word not in ("yes", "no"):
        raise Unparsable("its pred is neither yes nor no")
    return word


def _prose_scores(text: str) -> set[float]:
    """All scores that are marked as such, or the number that is the whole reply."""
    text = _SCALE.sub(" ", " ".join(_MARKUP.sub("", text).split()))
    of_five = {float(number) for number in _OF_FIVE.findall(text)}
    text = _OF_FIVE.sub(r"\1", text)
    bare = _BARE.fullmatch(text)
    if bare:
        return {float(bare[1])}
    marked = list(_MARKED.finditer(text))
    if any(_ANOTHER.match(text, match.end()) for match in marked):
        raise Unparsable("it states more than one score")
    return of_five | {float(match[1]) for match in marked}


def _prose_decisions(text: str) -> set[str]:
    marked = {word.lower() for word in _DECIDED.findall(text)}
    first = _FIRST_WORD.match(text)
    return marked or ({first[1].lower()} if first else set())


def _only(found: set[Any], what: str) -> Any:
    if len(found) != 1:
        raise Unparsable(f"it states no {what}" if not found else f"it states more than one {what}")
    return next(iter(found))


def _in_scale(score: float) -> float:
    if not LOWEST <= score <= HIGHEST:
        raise Unparsable(f"its score {score:g} is not from {LOWEST} to {HIGHEST}")
    return score
