"""The records of one evaluation on disk: `<name>.jsonl`, one line an item.

A single process appends to that file. Several processes append to one part each, `<name>.part-<rank>.jsonl`, and the
main process joins the parts.
"""

import glob
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from stllm.common.errors import UserError
from stllm.common.files import locked, write_text
from stllm.common.jsonl import line_of, naming_full_disk, read_records
from stllm.evaluation.benchmarks.base import Record

ADVICE = "expected a record as stllm evaluate writes it: remove the line, or name another --output-name"


class RecordFiles:
    """The lines of one evaluation. path: `<name>.jsonl`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.jsonl"

    def part(self, rank: int) -> Path:
        """The file of one of several processes."""
        return self.folder / f"{self.name}.part-{rank}.jsonl"

    def read(self) -> dict[str, Record]:
        """Read the joined lines by id, in the file's order."""
        return _by_id([self.path])

    def gather(self) -> dict[str, Record]:
        """Read what all processes have written, by id: an answer is kept over a failure, else the last line counts."""
        return _by_id([self.path, *self._parts()])

    def join(self, order: Sequence[str]) -> dict[str, Record]:
        """Write what all processes have written into the one file. Only the main process may call it.

        order: all ids, as the ground truth has them. Raises UserError for a full disk, and for lines that no evaluation
        wrote; either way every file stays as it was.
        """
        parts, found = self._parts(), self.gather()
        records = {id_: found[id_] for id_ in order if id_ in found}
        assert len(records) == len(found), found.keys() - records.keys()
        content = "".join(map(line_of, records.values()))
        if self.path.is_file() or content:
            with naming_full_disk(self.path):
                write_text(self.path, content)
        for path in parts:  # a kill before this leaves lines twice, which the next run joins again
            path.unlink(missing_ok=True)
        return records

    def locked(self) -> AbstractContextManager[None]:
        """Hold the right to write here. Raises UserError when another run does."""
        busy = f"{self.path}: another process writes to it: wait until it ends, or name another --output-name"
        return locked(self.folder / f".{self.name}.lock", busy)

    def _parts(self) -> list[Path]:
        """The parts that exist, of however many processes."""
        return sorted(self.folder.glob(f"{glob.escape(self.name)}.part-*.jsonl"))


def _by_id(paths: Iterable[Path]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for path in paths:
        for number, record in read_records(path, ADVICE):
            id_ = record.get("id")
            if not isinstance(id_, str):
                raise UserError(f"{path}, line {number}: found the id {id_!r}, {ADVICE}")
            known = found.get(id_)
            if known is None or known.get("error") or not record.get("error"):
                found[id_] = record
    return found
