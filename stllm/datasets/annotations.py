"""Training annotation files: VideoChat2-IT's JSON, captions, and the user's own JSONL.

A file is a JSON list of records, or has one record per line. A record has one of two forms:

    {"video" or "image": path, "QA": [{"i": instruction, "q": question, "a": answer}]}
    {"video" or "image": path, "caption": text}

"start" and "end" in seconds are optional. Other keys are ignored. A file may have millions of records, so memory holds
its bytes and the offset of each record, and a record is parsed when it is read.
"""

import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stllm.common.errors import UserError
from stllm.common.files import LFS_POINTER, LFS_SENTENCE, check_regular, replacing, user_path
from stllm.common.jsonl import loads
from stllm.media.info import Member
from stllm.media.sampling import Bounds
from stllm.processors.templates import Turn

MAX_TEXT = 1_000_000  # characters of a question or an answer; no model reads as many tokens
MEDIA = ("video", "image")
KINDS = (*MEDIA, "text")
TEXT = KINDS.index("text")
EXPECTED = "a JSON list, or one record a line, of {video or image, QA: [{i, q, a}]} or {video or image, caption}"
# Fields that identify files of benchmarks and of other projects.
FOREIGN = {
    "candidates": "an MVBench task",
    "Q": "a VcgBench ground truth",
    "Q1": "a VcgBench ground truth",
    "question": "a VideoQA ground truth",
    "conversations": "LLaVA's conversations",
}

Fields = dict[str, Any]

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_PLACEHOLDER = re.compile(r"<(?:video|image)>")


class AnnotationError(UserError):
    """Raised if a record cannot be used. The message begins with file and record. cause: one of `samples.CAUSES`."""

    def __init__(self, message: str, *, cause: str = "annotation") -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Record:
    """One record: a medium with its questions and answers.

    turns: instruction, question and answer of each pair. media: path of the medium; None for a text-only record.
    kind: "video" or "image". where: file and record, as error messages name them. bounds: start and end in seconds,
    `math.inf` for an open end. member: the medium's place in a tar, if it is in one. key: name of its features, if
    `media` is not unique.
    """

    turns: tuple[Turn, ...]
    media: str | None
    kind: str
    where: str
    bounds: Bounds | None = None
    member: Member | None = None
    key: str | None = None


class Records(Protocol):
    """The records of a data set, by index.

    kind: "video", "image" or "text", the same for all records. media_dir: folder that the media names are relative to.
    num_pairs: (records,) number of answered pairs of each record.
    """

    kind: str
    media_dir: str
    num_pairs: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Return a record. Raises AnnotationError if it cannot be used."""
        ...


class JsonRecords:
    """The records of one annotation file.

    media_dir: folder that the media names are relative to. clips: finds the media in tars instead, by their names.
    kind: "video", "image" or "text" (records without a medium); records of another kind are skipped. None: the kind
        that the file holds, which must be a single one.
    num_pairs: (records,) number of answered pairs of each record.

    Raises UserError for a file that is missing, is not JSON (with line and column), has a record that is not a mapping
    or is of a benchmark, has no record or no answer, or mixes videos and images.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        media_dir: str | Path = "",
        kind: str | None = None,
        clips: Callable[[str], Member] | None = None,
    ) -> None:
        self.path, self.media_dir, self.clips = user_path(path), str(media_dir), clips
        self._data, text = read_file(self.path)
        spans, num_pairs, kinds = array("q"), array("i"), array("b")  # only a few bytes per record
        num_asking = 0
        first: Fields = {}
        for start, end, fields in json_values(self.path, text):
            where = f"{self.path}, record {len(kinds) + 1}"
            if not isinstance(fields, dict):
                raise UserError(
                    f"{where}: found {json.dumps(fields, ensure_ascii=False):.60}, expected a mapping: {EXPECTED}"
                )
            if "QA" in fields or "caption" in fields:
                num_asking += 1
            elif foreign := next((name for key, name in FOREIGN.items() if key in fields), None):
                raise UserError(f"{where}: found {foreign} (fields {', '.join(fields)}), expected {EXPECTED}")
            first = first or fields
            spans.extend((start, end))
            num_pairs.append(num_answers(fields))
            kinds.append(next((number for number, key in enumerate(MEDIA) if fields.get(key) is not None), TEXT))
        if not spans:
            raise UserError(f"{self.path}: found no record, expected {EXPECTED}")
        if not num_asking:
            found = f"no record has QA or caption (the first has {', '.join(first)})"
            raise UserError(f"{self.path}: {found}, expected {EXPECTED}")
        if not any(num_pairs):
            raise UserError(f"{self.path}: found {len(kinds)} records and not one answer, expected {EXPECTED}")

        of_file = np.array(kinds)
        media = [name for number, name in enumerate(MEDIA) if number in of_file]
        if kind is None and not media:
            raise UserError(
                f"{self.path}: no record names a video or image; expected {EXPECTED}, or say media: text for records "
                "without one"
            )
        if kind is None and len(media) > 1:
            raise UserError(
                f"{self.path}: found videos and images in one file, which do not fit into one batch: name the file in "
                "two entries, one with media: video and one with media: image"
            )
        self.kind = kind or media[0]
        # A record without a medium is kept among those with one, so that it is reported as a fault.
        chosen = (of_file == KINDS.index(self.kind)) | (of_file == TEXT)
        if not chosen.any():
            raise UserError(f"{self.path}: found no {kind} record among {len(kinds)}: name another file or medium")
        ends = np.array(spans)  # start, end, start, end, ... in characters
        if not text.isascii():  # convert to offsets in bytes of UTF-8
            lengths = (len(text[start:end].encode()) for start, end in pairwise([0, *spans]))
            ends = np.fromiter(lengths, np.int64, len(spans)).cumsum()
        self._numbers = np.flatnonzero(chosen)  # numbers of the chosen records in the file
        self._starts, self._ends, self.num_pairs = ends[::2][chosen], ends[1::2][chosen], np.array(num_pairs)[chosen]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        """Parse a record. A pair without an answer is kept, with the answer None.

        Raises AnnotationError if the record names no medium, has no pair or no answer, has a question that is not text,
        or an impossible bound.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        fields = loads(self._data[self._starts[index] : self._ends[index]])
        where = f"{self.path}, record {self._numbers[index] + 1}"
        turns = turns_of(fields, where)
        named = fields.get(self.kind)
        if self.kind != "text" and (not isinstance(named, str) or not named.strip()):
            raise AnnotationError(
                f"{where}: found {self.kind} {named!r}, expected a path relative to the media folder; correct it, or "
                "say media: text for records without a medium"
            )
        bounds = bounds_of(fields, where)
        if self.kind == "text":
            return Record(turns, None, "video", where, bounds)
        if self.clips is not None:
            member = self.clips(named)
            return Record(turns, member.name, self.kind, where, bounds, member, named)
        return Record(turns, os.path.join(self.media_dir, named), self.kind, where, bounds)


def flatten(source: str | Path, target: str | Path) -> tuple[int, int, int]:
    """Write a training file that has one record for each question-and-answer pair.

    The other keys (medium, start, end, ...) are copied into every record. Records with an empty QA list are skipped.
    Returns the numbers of records read, skipped and written.
    Raises UserError if the target exists, if the source cannot be read, or if one of its records has no QA; the target
    is then not written.
    """
    path, new = user_path(source), user_path(target)
    if new.exists():
        raise UserError(f"{new} exists already, expected a new file: name another one, or remove it")
    expected = "a JSON list, or one record a line, of {video or image, QA: [{i, q, a}]}"
    _, text = read_file(path, expected)
    num_read = num_empty = num_written = 0
    with replacing(new) as partial, partial.open("w", encoding="utf-8") as stream:
        for _, _, record in json_values(path, text, expected):
            num_read += 1
            pairs = record.get("QA") if isinstance(record, dict) else None
            if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
                found = json.dumps(record, ensure_ascii=False)
                raise UserError(f"{path}, record {num_read}: found {found:.60}, expected {expected}")
            num_empty += not pairs
            for pair in pairs:
                stream.write(",\n" if num_written else "[\n")
                stream.write(json.dumps({**record, "QA": [pair]}))
                num_written += 1
        if not num_written:
            raise UserError(f"{path}: found no question-and-answer pair in {num_read} records, expected {expected}")
        stream.write("\n]\n")
    return num_read, num_empty, num_written


def read_file(path: Path, expected: str = EXPECTED) -> tuple[bytes, str]:
    """Read a file, and return its bytes and its text. Raises UserError if it cannot be read or is not UTF-8.

    expected: description of the format, used in error messages.
    """
    check_regular(path, expected)
    try:
        data = path.read_bytes()
        # a byte order mark is not part of the JSON
        data = data.removeprefix(b"\xef\xbb\xbf")
        if data.startswith(LFS_POINTER):
            raise UserError(f"{path}: {LFS_SENTENCE}")
        return data, data.decode()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; expected {expected}: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: found a folder, expected {expected}: name the file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}), expected {expected}") from None
    except OSError as error:
        raise UserError(f"{path}: the annotation file cannot be read ({error.strerror}); check it") from None


def json_values(path: Path, text: str, expected: str = EXPECTED) -> Iterator[tuple[int, int, Any]]:
    """Yield (start, end, value) of each record of a JSON list, or of JSON values that follow each other.

    start, end: offsets in characters. Raises UserError, with line and column, for text that is not valid JSON.
    """
    position = _skip(text, 0)
    listed = text.startswith("[", position)
    try:
        if listed:
            position = _skip(text, position + 1)
        while position < len(text) and not (listed and text[position] == "]"):
            value, end = _DECODER.raw_decode(text, position)
            yield position, end, value
            position = _skip(text, end)
            if listed and text.startswith(",", position):
                position = _skip(text, position + 1)
            elif listed and not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if listed and text[position + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, position + 1)
        if listed and position == len(text):
            raise json.JSONDecodeError("The list does not end", text, position)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}), expected {expected}"
        ) from None
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{path}: found a value that cannot be read ({error}), expected {expected}") from None


def _skip(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    assert space is not None  # the pattern also matches an empty text
    return space.end()


# ---- texts beside a clip in a tar ------------------------------------------------------------------------------------

BESIDE = "a json with QA, conversations, question and answer, or caption; or a txt with a caption"
SPEAKERS = {"human": "q", "user": "q", "gpt": "a", "assistant": "a"}


def fields_beside(text: bytes | None, data: bytes | None, where: str) -> Fields:
    """Build a clip's record from the txt (`text`) and the json (`data`) beside it; None if the file is absent.

    The json's pairs are `QA`, LLaVA's `conversations`, or `question` and `answer`. If it has no pairs, the caption is
    the txt, or else the json's `caption`. where: the clip, named in error messages. Raises AnnotationError if none
    exists.
    """
    try:
        fields = {} if data is None else loads(data)
        caption = None if text is None else text.decode("utf-8").strip()
    except (ValueError, LookupError) as error:  # no JSON, no UTF-8
        raise AnnotationError(
            f"{where}: the text beside the clip cannot be read ({error}); expected {BESIDE}"
        ) from None
    if not isinstance(fields, dict):
        raise AnnotationError(f"{where}: found {str(fields)!r:.60} in the json, expected {BESIDE}")
    if "conversations" in fields and "QA" not in fields:
        fields["QA"] = _pairs_of(fields["conversations"], where)
    elif {"question", "answer"} <= fields.keys() and "QA" not in fields:
        fields["QA"] = [{"q": fields["question"], "a": fields["answer"]}]
    elif "QA" not in fields and caption is not None:
        fields["caption"] = caption
    if not {"QA", "caption"} & fields.keys():
        found = f"a json with {', '.join(fields) or 'no field'}" if data is not None else "neither txt nor json"
        raise AnnotationError(f"{where}: found {found} beside the clip, expected {BESIDE}: add it")
    return fields


def num_answers(fields: Fields) -> int:
    """Count the answered pairs of a record."""
    return sum(text_of(answer) is not None for _, _, answer in _raw_pairs(fields))


def _pairs_of(conversation: Any, where: str) -> list[Fields]:
    """Convert LLaVA's conversation to pairs, without the placeholders <video> and <image>.

    Raises AnnotationError if its turns do not alternate between human and model.
    """
    pairs: list[Fields] = []
    for number, turn in enumerate(conversation if isinstance(conversation, list) else [conversation]):
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        key = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if key != "qa"[number % 2]:
            raise AnnotationError(
                f"{where}: found {str(turn)!r:.80} as turn {number + 1} of the conversation, expected "
                f"{{from: {('human', 'gpt')[number % 2]}, value: text}}: correct it, or leave the clip out"
            )
        value = turn.get("value", turn.get("content"))
        if key == "a":
            pairs[-1]["a"] = value
        else:
            pairs.append({"q": _PLACEHOLDER.sub("", value).strip() if isinstance(value, str) else value})
    return pairs


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _raw_pairs(fields: Fields) -> list[tuple[Any, Any, Any]]:
    """List (instruction, question, answer) of each pair, unchecked. A caption is the answer to an empty question."""
    pairs = fields.get("QA")
    if isinstance(pairs, list):
        return [(pair.get("i"), pair.get("q"), pair.get("a")) for pair in pairs if isinstance(pair, dict)]
    captions = fields.get("caption")
    return [("", "", caption) for caption in (captions if isinstance(captions, list) else [captions])]


def turns_of(fields: Fields, where: str) -> tuple[Turn, ...]:
    """Return the pairs of a record as turns. A missing answer is None.

    Raises AnnotationError if all answers are missing, if a question or an instruction is a list or a mapping, or if a
    text is too long.
    """
    pairs = _raw_pairs(fields) if "QA" in fields or "caption" in fields else []
    if not pairs:
        raise AnnotationError(
            f"{where}: found no QA (fields {', '.join(fields)}), expected {EXPECTED}: leave the record out"
        )
    for instruction, question, _ in pairs:
        if fault := question_fault(instruction, question):
            raise AnnotationError(f"{where}: {fault}")
    turns = tuple(
        Turn(question=text_of(question) or "", answer=text_of(answer), instruction=text_of(instruction) or "")
        for instruction, question, answer in pairs
    )
    longest = max(len(text) for turn in turns for text in (turn.question, turn.answer or "", turn.instruction))
    if longest > MAX_TEXT:
        raise AnnotationError(
            f"{where}: found a text of {longest:,} characters, expected at most {MAX_TEXT:,}: leave the record out",
            cause="too long",
        )
    if all(turn.answer is None for turn in turns):
        raise AnnotationError(f"{where}: found an empty answer, expected a text to learn: leave the record out")
    return turns


def question_fault(instruction: Any, question: Any) -> str:
    """Return an error sentence if an instruction (i) or a question (q) is a list or a mapping, else ""."""
    for key, value in (("i", instruction), ("q", question)):
        if isinstance(value, (list, dict)):
            return f"found {key} {value!r:.60}, expected a text: correct it, or leave the record out"
    return ""


def text_of(value: Any) -> str | None:
    """Return a text that is not blank, or a number as text. Return None for any other value."""
    if (isinstance(value, str) and value.strip()) or isinstance(value, (int, float)):
        # JSON can spell half a surrogate pair, which a tokenizer does not accept.
        return str(value).encode("utf-8", "replace").decode()
    return None


def bounds_of(fields: Fields, where: str, *, negative_start: bool = False) -> Bounds | None:
    """Return a record's start and end in seconds, `math.inf` for an open end; None if it has neither.

    negative_start: accept a negative start, as MVBench does. Raises AnnotationError for bounds that are no interval.
    """
    found = {"start": 0.0, "end": math.inf}
    for key in found:
        if (value := fields.get(key)) is None:
            continue
        try:
            found[key] = float(value)
        except (TypeError, ValueError, OverflowError):
            found[key] = math.nan
        if not math.isfinite(found[key]) or isinstance(value, bool):
            sentence = f"{where}: found {key} {value!r}, expected a number of seconds: correct it"
            raise AnnotationError(sentence, cause="bounds")
    start, end = found["start"], found["end"]
    if end <= start or end <= 0 or (start < 0 and not negative_start):
        raise AnnotationError(
            f"{where}: found start {start:g} and end {end:g}, expected 0 <= start < end in seconds: correct them",
            cause="bounds",
        )
    return None if fields.get("start") is None and fields.get("end") is None else (start, end)
