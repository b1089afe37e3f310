"""Which lines go with which items and settings: answers hold for the very same ones, and a refusal loses nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from stllm.common.errors import UserError
from stllm.conversation.requests import Media
from stllm.evaluation.benchmarks.base import Item
from stllm.evaluation.engine import failed, head
from stllm.evaluation.runs import check_items, check_same

PATH = Path("out") / "mvbench.jsonl"
BOUNDED = Item("a/0", "A", "a.mp4", Media("a.mp4", start=1.0, end=4.5), ("What?",), "yes", ("yes", "no"))


def test_the_same_item_goes_on_wherever_its_file_lies() -> None:
    moved = replace(BOUNDED, media=Media("/elsewhere/a.mp4", start=1.0, end=4.5))
    gone = replace(BOUNDED, media=None, error="a.mp4: there is no such file")
    for item in (BOUNDED, moved, gone):
        check_items(PATH, {"a/0": head(BOUNDED)}, [item])


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
        check_items(PATH, {"a/0": head(BOUNDED)}, [now])
    assert message in str(caught.value)
    check_items(PATH, {"a/0": failed(BOUNDED, "a.mp4: unreadable")}, [now])  # it is asked again


def test_items_that_are_not_asked_now_are_refused() -> None:
    with pytest.raises(UserError, match=r"answers 1 items that are not asked now \(a/0\)"):
        check_items(PATH, {"a/0": head(BOUNDED)}, [])


SETTINGS = {"evaluation": {"num_frames": 16, "batch_size": 8, "output_dir": "out"}, "model": {"video_input": "all"}}
LINE = '{"id": "a/0", "prediction": "yes"}\n'


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "mvbench.jsonl"
    path.write_text(LINE)
    return path


def test_the_same_settings_go_on_and_others_are_named(records: Path) -> None:
    file = records.with_name("mvbench.config.yaml")
    file.write_text(OmegaConf.to_yaml(SETTINGS))
    check_same(file, SETTINGS, records)
    with pytest.raises(UserError, match=r"made with another setting: .*video_input.*; set it back to go on") as caught:
        check_same(file, {**SETTINGS, "model": {"video_input": "mean"}}, records)
    assert "'all'" in str(caught.value) and "'mean'" in str(caught.value)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, "mvbench.jsonl holds lines, but not beside it mvbench.config.yaml, which says what made them"),
        ("model: {video_input: [all", "mvbench.config.yaml cannot be read"),
        ("", "made with another setting"),
    ],
)
def test_lines_of_which_nobody_knows_what_made_them_are_not_mixed(
    records: Path, kept: str | None, message: str
) -> None:
    file = records.with_name("mvbench.config.yaml")
    if kept is not None:
        file.write_text(kept)
    with pytest.raises(UserError, match=message) as caught:
        check_same(file, SETTINGS, records)
    assert "name another --output-name to begin anew" in str(caught.value)
    assert records.read_text() == LINE
