"""Items to judge: questions, correct answers and predictions, from `stllm evaluate`'s lines or the official JSON lists.

Each of these spellings is read: {Q, A, pred}, {Q1, Q2, A, pred1, pred2} and {question, answer, prediction or pred}.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.datasets.annotations import Fields, json_values, read_file
from stllm.evaluation.axes import CONSISTENCY, QA, TASKS

EXPECTED = {
    QA: "lines or a JSON list of {id, question, answer, pred or prediction}",
    CONSISTENCY: "lines or a JSON list of {Q1, Q2, A, pred1, pred2, video_name}, or of `stllm evaluate vcgbench`",
}
EXPECTED_GENERAL = "lines or a JSON list of {Q, A, pred, video_name}, or of `stllm evaluate vcgbench`"
IDS = ("id", "question_id")
VIDEOS = ("video_name", "video", "video_id")


@dataclass(frozen=True)
class JudgeItem:
    """One item to judge: a question and its prediction, or a list of two of each on the axis consistency.

    key: unique in the file, the same in every run. name: of its official item file, `<key>_<k>`.
    """

    key: str
    name: str
    question: str | list[str]
    answer: str
    prediction: str | list[str]


@dataclass(frozen=True)
class Predictions:
    """The items of a file for one axis. unanswered: the reason why an item cannot be judged, by its key."""

    items: tuple[JudgeItem, ...]
    unanswered: dict[str, str]


def read_predictions(path: str, axis: str) -> Predictions:
    """Read the items of an axis. Lines of VcgBench's other tasks are skipped.

    Raises UserError, naming file and record, for a file that is not JSON, lacks a field, or has nothing for this axis.
    """
    file, expected = user_path(path), EXPECTED.get(axis, EXPECTED_GENERAL)
    items: dict[str, JudgeItem] = {}
    unanswered: dict[str, str] = {}
    num_seen: Counter[tuple[str, str]] = Counter()  # by id, and by official id
    names: dict[str, str] = {}  # of official item files, by key
    tasks = set()
    for number, (_, _, fields) in enumerate(json_values(file, read_file(file, expected)[1], expected), start=1):
        where = f"{path}, record {number}"
        if not isinstance(fields, dict):
            raise UserError(f"{where}: found {json.dumps(fields)[:60]}, expected {expected}")
        task = fields.get("task")
        tasks.add(str(task))
        if task in TASKS.values() if axis == QA else task and task != TASKS[axis]:  # official files name no task
            continue
        key = _first(fields, (*IDS, *VIDEOS))
        if not key:
            raise UserError(
                f"{where}: found none of {', '.join((*IDS, *VIDEOS))} (fields {', '.join(fields)}): add an id"
            )
        if "task" not in fields or "id" not in fields:  # not a line of `stllm evaluate`, whose ids are unique
            num_seen["key", key] += 1
            key = f"{key}_{num_seen['key', key] - 1}"
        if key not in names:
            official = _first(fields, (*IDS, *VIDEOS) if axis == QA else (*VIDEOS, *IDS))
            names[key] = f"{official}_{num_seen['name', official]}"
            num_seen["name", official] += 1
        items.pop(key, None)  # a later line of the same id replaces an earlier one
        unanswered.pop(key, None)
        found = _item(fields, axis, key, names[key], where)
        if isinstance(found, JudgeItem):
            items[key] = found
        else:
            unanswered[key] = found
    if not names:
        there = f" (its tasks are {', '.join(sorted(tasks))})" if tasks else " (the file is empty)"
        wish = "a file of VideoQA" if axis == QA else f"VcgBench's predictions, with its {TASKS[axis]} part"
        raise UserError(f"{path}: found no prediction for the axis {axis}{there}; name {wish}")
    return Predictions(tuple(items.values()), unanswered)


def _item(fields: Fields, axis: str, key: str, name: str, where: str) -> JudgeItem | str:
    """The item, or the reason why it cannot be judged. Raises UserError for a record of another kind."""
    if fields.get("error"):
        return " ".join(str(fields["error"]).encode("utf-8", "replace").decode().split())
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
    question, prediction = list(map(str, questions)), list(map(str, predictions))
    if count == 1:
        return JudgeItem(key, name, question[0], answers[0], prediction[0])
    return JudgeItem(key, name, question, answers[0], prediction)


def _first(fields: Fields, keys: tuple[str, ...]) -> str:
    """The value of the first key that has one. Half a surrogate pair, which no file can hold, becomes its escape."""
    found = (str(fields[key]) for key in keys if isinstance(fields.get(key), (str, int)) and fields[key] != "")
    return next(found, "").encode("utf-8", "backslashreplace").decode()


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
    """A text as it is, empty or not; a number as text. Half a surrogate pair, which JSON can spell, is replaced."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value).encode("utf-8", "replace").decode()
