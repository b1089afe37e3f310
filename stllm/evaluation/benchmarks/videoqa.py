"""VideoQA: four benchmarks of questions with short answers: MSVD-QA, MSRVTT-QA, ActivityNet-QA and TGIF-QA (GIFs).

Sources: MSVD-QA and MSRVTT-QA (Xu et al., 2017), ActivityNet-QA (arXiv 1906.02467), TGIF-QA (arXiv 1704.04497). A judge
scores the predictions (`stllm judge qa`).
"""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import Fields, read_file, text_of
from stllm.datasets.faults import Fault, check_item, records_of
from stllm.evaluation.benchmarks.base import Benchmark, Entry, Item, Record
from stllm.evaluation.benchmarks.ground_truth import MediaFolders, Search, open_requests
from stllm.processors.templates import PromptTemplate

EXPECTED = "a JSON list of {question, answer, video_name or video or video_id}, or TGIF-QA's table of them"
ID_KEYS = ("question_id", "id")
MAPPING = "youtube_mapping.txt"  # YouTube names of MSVD's videos
Numbered = tuple[str, str, Fields]  # a record: its id, its place (file and number), its fields


@dataclass(frozen=True)
class VideoQA(Benchmark):
    """One of the VideoQA benchmarks.

    keys: fields that may contain the video's name. stems: patterns of the file name without extension, tried in order;
    {} stands for the video's name. needs_ids: every question must have an id. youtube: a youtube_mapping.txt may give
    videos a second name.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    stems: tuple[str, ...] = ("{}",)
    needs_ids: bool = True
    youtube: bool = False

    judged = True

    @property
    def ground_truth(self) -> str:  # type: ignore[override]
        """Return the description of the file for --anno-path."""
        return f"{self.title}'s file of questions"

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Read the questions. Answers in a separate file are matched by the question's id."""
        if settings.tasks:
            tasks = ", ".join(settings.tasks)
            raise UserError(f"{self.name}: found tasks {tasks}, but {self.title} has none: leave them out")
        beside = path.with_name(path.name.replace("_q.", "_a."))  # test_a.json beside test_q.json
        questions = yield from _numbered(path, self)
        if settings.answers_path or (beside != path and beside.exists()):
            answers_path = user_path(settings.answers_path) if settings.answers_path else beside
            questions = yield from _answered(questions, path, answers_path)
        elif questions and not any("answer" in fields for _, _, fields in questions):
            sentence = "no question has an answer: name the file that holds them with --answers-path"
            yield Fault("empty answer", str(path), "file", sentence)
            return
        if not questions:
            return
        media = MediaFolders(settings.video_dir, settings)
        folders = (path.parent, Path(media.root), Path(media.root).parent)
        other_names = _youtube_names(folders) if self.youtube else {}
        for id, where, fields in questions:
            name = next((name for key in self.keys if (name := text_of(fields.get(key)))), "")
            stems = [stem.format(name) for stem in self.stems]
            bare = [os.path.splitext(stem)[0] for stem in stems]
            stems += [other_names[stem] for stem in dict.fromkeys([*stems, *bare]) if stem in other_names]
            question, answer = (text_of(fields.get(key)) or "" for key in ("question", "answer"))
            item = Item(id, task="", video=name, media=None, questions=(question,), answer=answer, fields=fields)
            yield media.entry(item, check_item(fields, where, media=self.keys), Search(stems=stems))

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return the item's single request."""
        return open_requests(item, system)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return the prediction as `pred`, and the question's `type` if there is one (ActivityNet-QA: 0 to 8)."""
        return {**_type_of(item.fields), "pred": predictions[0]}

    def official(self, items: Sequence[Item], records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the list for the official judge scripts: `id` as in the ground truth, `question`, `answer`, `pred`.

        Failed items are left out, because a judge would score them."""
        lines = {line["id"]: line for line in records if not line.get("error")}
        rows = []
        for item in items:
            if line := lines.get(item.id):
                own = next((item.fields[key] for key in ID_KEYS if key in item.fields), item.id)
                known = {"id": own, "question": item.questions[0], "answer": item.answer, "pred": line["pred"]}
                rows.append({**known, **_type_of(line)})
        return {"": rows}


SETS = (
    VideoQA("msvd", "MSVD-QA", ("video_name", "video", "video_id"), ("vid{}", "{}"), youtube=True),
    VideoQA("msrvtt", "MSRVTT-QA", ("video_id", "video_name", "video"), ("video{}", "{}")),
    VideoQA("activitynet", "ActivityNet-QA", ("video_name", "video"), ("v_{}", "{}")),
    VideoQA("tgif", "TGIF-QA", ("video_name", "gif_name", "video"), needs_ids=False),
)
for _set in SETS:
    benchmarks.register(_set.name)(_set)
ANY = VideoQA(  # for `stllm doctor`: accepts a file of any of them
    *("videoqa", "VideoQA", ("video_name", "video", "gif_name", "video_id"), ("{}", "video{}", "vid{}", "v_{}")),
    needs_ids=False,
    youtube=True,
)


def _type_of(fields: Mapping[str, Any]) -> Record:
    return {"type": fields["type"]} if "type" in fields else {}


def _answered(questions: list[Numbered], path: Path, answers_path: Path) -> Generator[Fault, None, list[Numbered]]:
    """Add the answers of a file to the questions. Yield its faults, and return the questions that got an answer."""
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


def _numbered(path: Path, kind: VideoQA | None) -> Generator[Fault, None, list[Numbered]]:
    """Yield the faults of a file's ids and fields, and return its records with their ids.

    kind: the benchmark, for a file of questions; None for a file of answers.
    """
    first: dict[str, str] = {}  # id -> place of the first record with it
    records: list[Numbered] = []
    for number, (where, fields) in enumerate(records_of(path, EXPECTED, ("question", "answer"), tables=True)):
        if isinstance(fields, Fault):
            yield fields
            continue
        if kind is not None and (sentence := _of_another_kind(fields, kind)):
            yield Fault("annotation", where, "record", sentence)
            return []  # the other records are of the wrong kind, too
        id = next((text_of(fields[key]) or "" for key in ID_KEYS if key in fields), "")
        usable = True
        if kind is None and "answer" not in fields:
            expected = f"found the fields {', '.join(fields)}, expected answer and question_id"
            yield Fault("incomplete", where, "record", expected)
        if not id and (kind is None or kind.needs_ids):
            expected = f"found no id, expected {' or '.join(ID_KEYS)}: give every record its own"
            yield Fault("incomplete", where, ID_KEYS[0], expected)
            usable = kind is not None
        elif id and id in first:
            sentence = f"the id is also that of {first[id]}: give each its own"
            yield Fault("duplicate id", where, f"question {id}", sentence)
            usable = kind is not None
        if usable:
            first[id] = where
            records.append((id or str(number), where, fields))
    return records


def _of_another_kind(fields: Fields, kind: VideoQA) -> str:
    """Return a sentence if the record belongs to another benchmark than `kind`, else ""."""
    names, keys = ", ".join(fields) or "none", " or ".join(kind.keys)
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
    """Read youtube_mapping.txt from the first folder with it. Return MSVD name -> YouTube name and the reverse.

    Returns {} if no folder has the file. Raises UserError for a line that is not a pair of names.
    """
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
