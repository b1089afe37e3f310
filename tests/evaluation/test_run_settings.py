"""What made the lines of a benchmark: they go on with the same settings alone, and nothing is lost in a refusal."""

from pathlib import Path

import pytest

from stllm.common.errors import UserError
from stllm.evaluation.run_settings import check_same, save_settings

SETTINGS = {"evaluation": {"num_frames": 16, "batch_size": 8, "output_dir": "out"}, "model": {"video_input": "all"}}
LINE = '{"id": "a/0", "prediction": "yes"}\n'


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "mvbench.jsonl"
    path.write_text(LINE)
    return path


def test_the_same_settings_go_on_and_others_are_named(records: Path) -> None:
    file = records.with_name("mvbench.config.yaml")
    save_settings(file, SETTINGS)
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
