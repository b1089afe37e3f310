"""Which lines go with which items: answers hold for the very same item, failed ones are asked again as they are now."""

from dataclasses import replace
from pathlib import Path

import pytest

from stllm.common.errors import UserError
from stllm.conversation.requests import Media
from stllm.evaluation.engine import failed, head
from stllm.evaluation.items import Item
from stllm.evaluation.runs import _check_items

PATH = Path("out") / "mvbench.jsonl"
BOUNDED = Item("a/0", "A", "a.mp4", Media("a.mp4", start=1.0, end=4.5), ("What?",), "yes", ("yes", "no"))


def test_the_same_item_goes_on_wherever_its_file_lies() -> None:
    moved = replace(BOUNDED, media=Media("/elsewhere/a.mp4", start=1.0, end=4.5))
    gone = replace(BOUNDED, media=None, error="a.mp4: there is no such file")
    for item in (BOUNDED, moved, gone):
        _check_items(PATH, {"a/0": head(BOUNDED)}, [item])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"media": Media("a.mp4", start=1.0, end=5.0)}, "clip of a/0 was [1.0, 4.5] and is [1.0, 5.0]"),
        ({"media": Media("a.mp4")}, "clip of a/0 was [1.0, 4.5] and is None"),
        ({"candidates": ("no", "yes")}, "candidates of a/0 was ['yes', 'no'] and is ['no', 'yes']"),
        ({"answer": "no"}, "answer of a/0 was 'yes' and is 'no'"),
    ],
)
def test_an_answer_about_another_item_is_refused(changed: dict[str, object], message: str) -> None:
    now = replace(BOUNDED, **changed)  # type: ignore[arg-type]  # the test's own fields
    with pytest.raises(UserError) as caught:
        _check_items(PATH, {"a/0": head(BOUNDED)}, [now])
    assert message in str(caught.value)
    _check_items(PATH, {"a/0": failed(BOUNDED, "a.mp4: unreadable")}, [now])  # it is asked again


def test_items_that_are_not_asked_now_are_refused() -> None:
    with pytest.raises(UserError, match=r"answers 1 items that are not asked now \(a/0\)"):
        _check_items(PATH, {"a/0": head(BOUNDED)}, [])
