"""TempCompass: questions in four formats about action, direction, speed, order and attribute change. arXiv 2403.00476.

    questions/{multi-choice,yes_no,caption_matching,captioning}.json, videos/<id>.mp4, meta_info.json

Multiple choice, yes/no and caption matching are scored by rules. `stllm judge tempcompass` scores captions, and answers
that the rules cannot interpret.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import text_of
from stllm.datasets.faults import Fault, check_item, shortened
from stllm.evaluation.benchmarks.base import Benchmark, Entry, Item, Record
from stllm.evaluation.benchmarks.ground_truth import (
    MediaFolders,
    Search,
    chosen_tasks,
    find_files,
    open_requests,
    read_mapping,
    root_of,
)
from stllm.evaluation.scores import chosen_option
from stllm.processors.templates import PromptTemplate

MULTI_CHOICE, YES_NO, CAPTION_MATCHING, CAPTIONING = "multi-choice", "yes_no", "caption_matching", "captioning"
SUFFIXES = {
    MULTI_CHOICE: "\nPlease directly give the best option:",
    YES_NO: "\nPlease answer yes or no:",
    CAPTION_MATCHING: "\nPlease directly give the best option:",
    CAPTIONING: "",
}
DIMENSIONS = ("action", "direction", "speed", "order", "attribute_change")
EXPECTED = "TempCompass's {id: {dimension: [{question, answer}]}}"
QUESTIONS, META = "questions", "meta_info.json"
_OPTION = re.compile(r"(?P<label>(?:\w+ )?(?:[A-Z]|\d))(?:\.|:) (?P<text>.+)")  # "A. ...", "Option 1: ..."


class TempCompass(Benchmark):
    """The benchmark TempCompass. Each question format is a task, if its file exists in the folder."""

    name, title = "tempcompass", "TempCompass"
    ground_truth = "its folder, which holds questions and videos"
    finds_media = True
    rotates = False
    rules = (
        "The official rules accept the following replies. Multiple choice: the whole answer, its letter, or its letter "
        "followed by a full stop or bracket. Yes/no: a reply that begins with yes or no. Caption matching: a whole "
        "option, its sentence or its label. Other replies count as wrong here; `stllm judge tempcompass` can score "
        "them. The strict rule accepts the same replies in upper or lower case, but yes and no only as whole words."
    )

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Read the configured tasks. path: the benchmark's folder, its folder `questions`, or a file there."""
        files = find_files(path, self.title, {part: f"{part}.json" for part in SUFFIXES}, (QUESTIONS, ""))
        root = root_of(files, QUESTIONS)
        meta = read_mapping(root / META, "{id: {eval_dim}}") if (root / META).is_file() else {}
        tasks = chosen_tasks(list(files), settings)
        # the judge compares a caption with the first multiple-choice question about the same clip and dimension
        needs_options = CAPTIONING in tasks and MULTI_CHOICE in files
        choices = read_mapping(files[MULTI_CHOICE], EXPECTED) if needs_options else {}
        media = MediaFolders(settings.video_dir or root / "videos", settings)
        for part in tasks:
            for where, (clip, dimension, number), fields in _records(files[part]):
                if isinstance(fields, Fault):
                    yield fields
                    continue
                if part == CAPTIONING:
                    first = (choices.get(clip, {}).get(dimension) or [{}])[0]
                    fields |= {f"mc_{key}": first.get(key) for key in ("question", "answer")}
                question, answer = (text_of(fields.get(key)) or "" for key in ("question", "answer"))
                about = ((meta.get(clip) or {}).get("eval_dim") or {}).get(dimension) or {}
                item = Item(
                    id=f"{part}/{clip}/{dimension}/{number}",
                    task=part,
                    video=f"{clip}.mp4",
                    media=None,
                    questions=(question,),
                    answer=answer,
                    candidates=tuple(_candidates(part, question)),
                    fields=fields,
                    groups={"dimension": (dimension,), "fine aspect": (about.get("type") or dimension,)},
                )
                findings = [*check_item({**fields, "video": item.video}, where), *_check(item, where)]
                yield media.entry(item, findings, Search(stems=[clip]))

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return the request: the question, which contains its options, and the suffix of its format."""
        suffix = SUFFIXES.get(item.task, SUFFIXES[MULTI_CHOICE])
        return open_requests(replace(item, questions=(item.questions[0] + suffix,)), system)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return `correct` and `parsed`; for a caption instead the multiple-choice question for the judge."""
        if item.task == CAPTIONING:
            return {key: item.fields[key] for key in ("mc_question", "mc_answer")}
        said = predictions[0].replace("</s>", "").strip()
        found = {"official": official_match(item, said), "strict": strict_match(item, said)}
        return {
            "correct": {rule: bool(right) for rule, right in found.items()},
            "parsed": {rule: right is not None for rule, right in found.items()},
        }

    def needs_judge(self, item: Item) -> bool:
        """Return True for a caption."""
        return item.task == CAPTIONING

    def scored(self, records: Sequence[Record]) -> list[Record]:
        """Return all records except captions that no judge has scored yet."""
        return [line for line in records if line["task"] != CAPTIONING or "correct" in line]

    def official(self, items: Sequence[Item], records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the predictions of each task in the official scripts' format, without failed items."""
        parts: dict[str, dict[str, dict[str, list[Record]]]] = {item.task: {} for item in items}
        lines = {line["id"]: line for line in records if not line.get("error")}
        for item in items:
            if line := lines.get(item.id):
                _, clip, dimension, _ = item.id.split("/")
                row = {"question": item.questions[0], "answer": item.answer, "prediction": line["prediction"]}
                parts[item.task].setdefault(clip, {}).setdefault(dimension, []).append(row)
        return parts

    def notes(self, entries: Sequence[Entry], settings: EvaluationSettings) -> Iterator[str]:
        """Yield a note with the number of captions, which only a judge can score."""
        captions = sum(entry.item.task == CAPTIONING for entry in entries)
        if captions:
            yield f"captioning is not in these scores: `stllm judge tempcompass` decides its captions ({captions})"


benchmarks.register(TempCompass.name)(TempCompass())


def official_match(item: Item, said: str) -> bool | None:
    """Return whether a reply is correct by the official rules; None if they cannot interpret it.

    said: the model's reply.
    """
    answer = item.answer
    if item.task == MULTI_CHOICE:
        if said == answer:
            return True
        if said in tuple("ABCD") or (said[:1] in tuple("ABCD") and said[1:2] in (".", ")")):
            return said[0] == answer[0]
        return None
    if item.task == YES_NO:
        said = said.lower()
        return said.startswith(answer.lower()) if said.startswith(("yes", "no")) else None
    right = None
    for line, label, text in _options(item.questions[0]):
        marks = (label, label.split()[-1])
        after_bracket = said.split(") ")[1] if ") " in said else ""
        if said in (line, text, *marks) or after_bracket == text or said.replace(".", "") in marks:
            right = line == answer
    return right


def strict_match(item: Item, said: str) -> bool | None:
    """Return whether the option named in a reply is correct; None if it names none. Case and final "." are ignored."""
    if item.task == MULTI_CHOICE:
        number = chosen_option(said, item.candidates)
        return None if number is None else _options(item.questions[0])[number][0] == item.answer
    plain = said.strip(" ().").casefold()
    if item.task == YES_NO:
        word = re.match(r"(yes|no)\b", plain)
        return None if word is None else word[1] == item.answer.casefold()
    for line, label, text in _options(item.questions[0]):
        if plain in {name.strip(" .").casefold() for name in (line, label, text, label.split()[-1])}:
            return line == item.answer
    return None


def _options(question: str) -> list[tuple[str, str, str]]:
    """List the options in a question's text: (whole line, label such as "A" or "Option 1", text)."""
    found = map(_OPTION.fullmatch, question.split("\n")[1:])
    return [(option[0], option["label"], option["text"]) for option in found if option]


def _candidates(part: str, question: str) -> list[str]:
    if part == YES_NO:
        return ["yes", "no"]
    return [] if part == CAPTIONING else [text for _, _, text in _options(question)]


def _check(item: Item, where: str) -> Iterator[Fault]:
    """Yield a fault if the answer is not among the options, or if a caption has no multiple-choice question."""
    if item.task == CAPTIONING:
        if not all(text_of(item.fields[key]) for key in ("mc_question", "mc_answer")):
            sentence = "found no multi-choice question about the same clip and dimension, by which a caption is judged"
            yield Fault("incomplete", where, "question", f"{sentence}: take multi-choice.json of the same version")
        return
    options = ["yes", "no"] if item.task == YES_NO else [line for line, _, _ in _options(item.questions[0])]
    if item.answer and item.answer not in options:
        listed = ", ".join(map(repr, options)) or "none"
        yield Fault("candidates", where, "answer", f"{item.answer!r} is none of the options {listed}: correct either")


def _records(path: Path) -> Iterator[tuple[str, tuple[str, str, int], "dict[str, Any] | Fault"]]:
    """Yield (place in the file, (clip, dimension, number), fields) of every question; a Fault if it is malformed."""
    for clip, dimensions in read_mapping(path, EXPECTED).items():
        where = f"{path}, {clip}"
        unknown = [name for name in dimensions if name not in DIMENSIONS] if isinstance(dimensions, dict) else ["?"]
        if unknown:
            sentence = f"found {shortened(dimensions)}, expected {EXPECTED}, dimensions {', '.join(DIMENSIONS)}"
            yield where, (clip, "", 0), Fault("annotation", where, "record", sentence)
            continue
        for dimension, questions in dimensions.items():
            for number, fields in enumerate(questions if isinstance(questions, list) else [questions]):
                place = f"{where}, {dimension} {number + 1}"
                if not isinstance(fields, dict):
                    sentence = f"found {shortened(fields)}, expected {{question, answer}}"
                    yield place, (clip, dimension, number), Fault("annotation", place, "record", sentence)
                else:
                    yield place, (clip, dimension, number), dict(fields)
