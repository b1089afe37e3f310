"""JSON Lines files: complete records are read after a killed process, a full disk or manual edits."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from stllm.common.errors import UserError
from stllm.common.files import locked
from stllm.common.jsonl import Appender, read_records

DEEP = "[" * 100_000 + "]" * 100_000


def records(path: Path) -> list[dict[str, object]]:
    return [record for _, record in read_records(path, "expected a record")]


def test_added_records_are_readable_at_once_after_existing_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert records(path) == []
    wanted: list[dict[str, object]] = [
        {"id": "ein Würfel"},
        {"id": "half a pair \ud83d", "n": [1, None]},
        {"id": "🎲\n"},
    ]
    for record in wanted:
        with Appender(path) as lines:
            lines.add(record)
            assert records(path)[-1] == record
    assert records(path) == wanted
    assert "Würfel" in path.read_text() and path.read_bytes().count(b"\n") == 3


def test_only_an_unfinished_last_line_is_skipped_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = b'{"id": "a", "text": "{}"}\n{"id": "b", "text": "\xc3\xbc"}\n'
    first = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        num_whole = (end >= first - 1) + (end >= len(whole) - 1)
        assert [record["id"] for record in records(path)] == ["a", "b"][:num_whole]
        with Appender(path) as lines:
            lines.add({"id": "c"})
        assert [record["id"] for record in records(path)] == [*["a", "b"][:num_whole], "c"]


@pytest.mark.parametrize(
    "line", ["no JSON", "[1]", "7", "", '{"id": "a"', DEEP, f'{{"a": {DEEP}}}', "9" * 5000, "\0\0"]
)
def test_other_invalid_lines_are_named_and_not_changed(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": "a"}}\n{line}\n{{"id": "b"}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: found .*, expected a record$"):
        records(path)


def test_a_failed_write_leaves_only_complete_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    with Appender(path) as lines:
        lines.add({"id": "a"})
        write = lines._stream.write

        class Full:
            fileno = lines._stream.fileno

            def write(self, data: bytes) -> int:
                if len(data) < 12:
                    raise OSError(28, "No space left on device")
                return int(write(data[:5]) or 0)

        with monkeypatch.context() as patched:
            patched.setattr(lines, "_stream", Full())
            with pytest.raises(UserError, match=r"no space left on the disk .* what was finished is kept"):
                lines.add({"id": "too long"})
        assert path.read_bytes() == b'{"id": "a"}\n'
        lines.add({"id": "b"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": "a"}, {"id": "b"}]


def test_a_killed_process_loses_its_lock(tmp_path: Path) -> None:
    path, held = tmp_path / ".lock", tmp_path / "held"
    child = os.fork()
    if child == 0:
        with locked(path, "busy"):
            held.touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not held.exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match="busy"), locked(path, "busy"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(path, "busy"):
        pass
