"""How a choice is worded: MVBench's sentence before it, the question with its lettered options, what is asked for.

The benchmark and training data that prepare for it say the same. Source: the published evaluation of arXiv 2404.00308.
"""

from collections.abc import Sequence
from string import ascii_uppercase

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
REQUEST = "Only give the best option."
ANSWER_BEGINS = "Best option:("


def question_block(question: str, candidates: Sequence[str]) -> str:
    """The question and its lettered options, without a newline at the end."""
    return f"Question: {question}\n{lettered(candidates)}"


def lettered(candidates: Sequence[str]) -> str:
    """The options, a line each, after a line that says so. Raises ValueError for more options than letters."""
    letters = ascii_uppercase[: len(candidates)]
    lines = [f"({letter}) {candidate}" for letter, candidate in zip(letters, candidates, strict=True)]
    return "\n".join(["Options:", *lines])
