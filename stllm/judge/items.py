"""Items to judge, and the chat that asks about one.

Items are questions, correct answers and predictions, from the lines of `stllm evaluate` or the official JSON lists.
Each of these spellings is read: {Q, A, pred}, {Q1, Q2, A, pred1, pred2} and {question, answer, prediction or pred}.

The instructions are data: ours, or the user's own copy of the official ones. Their digest identifies them. An item's
texts are data to the judge, too: our instructions quote them as JSON strings, so that a prediction cannot end its
quotation.
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
IDS = ("id", "question_id", *VIDEOS)  # an item's key
NAMES = (*VIDEOS, "id", "question_id")  # the name of its official file in VcgBench

ALIASES = {"pred": "prediction", "pred1": "prediction1", "pred2": "prediction2"}  # of the official scripts
ONE_QUESTION = ("question", "answer", "prediction")
TWO_QUESTIONS = ("question1", "question2", "answer", "prediction1", "prediction2")
CAPTION = "tempcompass_captioning"  # instructions for captions, whose judge does not see the answer
WITHOUT_ANSWER = ("question", "prediction")
QUOTES = ("none", "json")
DIGEST_SIZE = 8  # bytes
_FIELD = re.compile(r"\{(\w+)\}")

Messages = list[dict[str, str]]  # as chat completions take them


@dataclass(frozen=True)
class JudgeItem:
    """One item to judge: a question and its prediction, or a list of two of each on the axis consistency.

    key: unique in the file, the same in every run. name: of its official item file, `<key>_<k>`. form: of its
    instructions, where they are not the axis's own. video: what it is about, "" where the file does not say.
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
        """The texts in the order of ONE_QUESTION or TWO_QUESTIONS."""
        if isinstance(self.question, str) and isinstance(self.prediction, str):
            return self.question, self.answer, self.prediction
        return *self.question, self.answer, *self.prediction


# ---- predictions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """The items of a file for one axis. unanswered: the reason why an item cannot be judged, by its key."""

    items: tuple[JudgeItem, ...]
    unanswered: dict[str, str]


def read_predictions(path: str, axis: str) -> Predictions:
    """Read the items of an axis. Lines of VcgBench's other tasks are skipped.

    Raises UserError, naming file and record, for a file that is not JSON, lacks a field, or has nothing for this axis.
    """
    file = user_path(path)
    items: dict[str, JudgeItem] = {}
    unanswered: dict[str, str] = {}
    num_seen: Counter[tuple[str, str]] = Counter()  # by id, and by official id
    names: dict[str, str] = {}  # of official item files, by key
    tasks = set()
    for number, (_, _, fields) in enumerate(json_values(file, read_file(file, EXPECTED)[1], EXPECTED), start=1):
        where = f"{path}, record {number}"
        if not isinstance(fields, dict):
            raise UserError(f"{where}: found {json.dumps(fields)[:60]}, expected {EXPECTED}")
        task = fields.get("task")
        tasks.add(str(task))
        if axis == TEMPCOMPASS and (task is None or fields.get("parsed", {}).get("official")):
            continue  # another benchmark's, or settled by a rule
        if task in TASKS.values() if axis == QA else task and task != TASKS.get(axis, task):  # official files name none
            continue
        key = _first(fields, IDS)
        if not key:
            raise UserError(f"{where}: found none of {', '.join(IDS)} (fields {', '.join(fields)}): add an id")
        if "task" not in fields or "id" not in fields:  # not a line of `stllm evaluate`, whose ids are unique
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
    """The item, or the reason why it cannot be judged. Raises UserError for a record of another kind."""
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
    """The value of the first key that has one. Half a surrogate pair, which no file can hold, becomes its escape."""
    found = (str(fields[key]) for key in keys if isinstance(fields.get(key), (str, int)) and fields[key] != "")
    return next(found, "").encode("utf-8", "backslashreplace").decode()


def _texts(fields: Fields, *names: str) -> list[str | None]:
    """The texts under one of the names, as a text, a list, or numbered 1 and 2.

    Empty texts stay, numbers become texts, half a surrogate pair is replaced; anything else is None.
    """
    values: list[Any] = []
    for name in reversed(names):  # the first name counts
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
    """Instructions of several axes: a system and a user message each, with {fields} for an item's texts.

    quote: "json" or "none". source: the file, for messages.
    """

    version: str
    quote: str
    prompts: dict[str, dict[str, str]]
    source: str

    @property
    def digest(self) -> str:
        """16 hex digits over every word that a judge may read, on any axis. The version's name is not included."""
        texts = {axis: [prompt["system"], prompt["user"]] for axis, prompt in self.prompts.items()}
        content = json.dumps([self.quote, texts], sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(content.encode(), digest_size=DIGEST_SIZE).hexdigest()

    def messages(self, axis: str, item: JudgeItem) -> Messages:
        """Build the chat that asks about one item. Raises UserError when there are no instructions for the axis."""
        form = item.form or axis
        if form not in self.prompts:
            raise UserError(
                f"{self.source}: found no instructions for the axis {form} (it has {', '.join(self.prompts)}): add them"
            )
        names = ONE_QUESTION if isinstance(item.question, str) else TWO_QUESTIONS
        values = dict(zip(names, item.texts, strict=True))

        def value(match: re.Match[str]) -> str:
            text = values.get(ALIASES.get(match[1], match[1]))
            if text is None:  # no field of an item, such as the dictionary in {'score': 4}
                return match[0]
            return json.dumps(text, ensure_ascii=False) if self.quote == "json" else text

        # One pass over the instructions: braces in an item's text are not filled in.
        filled = {role: _FIELD.sub(value, text) for role, text in self.prompts[form].items()}
        return [{"role": role, "content": text} for role, text in filled.items() if text]


def without_system(messages: Messages) -> Messages:
    """The same chat in one user message, for models that have no system role."""
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]


def load_prompts(path: str | None, axis: str = QA) -> PromptSet:
    """Read the instructions in a YAML or JSON file; None for ours, of the file in which the axis is.

    Raises UserError for a file that is none, an unknown axis, or instructions that leave out one of the item's texts.
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
