"""VideoQA: short answers about the videos of MSVD, MSR-VTT and ActivityNet and the pictures of TGIF.

Sources: MSVD-QA and MSRVTT-QA (Xu et al., 2017), ActivityNet-QA (arXiv 1906.02467), TGIF-QA (arXiv 1704.04497). A judge
scores the predictions (`stllm judge qa`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.evaluation_section import EvaluationSettings
from stllm.common.registry import benchmarks
from stllm.conversation.requests import Request
from stllm.conversation.templates import PromptTemplate
from stllm.datasets.annotations import Fields, text_of
from stllm.datasets.doctor_checks import check_videoqa
from stllm.datasets.doctor_sources import ID_KEYS, answers_beside, id_of
from stllm.evaluation.ground_truth import (
    MediaFolders,
    check_any_found,
    examined,
    open_requests,
    read_records,
    system_of,
)
from stllm.evaluation.items import Item, Record

FORM = "videoqa"  # of the files
Numbered = tuple[str, str, Fields]  # id, file and record, fields


@dataclass(frozen=True)
class Kind:
    """How one of these benchmarks names its videos.

    title: the benchmark's own name. keys: the fields that may name the video. stems: patterns of the file's name
    without extension, tried in order, {} the name as given. needs_ids: every question has its own id.
    """

    title: str
    keys: tuple[str, ...]
    stems: tuple[str, ...] = ("{}",)
    needs_ids: bool = True


KINDS = {
    "msvd": Kind("MSVD-QA", ("video_name", "video")),
    "msrvtt": Kind("MSRVTT-QA", ("video_id", "video_name", "video"), ("video{}", "{}")),
    "activitynet": Kind("ActivityNet-QA", ("video_name", "video"), ("v_{}", "{}")),
    "tgif": Kind("TGIF-QA", ("video_name", "gif_name", "video"), needs_ids=False),
}


@dataclass(frozen=True)
class VideoQA:
    """One of these benchmarks, read. See `items.Benchmark`. system: as in `Request`."""

    name: str
    items: Sequence[Item]
    system: str | None
    excluded: Mapping[str, str] = field(default_factory=dict)
    num_excluded: int = 0

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """The one request."""
        return open_requests(item, self.system)

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """`pred`, and the question's type where the ground truth has one (ActivityNet-QA, 0 to 8)."""
        kept = {key: item.fields[key] for key in ("type",) if key in item.fields}
        return {**kept, "pred": predictions[0]}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """None: a judge decides."""
        return {}

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """The list that the official judge scripts read: `id` as the ground truth has it, `question`, `answer`, `pred`.
        Items that failed are left out: a judge would score them."""
        lines = {line["id"]: line for line in records if not line.get("error")}
        return {"": [_official(item, lines[item.id]) for item in self.items if item.id in lines]}


def _official(item: Item, line: Record) -> Record:
    own = next((item.fields[key] for key in ID_KEYS if key in item.fields), item.id)
    known = {"id": own, "question": item.questions[0], "answer": item.answer, "pred": line["pred"]}
    return {**known, **{key: line[key] for key in ("type",) if key in line}}


def videoqa(settings: EvaluationSettings, *, name: str) -> VideoQA:
    """Reads questions and answers and looks for the videos. Raises UserError."""
    kind = KINDS[name]
    if settings.anno_path is None:
        raise UserError(f"{name}: no ground truth was named: give {kind.title}'s file of questions")
    if settings.tasks:
        raise UserError(f"{name}: found tasks {', '.join(settings.tasks)}, but {kind.title} has none: leave them out")
    records = _paired(settings, kind)
    media = MediaFolders(settings.video_dir, settings)
    items = [_item(kind, *record, media) for record in records]
    check_any_found(items, settings.anno_path)
    return VideoQA(name=name, items=items[: settings.limit], system=system_of(settings))


for _name in KINDS:
    benchmarks.register(_name)(partial(videoqa, name=_name))


def _paired(settings: EvaluationSettings, kind: Kind) -> list[Numbered]:
    """Every question with its answer, which is found by the question's id where it has a file of its own."""
    path = Path(settings.anno_path or "").expanduser()
    questions = _numbered(path, kind)
    answers_path = Path(settings.answers_path).expanduser() if settings.answers_path else answers_beside(path)
    unanswered = [where for _, where, fields in questions if "answer" not in fields]
    if answers_path is None:
        if len(unanswered) == len(questions):
            raise UserError(f"{path}: no question has an answer: name the file that holds them with --answers-path")
        return questions
    answers = {id: fields for id, _, fields in _numbered(answers_path, None)}
    without = [id for id, _, _ in questions if id not in answers]
    if without:
        raise UserError(
            f"{answers_path}: {len(without)} of the {len(questions)} questions of {path} have no answer there (such as "
            f"question_id {without[0]}): name the answers of these questions with --answers-path"
        )
    return [(id, where, {**answers[id], **fields, "answer": answers[id]["answer"]}) for id, where, fields in questions]


def _numbered(path: Path, kind: Kind | None) -> list[Numbered]:
    """The records of a file with their ids. kind: None for a file of answers. Raises UserError for a record of another
    benchmark, an id that is missing or stands there twice, an answer that is missing from a file of answers."""
    first: dict[str, str] = {}  # id -> where it stands
    records = []
    for number, (where, fields) in enumerate(read_records(path, FORM)):
        if kind is not None:
            _check_kind(where, fields, kind)
        elif "answer" not in fields:
            raise UserError(f"{where}: found the fields {', '.join(fields)}, expected answer and question_id")
        id = id_of(fields) or ("" if kind is None or kind.needs_ids else str(number))
        if not id:
            raise UserError(f"{where}: found no id, expected {' or '.join(ID_KEYS)}: give every record its own")
        if id in first:
            raise UserError(f"{where}: the id {id} stands in {first[id]}, too: give every question its own")
        first[id] = where
        records.append((id, where, fields))
    return records


def _check_kind(where: str, fields: Fields, kind: Kind) -> None:
    names = ", ".join(fields)
    if "candidates" in fields:
        raise UserError(f"{where}: it looks like an MVBench task (fields {names}), expected {kind.title}")
    if not any(key in fields for key in kind.keys) and any("video" in key for key in fields):
        keys = " or ".join(kind.keys)
        raise UserError(f"{where}: found the fields {names}, expected {kind.title}, which names its video in {keys}")


def _item(kind: Kind, id: str, where: str, fields: Fields, media: MediaFolders) -> Item:
    name = next((name for key in kind.keys if (name := text_of(fields.get(key)))), "")
    medium, error = examined(check_videoqa({**fields, "video_name": name}, where))
    found = None
    if not error and medium is not None:
        found = media.find(medium, stems=[stem.format(name) for stem in kind.stems])
        error = "" if found else media.missing(name)
    return Item(
        id=id,
        task="",
        video=name,
        media=found,
        questions=(text_of(fields.get("question")) or "",),
        answer=text_of(fields.get("answer")) or "",
        fields=fields,
        error=error,
    )
