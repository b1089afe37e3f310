"""Items to judge, and the chat messages for one item.

An item is a question with its correct answer and a prediction, from records of `stllm evaluate` or the official JSON
lists. Their fields may be {Q, A, pred}, {Q1, Q2, A, pred1, pred2} or {question, answer, prediction or pred}.

The instructions come from a YAML file: stllm's, or the user's copy of the official ones. A hash identifies them.
stllm's instructions quote an item's texts as JSON strings, so that a prediction cannot end its quotation and pose as an
instruction.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from stllm.common.errors import UserError, did_you_mean
from stllm.common.files import check_regular, user_path
from stllm.datasets.annotations import Fields, json_values, read_file
from stllm.evaluation.axes import AXES, CONSISTENCY, QA, TASKS, TEMPCOMPASS

EXPECTED = (
    "lines of `stllm evaluate`, or lines or a JSON list of {id or video_name, question or Q, answer or A, prediction "
    "or pred}, with Q1, Q2, pred1 and pred2 on the axis consistency"
)
VIDEOS = ("video_name", "video", "video_id")
IDS = ("id", "question_id", *VIDEOS)  # fields for an item's key; the first one present is used
NAMES = (*VIDEOS, "id", "question_id")  # fields for the name of an item's official file in VcgBench

ALIASES = {"pred": "prediction", "pred1": "prediction1", "pred2": "prediction2"}  # the official scripts' names -> ours
ONE_QUESTION = ("question", "answer", "prediction")
TWO_QUESTIONS = ("question1", "question2", "answer", "prediction1", "prediction2")
CAPTION = "tempcompass_captioning"  # key of the instructions for captions; they do not show the answer to the judge
WITHOUT_ANSWER = ("question", "prediction")
QUOTES = ("none", "json")
DIGEST_SIZE = 8  # bytes
_FIELD = re.compile(r"\{(\w+)\}")

Messages = list[dict[str, str]]  # messages of a chat completion: {"role": ..., "content": ...}


@dataclass(frozen=True)
class JudgeItem:
    """One item to judge: a question and its prediction, or a list of two of each for the axis consistency.

    key: unique in the file and the same in every run. name: name of its official item file, `<key>_<k>`. form: key of
    its instructions; "" for those of the axis. video: the video's name; "" if unknown.
    """

    key: str
    name: str
    question: str | list[str]
    answer: str
    prediction: str | list[str]
    form: str = field(default="", kw_only=True)
    video: str = field(default="", kw_only=True, compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts in the order of ONE_QUESTION or TWO_QUESTIONS."""
        if isinstance(self.question, str) and isinstance(self.prediction, str):
            return self.question, self.answer, self.prediction
        return *self.question, self.answer, *self.prediction


# ---- predictions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """The items of a file for one axis (such as correctness). unanswered: key of an unusable item -> the reason."""

    items: tuple[JudgeItem, ...]
    unanswered: dict[str, str]


def read_predictions(path: str, axis: str) -> Predictions:
    """Read the items for an axis from a file. Records of VcgBench's other tasks are skipped.

    Raises UserError for a file that is not JSON or has no item for the axis, and for a record that lacks a field.
    """
    file = user_path(path)
    items: dict[str, JudgeItem] = {}
    unanswered: dict[str, str] = {}
    num_seen: Counter[tuple[str, str]] = Counter()  # ("key", id) or ("name", official id) -> occurrences
    names: dict[str, str] = {}  # key -> name of the official item file
    tasks = set()
    for number, (_, _, fields) in enumerate(json_values(file, read_file(file, EXPECTED)[1], EXPECTED), start=1):
        where = f"{path}, record {number}"
        if not isinstance(fields, dict):
            raise UserError(f"{where}: found {json.dumps(fields)[:60]}, expected {EXPECTED}")
        task = fields.get("task")
        tasks.add(str(task))
        if axis == TEMPCOMPASS and (task is None or fields.get("parsed", {}).get("official")):
            continue  # a record of another benchmark, or one that the official rule can score
        # a record of another task; official files have no task
        if task in TASKS.values() if axis == QA else task and task != TASKS.get(axis, task):
            continue
        key = _first(fields, IDS)
        if not key:
            raise UserError(f"{where}: found none of {', '.join(IDS)} (fields {', '.join(fields)}): add an id")
        if "task" not in fields or "id" not in fields:  # not from `stllm evaluate`, so ids may not be unique
            num_seen["key", key] += 1
            key = f"{key}_{num_seen['key', key] - 1}"
        if key not in names:
            official = _first(fields, IDS if axis == QA else NAMES)
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
        wish = "a file of VideoQA" if axis == QA else f"VcgBench's predictions, with its {TASKS.get(axis)} part"
        if axis == TEMPCOMPASS:
            wish = "TempCompass's lines with captions, or with replies that no rule settles"
        raise UserError(f"{path}: found no prediction for the axis {axis}{there}; name {wish}")
    return Predictions(tuple(items.values()), unanswered)


def _item(fields: Fields, axis: str, key: str, name: str, where: str) -> JudgeItem | str:
    """Return the item, or the reason why it cannot be judged. Raises UserError if the record lacks a field."""
    if fields.get("error"):
        return " ".join(str(fields["error"]).encode("utf-8", "replace").decode().split())
    caption = axis == TEMPCOMPASS and "mc_question" in fields
    asked = ("mc_question",) if caption else ("question", "Q")
    texts = {"question": _texts(fields, *asked), "prediction": _texts(fields, "prediction", "pred")}
    answers = _texts(fields, "mc_answer") if caption else _texts(fields, "answer", "A")
    count = 2 if axis == CONSISTENCY else 1
    there = f"(fields {', '.join(fields)})"
    for what, found in texts.items():
        if len(found) != count:
            raise UserError(
                f"{where}: found {len(found)} {what}s {there}, the axis {axis} needs {count}; expected {EXPECTED}"
            )
    if len(answers) != 1:
        raise UserError(f"{where}: found no answer {there}, expected {EXPECTED}")
    if answers[0] is None or not answers[0].strip():
        return "the ground truth has an empty answer"
    question, prediction = ([text for text in found if text is not None] for found in texts.values())
    if len(question) + len(prediction) < 2 * count:
        return "the prediction or question is null"
    if count == 1:
        form = CAPTION if caption else ""
        return JudgeItem(key, name, question[0], answers[0], prediction[0], form=form, video=_first(fields, VIDEOS))
    return JudgeItem(key, name, question, answers[0], prediction, video=_first(fields, VIDEOS))


def _first(fields: Fields, keys: tuple[str, ...]) -> str:
    """Return the first text or number under these keys, or "". Unpaired surrogates become escapes."""
    found = (str(fields[key]) for key in keys if isinstance(fields.get(key), (str, int)) and fields[key] != "")
    return next(found, "").encode("utf-8", "backslashreplace").decode()


def _texts(fields: Fields, *names: str) -> list[str | None]:
    """Return the texts of the first of these fields that the record has.

    A field has one value or a list of values, or it is split into two fields whose names end in 1 and 2.

    Numbers become texts, unpaired surrogates are replaced, and values of other types become None.
    """
    values: list[Any] = []
    for name in reversed(names):  # so that the first name has priority
        if name in fields:
            values = fields[name] if isinstance(fields[name], list) else [fields[name]]
        elif f"{name}1" in fields and f"{name}2" in fields:
            values = [fields[f"{name}1"], fields[f"{name}2"]]
    return [
        str(value).encode("utf-8", "replace").decode()
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
        else None
        for value in values
    ]


# ---- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """Instructions for judges: for each axis a system and a user message with {fields} for an item's texts.

    version: name of this wording. quote: "json" to insert texts as JSON strings, "none" to insert them unchanged.
    prompts: axis -> {"system": ..., "user": ...}. source: the file's name, used in error messages.
    """

    version: str
    quote: str
    prompts: dict[str, dict[str, str]]
    source: str

    @property
    def digest(self) -> str:
        """Return a hash of all instructions, 16 hex digits. The name of the version is not part of it."""
        texts = {axis: [prompt["system"], prompt["user"]] for axis, prompt in self.prompts.items()}
        content = json.dumps([self.quote, texts], sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(content.encode(), digest_size=DIGEST_SIZE).hexdigest()

    def messages(self, axis: str, item: JudgeItem) -> Messages:
        """Return the chat messages for one item. Raises UserError if there are no instructions for the axis."""
        form = item.form or axis
        if form not in self.prompts:
            raise UserError(
                f"{self.source}: found no instructions for the axis {form} (it has {', '.join(self.prompts)}): add them"
            )
        names = ONE_QUESTION if isinstance(item.question, str) else TWO_QUESTIONS
        values = dict(zip(names, item.texts, strict=True))

        def value(match: re.Match[str]) -> str:
            text = values.get(ALIASES.get(match[1], match[1]))
            if text is None:  # braces that are not a field, such as {'score': 4}
                return match[0]
            return json.dumps(text, ensure_ascii=False) if self.quote == "json" else text

        # a single pass, so that braces in an item's text are not replaced
        filled = {role: _FIELD.sub(value, text) for role, text in self.prompts[form].items()}
        return [{"role": role, "content": text} for role, text in filled.items() if text]


def without_system(messages: Messages) -> Messages:
    """Return the chat as one user message, for models without a system role."""
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]


def load_prompts(path: str | None, axis: str = QA) -> PromptSet:
    """Read the judge's instructions from a YAML or JSON file. axis: what is scored, such as "correctness".

    path: the file; None: stllm's own instructions for the axis. Raises UserError for an unreadable file, an unknown
    axis, or instructions that leave out a text of the item (its question, answer or prediction).
    """
    source = path or "the instructions of stllm"
    if path is None:
        name = f"{TEMPCOMPASS if axis == TEMPCOMPASS else 'prompts'}.yaml"
        text = (files("stllm") / "configs" / "judge" / name).read_text(encoding="utf-8")
    else:
        check_regular(path, "a YAML or JSON file")
        try:
            text = user_path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"{path}: the instructions cannot be read ({reason}): give a YAML or JSON file") from None
    try:
        content = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: neither YAML nor JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: found no mapping, expected version and, for each axis, system and user texts")
    version, quote = content.pop("version", None), content.pop("quote", "none")
    if not isinstance(version, (str, int, float)) or not str(version):
        raise UserError(f"{source}: found version {version!r}, expected a name for this wording, kept in every result")
    if quote not in QUOTES:
        raise UserError(f"{source}: found quote {quote!r}, expected {' or '.join(QUOTES)}")
    if not content:
        raise UserError(f"{source}: found no instructions, expected an entry for at least one of {', '.join(AXES)}")
    prompts = {}
    known = (*AXES, CAPTION)
    for axis, entry in content.items():
        if axis not in known:
            hint = did_you_mean(str(axis), known)
            raise UserError(f"{source}: unknown axis {axis!r}, expected {', '.join(known)}{hint}")
        if not isinstance(entry, dict) or not isinstance(entry.get("user"), str) or set(entry) - {"system", "user"}:
            raise UserError(f"{source}: {axis} must be a mapping of a user text and, if wanted, a system text")
        if not isinstance(entry.get("system", ""), str):
            raise UserError(f"{source}: {axis}.system must be a text, found {entry['system']!r}")
        prompts[axis] = {role: entry.get(role, "").strip() for role in ("system", "user")}
        shown = {ALIASES.get(name, name) for text in prompts[axis].values() for name in _FIELD.findall(text)}
        for name in {CONSISTENCY: TWO_QUESTIONS, CAPTION: WITHOUT_ANSWER}.get(axis, ONE_QUESTION):
            if name not in shown:
                raise UserError(
                    f"{source}: {axis} does not show the judge {{{name}}}: write it where that text belongs"
                )
    return PromptSet(version=str(version), quote=quote, prompts=prompts, source=source)
