"""VideoQA: short answers about the videos of MSVD, MSR-VTT and ActivityNet and the pictures of TGIF.

Sources: MSVD-QA and MSRVTT-QA (Xu et al., 2017), ActivityNet-QA (arXiv 1906.02467), TGIF-QA (arXiv 1704.04497). A judge
scores the predictions (`stllm judge qa`).
"""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import Fields, read_file, text_of
from stllm.doctor.checks import Fault, check_videoqa
from stllm.doctor.sources import records_of
from stllm.evaluation.ground_truth import (
    Entry,
    MediaFolders,
    Search,
    check_any_found,
    entries_of,
    open_requests,
    system_of,
)
from stllm.evaluation.items import Item, Record
from stllm.processors.templates import PromptTemplate

FORM = "videoqa"  # of the files
ID_KEYS = ("question_id", "id")
MAPPING = "youtube_mapping.txt"  # of MSVD's videos
Numbered = tuple[str, str, Fields]  # id, file and record, fields


@dataclass(frozen=True)
class Kind:
    """How one of these benchmarks names its videos.

    title: the benchmark's own name. keys: the fields that may name the video. stems: patterns of the file's name
    without extension, tried in order, {} the name as given. needs_ids: every question has its own id. youtube: a
    youtube_mapping.txt gives videos a second name.
    """

    title: str
    keys: tuple[str, ...]
    stems: tuple[str, ...] = ("{}",)
    needs_ids: bool = True
    youtube: bool = False


KINDS = {
    "msvd": Kind("MSVD-QA", ("video_name", "video", "video_id"), ("vid{}", "{}"), youtube=True),
    "msrvtt": Kind("MSRVTT-QA", ("video_id", "video_name", "video"), ("video{}", "{}")),
    "activitynet": Kind("ActivityNet-QA", ("video_name", "video"), ("v_{}", "{}")),
    "tgif": Kind("TGIF-QA", ("video_name", "gif_name", "video"), needs_ids=False),
}
ANY = "videoqa"  # a name for `stllm doctor`: one of KINDS, whichever it is
ANY_KIND = Kind(
    "VideoQA",
    ("video_name", "video", "gif_name", "video_id"),
    ("{}", "video{}", "vid{}", "v_{}"),
    needs_ids=False,
    youtube=True,
)


@dataclass(frozen=True)
class VideoQA:
    """One of these benchmarks, read. See `items.Benchmark`. system: as in `Request`."""

    name: str
    items: Sequence[Item]
    system: str | None
    excluded: Mapping[str, str] = field(default_factory=dict)
    num_excluded: int = 0
    notes: Sequence[str] = ()

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
    if settings.tasks:
        title = KINDS[name].title
        raise UserError(f"{name}: found tasks {', '.join(settings.tasks)}, but {title} has none: leave them out")
    items = [entry.item for entry in entries_of(videoqa_entries(settings, name))]
    check_any_found(items, settings.anno_path or "")
    return VideoQA(name=name, items=items[: settings.limit], system=system_of(settings))


for _name in KINDS:
    benchmarks.register(_name)(partial(videoqa, name=_name))


def videoqa_entries(settings: EvaluationSettings, name: str) -> Iterator[Entry | Fault]:
    """Every question with its answer, and the faults that concern whole files. Raises UserError.

    name: of KINDS, or ANY. If the answers are in a separate file, they are matched by the question's id.
    """
    kind = KINDS.get(name, ANY_KIND)
    if settings.anno_path is None:
        raise UserError(f"{name}: no ground truth was named: give {kind.title}'s file of questions")
    path = user_path(settings.anno_path)
    answers_path = user_path(settings.answers_path) if settings.answers_path else answers_beside(path)
    questions = yield from _numbered(path, kind)
    if answers_path is not None:
        questions = yield from _answered(questions, path, answers_path)
    elif questions and not any("answer" in fields for _, _, fields in questions):
        sentence = "no question has an answer: name the file that holds them with --answers-path"
        yield Fault("empty answer", str(path), "file", sentence)
        return
    if not questions:
        return
    media = MediaFolders(settings.video_dir, settings)
    other_names = _youtube_names([path.parent, Path(media.root), Path(media.root).parent]) if kind.youtube else {}
    for id, where, fields in questions:
        yield _entry(kind, id, where, fields, media, other_names)


def _answered(questions: list[Numbered], path: Path, answers_path: Path) -> Generator[Fault, None, list[Numbered]]:
    """Yields the faults of a file of answers; returns the answered questions with their answers."""
    answers = {id: fields for id, _, fields in (yield from _numbered(answers_path, None))}
    without = [id for id, _, _ in questions if id not in answers]
    for id in without:
        sentence = (
            f"{len(without)} of the {len(questions)} questions of {path} have no answer there (such as question_id "
            f"{id}): name the answers of these questions with --answers-path"
        )
        yield Fault("empty answer", str(answers_path), f"question {id}", sentence)
    asked = {id for id, _, _ in questions}
    for id in answers:
        if id not in asked:
            sentence = f"{path} has no question of that id; the answer is not used"
            yield Fault("incomplete", str(answers_path), f"answer {id}", sentence, note=True)
    return [
        (id, where, {**answers[id], **fields, "answer": answers[id].get("answer")})
        for id, where, fields in questions
        if id in answers
    ]


def answers_beside(questions: Path) -> Path | None:
    """`test_a.json` beside `test_q.json`; None for other names, or when there is none."""
    answers = questions.with_name(questions.name.replace("_q.", "_a."))
    return answers if answers != questions and answers.exists() else None


def _numbered(path: Path, kind: Kind | None) -> Generator[Fault, None, list[Numbered]]:
    """Yields the faults of a file's ids and fields; returns its records with their ids.

    kind: None for a file of answers.
    """
    first: dict[str, str] = {}  # id -> where it was first found
    records: list[Numbered] = []
    for number, (where, fields) in enumerate(records_of(path, FORM)):
        if isinstance(fields, Fault):
            yield fields
            continue
        if kind is not None and (sentence := _of_another_kind(fields, kind)):
            yield Fault("annotation", where, "record", sentence)
            return []  # and so are the others
        id = next((text_of(fields[key]) or "" for key in ID_KEYS if key in fields), "")
        if kind is None and "answer" not in fields:
            expected = f"found the fields {', '.join(fields)}, expected answer and question_id"
            yield Fault("incomplete", where, "record", expected)
        if not id and (kind is None or kind.needs_ids):
            sentence = f"found no id, expected {' or '.join(ID_KEYS)}: give every record its own"
            yield Fault("incomplete", where, ID_KEYS[0], sentence)
            if kind is None:
                continue
        elif id and id in first:
            yield Fault(
                "duplicate id", where, f"question {id}", f"the id is also that of {first[id]}: give each its own"
            )
            if kind is None:
                continue
        first[id] = where
        records.append((id or str(number), where, fields))
    return records


def _of_another_kind(fields: Fields, kind: Kind) -> str:
    """A sentence about a record of another benchmark; "" if it may be one of this kind."""
    names = ", ".join(fields) or "none"
    keys = " or ".join(kind.keys)
    if not {"question", *kind.keys} & fields.keys():
        return f"found the fields {names}, expected question, answer and {keys}"
    if "candidates" in fields:
        return f"it looks like an MVBench task (fields {names}), expected {kind.title}"
    if {"a1", "a2"} <= fields.keys():
        return f"it looks like TGIF-QA's questions with choices (fields {names}), expected its frame questions"
    if not any(key in fields for key in kind.keys) and any("video" in key or "gif" in key for key in fields):
        return f"found the fields {names}, expected {kind.title}, which names its video in {keys}"
    return ""


def _youtube_names(folders: Sequence[Path]) -> dict[str, str]:
    """MSVD's names of videos and their YouTube names, each by the other, from the first youtube_mapping.txt found in
    the folders; empty without one. Raises UserError for a line that is not a pair of names."""
    file = next((folder / MAPPING for folder in folders if (folder / MAPPING).is_file()), None)
    if file is None:
        return {}
    names: dict[str, str] = {}
    expected = "lines of a YouTube name and a vid<N>, such as -4wsuPCjDBc_5_15 vid1"
    for number, line in enumerate(read_file(file, expected)[1].splitlines(), start=1):
        words = line.split()
        if len(words) == 2:
            names |= {words[0]: words[1], words[1]: words[0]}
        elif words:
            raise UserError(f"{file}, line {number}: found {line[:60]!r}, expected {expected}")
    return names


def _entry(
    kind: Kind, id: str, where: str, fields: Fields, media: MediaFolders, other_names: Mapping[str, str]
) -> Entry:
    name = next((name for key in kind.keys if (name := text_of(fields.get(key)))), "")
    stems = [stem.format(name) for stem in kind.stems]
    bare = [os.path.splitext(stem)[0] for stem in stems]
    stems += [other_names[stem] for stem in dict.fromkeys([*stems, *bare]) if stem in other_names]
    item = Item(
        id=id,
        task="",
        video=name,
        media=None,
        questions=(text_of(fields.get("question")) or "",),
        answer=text_of(fields.get("answer")) or "",
        fields=fields,
    )
    return media.entry(item, check_videoqa(fields, where, kind.keys), Search(stems=stems))
