"""Reading all records of an annotation file, and finding those faults for which no medium must be opened.

One broken record does not hide those after it. `stllm doctor` lists all faults; `stllm evaluate` stops at the first one
that concerns a whole file and keeps the others as errors of their items.
"""

import csv
import io
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.jsonl import loads
from stllm.datasets.annotations import FOREIGN, AnnotationError, Fields, bounds_of, json_values, read_file, text_of
from stllm.media.sampling import Bounds

TRAINING = "training data"
MARKS = {"QA": TRAINING, "caption": TRAINING, **FOREIGN}  # a field -> the format that it identifies
# Kinds of faults, with a description that `stllm doctor` prints.
KINDS = {
    "annotation": "the file or record cannot be read; training skips the record or stops",
    "refused": "a benchmark's ground truth or media folder that cannot be used as a whole",
    "incomplete": "fields are missing; the record is skipped",
    "missing": "media that are not there; their samples are skipped, a benchmark's task is left out",
    "empty file": "media of 0 bytes",
    "unreadable": "media that cannot be opened or decoded, or are cut short",
    "wrong medium": "an image where a video is expected, or the reverse",
    "outside": "media outside the media folder, which other users of the annotation file will not find",
    "bounds": "start and end that are no part of the video",
    "too long": "records that exceed the language model's positions; training skips them",
    "empty answer": "nothing to learn, or nothing to score against",
    "empty question": "nothing is asked",
    "candidates": "options that do not hold the answer, or hold an option twice",
    "colliding names": "names that stand for several files, here or on another system",
    "duplicate id": "one id for several questions; their answers cannot be told apart",
    "contradiction": "one question about one medium with different answers",
}

Pairs = tuple[tuple[str, str], ...]  # question, answer


@dataclass(frozen=True)
class Fault:
    """A fault in an annotation file or in a medium.

    kind: one of KINDS. where: file and record. subject: the medium or the field. sentence: what was found, what was
    expected, what to do. note: True if an evaluation runs despite it; the doctor lists it and exits with 0.
    """

    kind: str
    where: str
    subject: str
    sentence: str
    note: bool = False

    @property
    def in_words(self) -> str:
        """The fault as one sentence that names its place."""
        whole = (self.where, "file", "folder", "format", "record", "line", "question_id")
        place = self.where if self.subject in whole else f"{self.where}, {self.subject}"
        return f"{place}: {self.sentence.removeprefix(f'{self.where}, ')}"


@dataclass(frozen=True)
class Medium:
    """The medium of a record, with its questions and answers.

    where: file and record. name: the medium's name in the record. expects: the kind of medium: "video", "image",
    "frames", or "text" for a record without one. num_frames, fps: those of a frame folder. pairs: (question, answer).
    """

    where: str
    name: str
    expects: str
    bounds: Bounds | None = None
    num_frames: int | None = None
    fps: float | None = None
    pairs: Pairs = ()


Finding = Fault | Medium


def records_of(
    path: Path, expected: str, own: Sequence[str], *, tables: bool = False
) -> Iterator[tuple[str, "Fields | Fault"]]:
    """Yield for every record its place (file and record number) and its fields, or a `Fault` if the record is broken.

    expected: the expected format in words. own: fields by which this format is recognised. If the first record has
    none of them but a field of another format, the whole file is of the wrong format: one fault is yielded, and no
    records. tables: also read .csv and .tsv files.
    """
    number = 0
    try:
        for where, value in _values(path, expected, tables):
            number += 1
            if isinstance(value, Fault):
                yield where, value
                continue
            if not isinstance(value, dict):
                sentence = f"found {json.dumps(value, ensure_ascii=False)[:60]}; expected a mapping, {expected}"
                yield where, Fault("annotation", where, "record", sentence)
                continue
            other = next((name for key, name in MARKS.items() if key in value), None)
            if number == 1 and other and not any(key in value for key in own):
                sentence = f"it looks like {other} (fields {', '.join(value)}); expected {expected}"
                yield where, Fault("annotation", str(path), "format", sentence)
                return
            yield where, value
    except UserError as error:  # the rest of the file cannot be divided into records
        rest = f"; what follows is not checked ({number} records before it are)" if number else ""
        yield str(path), Fault("annotation", str(path), "file", str(error).removeprefix(f"{path}: ") + rest)
        return
    if not number:
        yield str(path), Fault("annotation", str(path), "file", f"found no record; expected {expected}")


def _values(path: Path, expected: str, tables: bool) -> Iterator[tuple[str, Any]]:
    """Yield the place (file and record) and the value of every record.

    Reading of JSONL continues after a broken line. Raises UserError if the rest of the file cannot be read.
    """
    text, suffix = read_file(path, expected)[1], path.suffix.lower()
    if tables and suffix in (".csv", ".tsv"):
        # TGIF-QA's files are called csv but are separated by tabs.
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in text.split("\n", 1)[0] else ",")
        try:
            for row in reader:
                where, columns = f"{path}, line {reader.line_num}", f"{len(reader.fieldnames or ())} columns"
                broken = None in row or None in row.values()
                yield (
                    where,
                    Fault("annotation", where, "line", f"expected {columns}, as in the header") if broken else row,
                )
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; expected {expected}") from None
    elif suffix != ".jsonl" or text.lstrip().startswith("["):
        for number, (_, _, value) in enumerate(json_values(path, text, expected), start=1):
            yield f"{path}, record {number}", value
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path}, line {number}"
            try:
                if line.strip():
                    yield where, loads(line)
            except ValueError as error:
                yield where, Fault("annotation", where, "line", f"not valid JSON ({error}); expected {expected}")


def pairs_of(question: Any, answer: Any) -> Pairs:
    """Return the pair of a question and its answer, or () if either is empty."""
    asked, answered = text_of(question), text_of(answer)
    return ((asked, answered),) if asked and answered else ()


def check_item(
    fields: Fields,
    where: str,
    *,
    questions: tuple[str, ...] = ("question",),
    answer: str = "answer",
    media: tuple[str, ...] = ("video",),
) -> Iterator[Finding]:
    """Yield the faults of a benchmark's record, and its medium.

    questions, answer: names of the fields with the questions and the answer. media: fields that may name the medium.
    """
    yield from check_texts(fields, where, {**dict.fromkeys(questions, "empty question"), answer: "empty answer"})
    if name := (yield from check_name(fields, where, media)):
        pairs = pairs_of(fields.get(questions[0]), fields.get(answer)) if len(questions) == 1 else ()
        yield Medium(where, name, "video", pairs=pairs)


def check_texts(fields: Fields, where: str, needed: dict[str, str]) -> Iterator[Fault]:
    """Yield the faults of fields that must hold text. needed: name of a field -> kind of fault if it is empty."""
    for field, kind in needed.items():
        if field not in fields:
            yield Fault("incomplete", where, field, f"the field is missing (found {', '.join(fields)}): add it")
        elif text_of(fields[field]) is None:
            yield Fault(kind, where, field, f"found {shortened(fields[field])}; give one, or leave the record out")


def check_name(fields: Fields, where: str, keys: tuple[str, ...]) -> Generator[Finding, None, str | None]:
    """Return the medium's name from the first of `keys` that has one. Yield a fault and return None if none has."""
    name = next((name for key in keys if (name := text_of(fields.get(key))) is not None), None)
    if name is None:
        yield Fault("incomplete", where, keys[0], f"no medium is named; expected a text in {' or '.join(keys)}: add it")
    return name


def check_bounds(
    fields: Fields, where: str, *, negative_start: bool = False
) -> Generator[Finding, None, Bounds | None]:
    """Return the record's bounds in seconds, or None. Yield a fault if `start` or `end` is invalid."""
    try:
        return bounds_of(fields, where, negative_start=negative_start)
    except AnnotationError as error:
        yield Fault("bounds", where, "start, end", str(error).removeprefix(f"{where}: "))
        return None


def shortened(value: Any) -> str:
    """Return the `repr` of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
