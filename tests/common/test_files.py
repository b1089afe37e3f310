"""Files appear whole or not at all."""

import pytest

from stllm.common.files import replacing, write_text


def test_text_is_written_and_replaced(tmp_path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é")
    write_text(tmp_path / "new" / "a.txt", "×")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "×"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt") as partial:
        partial.write_text("ne")
        raise RuntimeError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
