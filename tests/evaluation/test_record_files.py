"""Lines on disk: half ones dropped, parts joined, an answer kept over a failure, a full disk survived, one writer."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from stllm.common.errors import UserError
from stllm.common.jsonl import Appender
from stllm.evaluation import record_files
from stllm.evaluation.record_files import RecordFiles


def record(id_: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "prediction": f"ein Würfel {id_}", **more}


def write(path: Path, *records: dict[str, Any]) -> None:
    with Appender(path) as lines:
        for one in records:
            lines.add(one)


def test_parts_are_joined_in_order_and_go(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run[1]")  # a name that means something to glob
    write(files.path, record("b"))
    write(files.part(0), record("d"))
    write(files.part(1), record("a"), record("c"))
    (tmp_path / "run1.part-0.jsonl").write_text("another's")
    assert list(files.join(["a", "b", "c", "d", "e"])) == ["a", "b", "c", "d"]
    assert [json.loads(line)["id"] for line in files.path.read_text().splitlines()] == ["a", "b", "c", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run1.part-0.jsonl", "run[1].jsonl"]


def test_half_a_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"), record("b"))
    whole = files.path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        files.path.write_bytes(whole[:end])
        write(files.path, record("b"))
        assert files.path.read_bytes() == whole
        files.path.write_bytes(whole[:end])
        assert list(files.join(["a", "b"])) == ["a"]
        assert files.path.read_bytes() == whole[:first]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"))
    files.path.write_bytes(files.path.read_bytes().rstrip(b"\n"))
    assert list(files.gather()) == ["a"]
    write(files.path, record("b"))
    assert list(files.join(["a", "b"])) == ["a", "b"]


def test_an_answer_is_kept_over_a_failure_else_the_last_line_counts(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"), record("b", error="gone"), record("c", error="gone"))
    write(files.part(0), record("a", error="gone"), record("b"), record("c", error="still gone"))
    found = files.join(["a", "b", "c"])
    assert [found[id_].get("error") for id_ in "abc"] == [None, None, "still gone"]


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"prediction": "x"}', '{"id": 3}'])
def test_a_line_that_is_none_of_ours_is_named_and_nothing_changed(tmp_path: Path, line: str) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"))
    with files.path.open("a") as stream:
        stream.write(line + "\n")
    before = files.path.read_bytes()
    with pytest.raises(UserError, match=r"run\.jsonl, line 2: found .* remove the line"):
        files.join(["a"])
    assert files.path.read_bytes() == before


def test_a_disk_without_room_for_the_joined_file_leaves_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("b"))
    write(files.part(0), record("a"))

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_files, "write_text", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        files.join(["a", "b"])
    assert list(files.gather()) == ["b", "a"]


def test_two_runs_cannot_write_at_once(tmp_path: Path) -> None:
    first, second = RecordFiles(tmp_path, "run"), RecordFiles(tmp_path, "run")
    with first.locked():
        with pytest.raises(UserError, match="another process writes to it"), second.locked():
            pass
        with RecordFiles(tmp_path, "other").locked():
            pass
    with second.locked():
        pass
