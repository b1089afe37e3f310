"""What is judged: questions, correct answers and predictions, from `stllm evaluate`'s lines or the official JSON lists.

Both spellings are read: {Q, A, pred}, {Q1, Q2, A, pred1, pred2} and {question, answer, prediction or pred}.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.datasets.annotations import Fields, json_values, read_file
from stllm.evaluation.judge_axes import CONSISTENCY, QA, TASKS

EXPECTED = {
    QA: "lines or a JSON list of {id, question, answer, pred or prediction}",
    CONSISTENCY: "lines or a JSON list of {Q1, Q2, A, pred1, pred2, video_name}, or of `stllm evaluate vcgbench`",
}
EXPECTED_GENERAL = "lines or a JSON list of {Q, A, pred, video_name}, or of `stllm evaluate vcgbench`"
IDS = ("id", "question_id")
VIDEOS = ("video_name", "video", "video_id")


@dataclass(frozen=True)
class JudgeItem:
    """One thing to be judged: one question and its prediction, or two of each where consistency is.

    key: unique in the file, the same in every run. name: of its official item file, `<key>_<k>`.
    """

    key: str
    name: str
    questions: tuple[str, ...]
    answer: str
    predictions: tuple[str, ...]


@dataclass(frozen=True)
class Predictions:
    """What a file holds for an axis. unanswered: why an item cannot be judged, by its key."""

    items: tuple[JudgeItem, ...]
    unanswered: dict[str, str]


def read_predictions(path: str, axis: str) -> Predictions:
    """The file's items of that axis; lines of other tasks of VcgBench are left out.

    Raises UserError, naming file and record, for what is no JSON, lacks a field, or has nothing for this axis.
    """
    file, expected = user_path(path), EXPECTED.get(axis, EXPECTED_GENERAL)
    records = [(number, fields) for number, fields in _records(file, expected) if _of_axis(fields, axis)]
    if not records:
        raise UserError(f"{path}: found no prediction for the axis {axis}{_tasks_there(file, expected)}; {_wish(axis)}")
    items: dict[str, JudgeItem] = {}
    unanswered: dict[str, str] = {}
    keys: Counter[str] = Counter()  # how often a key was seen
    bases: Counter[str] = Counter()  # the same of official keys
    names: dict[str, str] = {}  # of official item files, by key
    for number, fields in records:
        where = f"{path}, record {number}"
        key, base = _key(fields, where, keys), _official_key(fields, axis)
        if key not in names:
            names[key] = f"{base}_{bases[base]}"
            bases[base] += 1
        items.pop(key, None)  # evaluate's later line of an id counts
        unanswered.pop(key, None)
        found = _item(fields, axis, key, names[key], where)
        if isinstance(found, JudgeItem):
            items[key] = found
        else:
            unanswered[key] = found
    return Predictions(tuple(items.values()), unanswered)


def _records(file: Path, expected: str) -> Iterator[tuple[int, Fields]]:
    text = read_file(file, expected)[1]
    for number, (_, _, value) in enumerate(json_values(file, text, expected), start=1):
        if not isinstance(value, dict):
            raise UserError(f"{file}, record {number}: found {json.dumps(value)[:60]}, expected {expected}")
        yield number, value


def _of_axis(fields: Fields, axis: str) -> bool:
    """Whether a record is of the axis's task; records of the official files name no task."""
    task = fields.get("task")
    if axis == QA:
        return task not in TASKS.values()
    return not task or task == TASKS[axis]


def _tasks_there(file: Path, expected: str) -> str:
    tasks = sorted({str(fields.get("task")) for _, fields in _records(file, expected)})
    return f" (its tasks are {', '.join(tasks)})" if tasks else " (the file is empty)"


def _wish(axis: str) -> str:
    return "name a file of VideoQA" if axis == QA else f"name VcgBench's predictions, with its {TASKS[axis]} part"


def _key(fields: Fields, where: str, seen: Counter[str]) -> str:
    """A line's own id where `stllm evaluate` wrote it; else the id or video, and which time it comes."""
    base = _first(fields, (*IDS, *VIDEOS))
    if not base:
        raise UserError(f"{where}: found none of {', '.join((*IDS, *VIDEOS))} (fields {', '.join(fields)}): add an id")
    if "task" in fields and "id" in fields:
        return base
    seen[base] += 1
    return f"{base}_{seen[base] - 1}"


def _official_key(fields: Fields, axis: str) -> str:
    """The official key: the video in VcgBench, the question's id in VideoQA."""
    return _first(fields, (*IDS, *VIDEOS) if axis == QA else (*VIDEOS, *IDS))


def _first(fields: Fields, keys: tuple[str, ...]) -> str:
    return next((str(fields[key]) for key in keys if isinstance(fields.get(key), (str, int)) and fields[key] != ""), "")


def _item(fields: Fields, axis: str, key: str, name: str, where: str) -> JudgeItem | str:
    """The item, or why it cannot be judged. Raises UserError for a record that is of another kind."""
    if fields.get("error"):
        return " ".join(str(fields["error"]).split())
    expected = EXPECTED.get(axis, EXPECTED_GENERAL)
    questions, predictions = _texts(fields, "question", "Q"), _texts(fields, "prediction", "pred")
    answers = _texts(fields, "answer", "A")
    count = 2 if axis == CONSISTENCY else 1
    for what, texts in (("question", questions), ("prediction", predictions)):
        if len(texts) != count:
            raise UserError(
                f"{where}: found {len(texts)} {what}s (fields {', '.join(fields)}), the axis {axis} needs {count}; "
                f"expected {expected}"
            )
    if len(answers) != 1:
        raise UserError(f"{where}: found no answer (fields {', '.join(fields)}), expected {expected}")
    if answers[0] is None or not answers[0].strip():
        return "the ground truth has an empty answer"
    if None in predictions or None in questions:
        return "the prediction or question is null"
    return JudgeItem(key, name, tuple(map(str, questions)), answers[0], tuple(map(str, predictions)))


def _texts(fields: Fields, *names: str) -> list[str | None]:
    """The texts under one of the names, as a text, a list, or numbered 1 and 2; None for what is no text."""
    for name in names:
        if name in fields:
            value = fields[name]
            return [_text(one) for one in (value if isinstance(value, list) else [value])]
        if f"{name}1" in fields and f"{name}2" in fields:
            return [_text(fields[f"{name}1"]), _text(fields[f"{name}2"])]
    return []


def _text(value: Any) -> str | None:
    """A text as it stands, empty or not; a number as text. Half a surrogate pair, which JSON can spell, is replaced."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value).encode("utf-8", "replace").decode()
