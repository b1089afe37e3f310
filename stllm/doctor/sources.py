"""Annotation files of every format, read to their end: one broken record does not hide those after it."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.jsonl import loads
from stllm.datasets.annotations import FOREIGN, Fields, json_values, read_file
from stllm.doctor.checks import Fault, Finding, Item, Lengths, at_least_words, check_training

TRAINING = "training data"  # by the fields that tell formats apart
MARKS = {"QA": TRAINING, "caption": TRAINING, **FOREIGN}
EXPECTED = {
    "vc2": "a JSON list, or one record a line, of {video or image, QA: [{i, q, a}]} or {video or image, caption}",
    "mvbench": "a JSON list of {video, question, candidates, answer}",
    "vcgbench": "a JSON list of {Q, A, video_name} or {Q1, Q2, A, video_name}",
    "videoqa": "a JSON list of {question, answer, video_name or video or video_id}, or TGIF-QA's table of them",
}
NAMES = {"vc2": TRAINING, "mvbench": FOREIGN["candidates"], "vcgbench": FOREIGN["Q"], "videoqa": FOREIGN["question"]}


@dataclass(frozen=True)
class Source:
    """One annotation file of training data to be checked.

    name: of the data set. folder: its media are relative to it, and none may lie outside. fps: of frame folders, where
    their file names do not show it. features: a folder of precomputed features, read in place of the media.
    """

    name: str
    findings: Iterator[Finding]
    folder: str
    fps: float | None = None
    features: str | None = None


def training_source(
    name: str,
    path: str | Path,
    media_dir: str,
    *,
    media: str | None = None,
    fps: float | None = None,
    features: str | None = None,
    lengths: Lengths | None = None,
) -> Source:
    """VideoChat2-IT, caption pairs or JSONL.

    media: "video", "image" or "text" when the data set holds only that. lengths: the check of lengths; by default one
    that needs no tokenizer.
    """
    file = user_path(path)
    findings = _checked(file, media, lengths or Lengths(at_least_words))
    return Source(name, _of_one_medium(findings, file, media), media_dir, fps, features)


def _of_one_medium(findings: Iterator[Finding], file: Path, media: str | None) -> Iterator[Finding]:
    """The findings, and a fault at their end when the file as a whole is of no use, or of two."""
    found: set[str | None] = set()
    for finding in findings:
        found.add(finding.expects if isinstance(finding, Item) else None)
        yield finding
    if not found:
        yield Fault("annotation", str(file), "file", f"found no {media} record; name another file or medium")
    if len(found - {None}) > 1:
        sentence = "found videos and images in one file; name it in two entries, one with media: video, one with image"
        yield Fault("annotation", str(file), "file", sentence)


def _checked(path: Path, media: str | None, lengths: Lengths) -> Iterator[Finding]:
    for where, fields in records_of(path, "vc2"):
        if isinstance(fields, Fault):
            yield fields
        else:
            yield from check_training(fields, where, media=media, lengths=lengths)


def records_of(path: Path, form: str) -> Iterator[tuple[str, "Fields | Fault"]]:
    """(file and record, its fields) of every record; a fault in place of one that is none.

    form: of EXPECTED. A file of another format gives one fault and no record.
    """
    number = 0
    table = form == "videoqa" and path.suffix.lower() in (".csv", ".tsv")
    try:
        for where, value in _rows(path, EXPECTED[form]) if table else _values(path, EXPECTED[form]):
            number += 1
            if isinstance(value, Fault):
                yield where, value
            elif not isinstance(value, dict):
                sentence = f"found {json.dumps(value, ensure_ascii=False)[:60]}; expected a mapping, {EXPECTED[form]}"
                yield where, Fault("annotation", where, "record", sentence)
            elif number == 1 and (other := looks_like(value, form)):
                sentence = f"it looks like {other} (fields {', '.join(value)}); expected {EXPECTED[form]}"
                yield where, Fault("annotation", str(path), "format", sentence)
                return
            else:
                yield where, value
    except UserError as error:  # the rest of the file cannot be told into records
        rest = f"; what follows is not checked ({number} records before it are)" if number else ""
        yield str(path), Fault("annotation", str(path), "file", str(error).removeprefix(f"{path}: ") + rest)
        return
    if not number:
        yield str(path), Fault("annotation", str(path), "file", f"found no record; expected {EXPECTED[form]}")


def looks_like(fields: Fields, form: str) -> str | None:
    """Which other format a record is of; None when it is of this one, or of none that is known."""
    found = [name for key, name in MARKS.items() if key in fields]
    if not found or NAMES[form] in found or (form == "videoqa" and "answer" in fields):
        return None
    return found[0]


def _values(path: Path, expected: str) -> Iterator[tuple[str, Any]]:
    """(file and record, value); JSONL goes on after a broken line. Raises UserError where nothing can be read on."""
    text = read_file(path, expected)[1]
    if path.suffix.lower() != ".jsonl" or text.lstrip().startswith("["):
        for number, (_, _, value) in enumerate(json_values(path, text, expected), start=1):
            yield f"{path}, record {number}", value
        return
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, loads(line)
        except (ValueError, RecursionError) as error:
            yield where, Fault("annotation", where, "line", f"not valid JSON ({error}); expected {expected}")


def _rows(path: Path, expected: str) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a table with a header. TGIF-QA's files are called csv, but have tabs between columns."""
    text = read_file(path, expected)[1]
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in text.split("\n", 1)[0] else ",")
    try:
        for row in reader:
            where, num_columns = f"{path}, line {reader.line_num}", len(reader.fieldnames or ())
            if None in row or None in row.values():
                yield where, Fault("annotation", where, "line", f"expected {num_columns} columns, as in the header")
            else:
                yield where, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; expected {expected}") from None
