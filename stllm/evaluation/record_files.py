"""Records on disk: `<name>.jsonl`, a line an item, written as soon as it is known; nothing finished is ever lost.

Alone, a process appends to that file; of several, each to a part of its own, `<name>.part-<rank>.jsonl`, and the main
one joins them. A process that is killed leaves at most half a last line, which the next run drops.
"""

import errno
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stllm.common.errors import UserError
from stllm.common.files import locked, write_text
from stllm.common.json_text import loads
from stllm.evaluation.items import Record

FULL = (errno.ENOSPC, errno.EDQUOT)


class RecordFiles:
    """The lines of one evaluation. path: `<name>.jsonl`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.jsonl"

    def part(self, rank: int) -> Path:
        """The file of one of several processes."""
        return self.folder / f"{self.name}.part-{rank}.jsonl"

    def parts(self) -> list[Path]:
        """Those that there are, of whatever number of processes."""
        return sorted(self.folder.glob(f"{glob.escape(self.name)}.part-*.jsonl"))

    def read(self) -> dict[str, Record]:
        """The joined lines by id, in the file's order."""
        return _by_id(read_lines(self.path))

    def gather(self) -> dict[str, Record]:
        """What all processes have written, by id; an answer is kept over a failure, else the last line counts."""
        return _by_id(line for path in (self.path, *self.parts()) for line in read_lines(path))

    def join(self, order: Sequence[str]) -> dict[str, Record]:
        """Puts what all processes have written, half lines dropped, into the one file. For the main process alone.

        order: all ids, as the ground truth has them. Raises UserError for a full disk, and for lines that no evaluation
        wrote; either way every file stays as it was.
        """
        parts, found = self.parts(), self.gather()
        records = {id_: found[id_] for id_ in order if id_ in found}
        assert len(records) == len(found), found.keys() - records.keys()
        content = "".join(line_of(record) for record in records.values())
        if self.path.is_file() or content:
            with telling_full_disk(self.path):
                write_text(self.path, content)
        for path in parts:  # a kill before this leaves lines twice, which the next run joins again
            path.unlink(missing_ok=True)
        return records

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other run may write here. Raises UserError when one does."""
        busy = f"{self.path}: another process writes to it: wait until it ends, or name another --output-name"
        with locked(self.folder / f".{self.name}.lock", busy):
            yield


class RecordWriter:
    """Appends lines to a file, each whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("ab", buffering=0)  # the system has it at once: a kill loses nothing

    def add(self, record: Record) -> None:
        """One line. Raises UserError when the disk is full; the lines before it stay."""
        line = line_of(record).encode()
        end = self._stream.tell()
        try:
            with telling_full_disk(self.path):
                while line:  # a disk that is filling up takes a part
                    line = line[self._stream.write(line) :]
        except BaseException:
            os.truncate(self.path, end)
            raise

    def close(self) -> None:
        """Gives the file back."""
        self._stream.close()


def line_of(record: Record) -> str:
    """A record as its line."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[Record]:
    """The records of a file, none without it; half a last line is left out. Raises UserError for any other line."""
    if not path.is_file():
        return
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            record = loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise UserError(
                f"{path}, line {number}: found {line[:60].decode(errors='replace')!r}, expected a record as stllm "
                "evaluate writes it: remove the line, or name another --output-name"
            )
        yield record


@contextmanager
def telling_full_disk(path: Path) -> Iterator[None]:
    """Says of a disk that is full what is to be done."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"no space left on the disk for {path}: what was finished is kept; free some space, then run the same "
            "command again"
        ) from error


def _by_id(records: Iterable[Record]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        known = found.get(record["id"])
        if known is None or known.get("error") or not record.get("error"):
            found[record["id"]] = record
    return found
