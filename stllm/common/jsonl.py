"""JSON texts, and append-only JSON Lines files that survive a killed process.

Each record is written unbuffered, so a killed process leaves at most one unfinished last line. Readers skip that line,
and the next writer removes it. Hold `files.locked` while writing to keep other writers out.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from stllm.common.errors import DISK_FULL, UserError


def loads(data: str | bytes, **hooks: Any) -> Any:
    """Parse JSON from a text, or from bytes in UTF-8, UTF-16 or UTF-32. A byte order mark is skipped.

    hooks: object_hook or object_pairs_hook, as for the json module.
    Raises ValueError for a text that is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
    try:
        return json.loads(text.removeprefix("\ufeff"), **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def line_of(record: Mapping[str, Any]) -> str:
    """Return the record as one line of JSON, with its newline."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_records(path: Path, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the record of each line; nothing if the file does not exist.

    An unfinished last line is skipped. Raises UserError for any other line that is not a JSON object.
    advice: the end of that error message: what was expected and what to do.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            record = _record(line)
            if record is not None:
                yield number, record
            elif line.endswith(b"\n"):
                found = line[:60].decode(errors="replace").strip()
                raise UserError(f"{path}, line {number}: found {found!r}, {advice}")


class Appender:
    """A JSON Lines file open for appending. Opening it removes the unfinished last line of a killed process.

    Use it as a context manager. Hold a lock while it is open if another process could write to the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("ab", buffering=0)  # unbuffered: a kill loses nothing
        content = path.read_bytes()
        last = content.rpartition(b"\n")[2]
        if last and _record(last) is None:
            self._stream.truncate(len(content) - len(last))
        elif last:  # the record is complete, only its newline is missing
            self._stream.write(b"\n")

    def __enter__(self) -> "Appender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises UserError when the disk is full; the lines before it stay as they were."""
        data = line_of(record).encode(errors="backslashreplace")  # an unpaired surrogate becomes its JSON escape
        end = os.fstat(self._stream.fileno()).st_size
        try:
            with naming_full_disk(self.path):
                while data:  # an almost full disk may accept only a part
                    data = data[self._stream.write(data) :]
        except (UserError, OSError):
            os.truncate(self.path, end)
            raise


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into a UserError that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"no space left on the disk for {path}: what was finished is kept; free some space, then run the same "
            "command again"
        ) from error


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line, or None if the line does not hold a valid one."""
    try:
        found = loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
