"""Annotation files of every format, read to their end: each record's faults and items, whatever stands before it."""

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError, unknown_name
from stllm.datasets.annotations import FOREIGN, Fields, json_values, read_file, text_of
from stllm.datasets.doctor_checks import (
    Fault,
    Finding,
    Item,
    Lengths,
    at_least_words,
    check_mvbench,
    check_training,
    check_vcgbench,
    check_videoqa,
)
from stllm.evaluation.mvbench_tasks import TASKS, MVBenchLayout, MVBenchTask, task_of

TRAINING = "training data"  # by the fields that tell formats apart
MARKS = {"QA": TRAINING, "caption": TRAINING, **FOREIGN}
EXPECTED = {
    "vc2": "a JSON list, or one record a line, of {video or image, QA: [{i, q, a}]} or {video or image, caption}",
    "mvbench": "a JSON list of {video, question, candidates, answer}",
    "vcgbench": "a JSON list of {Q, A, video_name} or {Q1, Q2, A, video_name}",
    "videoqa": "a JSON list of {question, answer, video_name or video or video_id}",
}
NAMES = {"vc2": TRAINING, "mvbench": FOREIGN["candidates"], "vcgbench": FOREIGN["Q"], "videoqa": FOREIGN["question"]}
ID_KEYS = ("question_id", "id")

CheckRecord = Callable[[Fields, str], Iterator[Finding]]


@dataclass(frozen=True)
class Source:
    """One annotation file to be checked.

    name: of the data set. folders: in which its media are looked for, the first one first. root: outside which no
    medium may lie; "" when there is none. fps: of frame folders, where it is not what their names tell.
    features: a folder of precomputed features, read in place of the media.
    """

    name: str
    findings: Iterator[Finding]
    folders: tuple[str, ...]
    root: str = ""
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

    media: "video", "image" or "text" when the data set is of that alone. lengths: how long its samples may be; by
    default a bound that needs no tokenizer.
    """
    file = Path(path).expanduser()
    check = partial(check_training, media=media, lengths=lengths or Lengths(at_least_words))
    findings = _checked(file, "vc2", check)
    return Source(name, _of_one_medium(findings, file, media), (media_dir,), media_dir, fps, features)


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


def mvbench_sources(path: str | Path, video_dir: str | None) -> Iterator[Source]:
    """MVBench's folder (with `json` and `video` in it), a folder of its JSON files, or one of them; a source each."""
    layout = MVBenchLayout.of(path, video_dir)
    media = str(layout.media)
    if not layout.files:
        yield Source("mvbench", iter([_no_files(path)]), (media,), media)
    for file in layout.files:
        task = task_of(file)
        if task is None:
            yield Source(file.stem, iter([_unknown_task(file)]), (media,), media)
        else:
            folders = tuple(f"{media}/{folder}" for folder in task.folders)
            yield Source(task.name, _checked(file, "mvbench", _task_check(task)), (*folders, media), media)


def vcgbench_source(path: str | Path, video_dir: str) -> Source:
    """One of VcgBench's ground-truth files."""
    return Source("vcgbench", _checked(Path(path).expanduser(), "vcgbench", check_vcgbench), (video_dir,), video_dir)


def videoqa_source(path: str | Path, video_dir: str, answers_path: str | None = None) -> Source:
    """A VideoQA ground truth, or questions with their answers in a file of their own.

    answers_path: that file; default: `test_a.json` beside `test_q.json`.
    """
    questions = Path(path).expanduser()
    answers = Path(answers_path).expanduser() if answers_path else answers_beside(questions)
    findings = _videoqa(questions, answers)
    return Source("videoqa", findings, (video_dir,), video_dir)


def _checked(path: Path, form: str, check: CheckRecord) -> Iterator[Finding]:
    for where, fields in records_of(path, form):
        if isinstance(fields, Fault):
            yield fields
        else:
            yield from check(fields, where)


def _task_check(task: MVBenchTask) -> CheckRecord:
    return lambda fields, where: check_mvbench(fields, where, media=task.media, bounded=task.bounded, fps=task.fps)


def records_of(path: Path, form: str) -> Iterator[tuple[str, "Fields | Fault"]]:
    """(file and record, its fields) of every record; a fault in place of one that is none.

    A file of another format gives one fault and no record.
    """
    number = 0
    try:
        for where, value in _values(path, EXPECTED[form]):
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
                yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, Fault("annotation", where, "line", f"not valid JSON ({error}); expected {expected}")


def _videoqa(questions: Path, answers: Path | None) -> Iterator[Finding]:
    """Questions beside their answers, paired by `question_id` where these stand in a file of their own."""
    answer_of: Fields = {}
    if answers is not None:
        answer_of = yield from _answers(answers)
    asked: set[str] = set()
    for where, fields in records_of(questions, "videoqa"):
        if isinstance(fields, Fault):
            yield fields
            continue
        key = id_of(fields)
        if key and key in asked:  # TGIF-QA gives its questions no ids
            yield _twice(where, key)
        asked.add(key)
        answered = "answer" in fields or answers is None or key in answer_of
        if not answered:
            yield Fault("empty answer", where, f"question {key}", f"{answers} holds no answer to it: add one")
        elif "answer" not in fields and answers is not None:
            fields = {**fields, "answer": answer_of[key]}
        yield from check_videoqa(fields, where, answered=answered)
    for key in answer_of.keys() - asked:
        yield Fault("incomplete", str(answers), f"answer {key}", f"{questions} has no question of that id: remove it")


def _answers(path: Path) -> Generator[Finding, None, Fields]:
    """Yields the faults of a file of answers; returns the answers by their questions' ids."""
    answer_of: Fields = {}
    for where, fields in records_of(path, "videoqa"):
        if isinstance(fields, Fault):
            yield fields
            continue
        key = id_of(fields)
        if not key:
            yield Fault("incomplete", where, ID_KEYS[0], "the answer names no question: add the question's id")
        elif key in answer_of:
            yield _twice(where, key)
        else:
            answer_of[key] = fields.get("answer")
    return answer_of


def id_of(fields: Fields) -> str:
    """The id of a question; "" when it has none."""
    return next((text_of(fields[key]) or "" for key in ID_KEYS if key in fields), "")


def _twice(where: str, key: str) -> Fault:
    return Fault("duplicate id", where, f"question {key}", "the id stands there a second time: give each its own")


def answers_beside(questions: Path) -> Path | None:
    """`test_a.json` beside `test_q.json`; None for other names, or when there is none."""
    answers = questions.with_name(questions.name.replace("_q.", "_a."))
    return answers if answers != questions and answers.exists() else None


def _no_files(folder: str | Path) -> Fault:
    sentence = f"found no JSON file; expected MVBench's, such as {TASKS[0].file}: name the folder that holds `json`"
    return Fault("annotation", str(folder), "folder", sentence)


def _unknown_task(file: Path) -> Fault:
    known = [task.file for task in TASKS]
    return Fault("annotation", str(file), "file", unknown_name("MVBench task", file.name, known))
