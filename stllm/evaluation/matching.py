"""Is a multiple-choice prediction right? MVBench's own matching, and a strict one that an empty answer cannot pass.

Source of the official rule: the benchmark's script (arXiv 2311.17005); cases in tests/golden/sampling.json.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

# A letter that stands for an option: in a bracket, before a mark, or all there is.
_LETTER = re.compile(r"\(*\s*([A-Za-z])\s*(?:[).:]|$)")
_LETTER_AND_TEXT = re.compile(r"\(*\s*([A-Za-z])\s+(.*)", re.DOTALL)


def official_match(prediction: str, gold: str) -> bool:
    """The official rule: the first words, in lower case; the prediction's without dots lies in the gold's, or the
    gold's in the prediction's. gold: as `gold_option` gives it. An empty prediction lies in every gold."""
    said, right = (text.lower().split(" ")[0] for text in (prediction, gold))
    return said.replace(".", "") in right or right in said


def strict_match(prediction: str, candidates: Sequence[str], answer: str) -> bool:
    """Whether the option that is named, by its letter or its whole text, is the answer."""
    number = chosen_option(prediction, candidates)
    return number is not None and candidates[number] == answer


def chosen_option(prediction: str, candidates: Sequence[str]) -> int | None:
    """The number of the option that a prediction names, None when it names none.

    It names one by a letter that begins it: "(B) ...", "B. ...", "b", or "B" followed by that option's text; or by an
    option's text and nothing else. Case, outer spaces and a full stop at the end make no difference.
    """
    if letter := _LETTER.match(prediction.strip()):
        return _number(letter[1], candidates)
    texts = [_plain(candidate) for candidate in candidates]
    if both := _LETTER_AND_TEXT.match(prediction.strip()):
        number = _number(both[1], candidates)
        if number is not None and _plain(both[2]) == texts[number]:
            return number
    for said in (_plain(prediction), _plain(prediction.strip().removeprefix("("))):  # the prompt ends in a bracket
        if said in texts:
            return texts.index(said)
    return None


def gold_option(candidates: Sequence[str], answer: str) -> str:
    """The answer as the official files have it: "(B) to the left". Raises ValueError when it is no candidate."""
    # The official script takes the last one where an option stands there twice.
    number = max(number for number, candidate in enumerate(candidates) if candidate == answer)
    return f"({ascii_uppercase[number]}) {answer}"


def _number(letter: str, candidates: Sequence[str]) -> int | None:
    number = ascii_uppercase.index(letter.upper())
    return number if number < len(candidates) else None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()
