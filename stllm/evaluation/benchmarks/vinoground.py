"""Vinoground: pairs of clips and captions that differ only in the order of events. Source: arXiv 2410.02763.

Files: vinoground_textscore.json, vinoground_videoscore.json, vinoground.csv, and the clips that they name.

A group is two clips with their two captions. It has four questions: two for the text score and two for the video score.
For the text score, a question shows one clip and asks which caption fits it. For the video score, a question shows both
clips, one after the other in one file, and asks which of them fits a caption. Text and video score are the shares of
groups with both answers correct. The group score is the share of groups with all four answers correct.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stllm.common.errors import UserError
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import read_file, text_of
from stllm.datasets.faults import Fault, check_item, records_of, shortened
from stllm.evaluation.benchmarks.base import Benchmark, Entry, Item, Record
from stllm.evaluation.benchmarks.ground_truth import (
    MediaFolders,
    Search,
    chosen_tasks,
    find_file,
    find_files,
    open_requests,
)
from stllm.evaluation.scores import RULES, chosen_option
from stllm.processors.templates import PromptTemplate

TEXT, VIDEO, GROUP = "text", "video", "group"
FILES = {TEXT: "vinoground_textscore.json", VIDEO: "vinoground_videoscore.json"}
CATEGORIES = "vinoground.csv"
PLACES = ("", "vinoground_videos", "vinoground_videos_concated")  # folders that the release's archives create
SUFFIX = "\nPlease only output one English character."
EXPECTED = "Vinoground's list of {idx, video_name, question, GT}"
LETTERS = ("A", "B")


class Vinoground(Benchmark):
    """The benchmark Vinoground. Its tasks are the text score and the video score; its average is the group score."""

    name, title = "vinoground", "Vinoground"
    ground_truth = f"the folder that holds {' and '.join(FILES.values())}"
    finds_media = True
    rotates = False
    mean_over = GROUP
    rules = (
        "By the official rule an answer is right if it begins with the letter, in upper or lower case. The strict "
        "rule accepts the letter alone, in a bracket, or before a punctuation mark. A pair is right if both of its "
        "questions are, a group if both of its pairs are. The average is the group score."
    )

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Read the configured tasks and the table of categories. path: the benchmark's folder, or a task's file."""
        files = find_files(path, self.title, FILES, PLACES)
        categories = _categories(find_file(path, CATEGORIES, PLACES))
        media = MediaFolders(settings.video_dir or (path if path.is_dir() else path.parent), settings)
        for part in chosen_tasks(list(files), settings):
            records: dict[str, tuple[str, Item]] = {}
            for where, fields in records_of(files[part], EXPECTED, ("GT",)):
                if isinstance(fields, Fault):
                    yield fields
                    continue
                idx = text_of(fields.get("idx")) or ""
                if not re.fullmatch(r"\d+_(pos|neg)", idx):
                    sentence = f"found the idx {shortened(fields.get('idx'))}, expected N_pos or N_neg: {EXPECTED}"
                    yield Fault("annotation", where, "record", sentence)
                    continue
                if idx in records:
                    sentence = f"the idx {idx} is also that of {records[idx][0]}: keep one"
                    yield Fault("duplicate id", where, "record", sentence)
                    continue
                number = idx.split("_")[0]
                item = Item(
                    id=f"{part}/{idx}",
                    task=part,
                    video=text_of(fields.get("video_name")) or "",
                    media=None,
                    questions=(text_of(fields.get("question")) or "",),
                    answer=text_of(fields.get("GT")) or "",
                    candidates=LETTERS,
                    fields=fields,
                    groups=categories.get(number, {}),
                )
                records[idx] = where, item
            for idx, (where, item) in sorted(records.items(), key=lambda pair: int(pair[0].split("_")[0])):
                findings = list(check_item(dict(item.fields), where, answer="GT", media=("video_name",)))
                if item.answer and item.answer not in LETTERS:
                    sentence = f"found {item.answer!r}, expected {' or '.join(LETTERS)}: correct it"
                    findings.insert(0, Fault("candidates", where, "GT", sentence))
                other = idx[:-3] + ("neg" if idx.endswith("pos") else "pos")
                if other not in records:
                    sentence = f"the other half of its pair, {other}, is missing: add it, or leave both out"
                    findings.insert(0, Fault("incomplete", where, idx, sentence))
                yield media.entry(item, findings, Search())

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return the request: the question, which contains its options, and a sentence that asks for a letter."""
        return open_requests(replace(item, questions=(item.questions[0] + SUFFIX,)), system)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return `correct` and `parsed` of one question; `scored` combines questions into pairs."""
        said = predictions[0].strip()
        number = chosen_option(said, LETTERS)
        correct = {
            "official": said[: len(item.answer)].lower() == item.answer.lower(),
            "strict": number is not None and LETTERS[number] == item.answer,
        }
        return {"correct": correct, "parsed": {"strict": number is not None}}

    def scored(self, records: Sequence[Record]) -> list[Record]:
        """Return one record per pair and per group, except those of which `--limit` left out a question."""
        questions: dict[tuple[str, str], list[Record]] = {}
        for line in records:
            number = line["id"].split("/")[1].split("_")[0]
            questions.setdefault((line["task"], number), []).append(line)
            questions.setdefault((GROUP, number), []).append(line)
        order, lines = (TEXT, VIDEO, GROUP), []
        for (task, number), asked in sorted(questions.items(), key=lambda pair: order.index(pair[0][0])):
            error = next((line["error"] for line in asked if line.get("error")), None)
            if error is None and len(asked) < (4 if task == GROUP else 2):
                continue
            line = {"id": f"{task}/{number}", "task": task, "video": number}
            line["groups"] = {f"{kind}, {task}": names for kind, names in asked[0].get("groups", {}).items()}
            line |= {"question": [one["question"] for one in asked], "answer": [one["answer"] for one in asked]}
            line |= {"prediction": [one["prediction"] for one in asked], "error": error}
            if error is None:
                line["correct"] = {rule: all(one["correct"][rule] for one in asked) for rule in RULES}
                line["parsed"] = {"strict": all(one["parsed"]["strict"] for one in asked)}
            lines.append(line)
        return lines


benchmarks.register(Vinoground.name)(Vinoground())


def _categories(path: Path | None) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return pair number -> {"major": ..., "minor": ...} categories; {} if path is None.

    Raises UserError for a table with other columns.
    """
    if path is None:
        return {}
    rows = list(csv.DictReader(io.StringIO(read_file(path, "Vinoground's table of categories")[1])))
    if rows and not {"index", "major", "minor"} <= rows[0].keys():
        raise UserError(f"{path}: found the columns {', '.join(rows[0])}, expected index, major, minor")
    return {
        row["index"].split("_")[0]: {
            kind: tuple(filter(None, ((row[kind] or "").split(";")))) for kind in ("major", "minor") if row[kind]
        }
        for row in rows
    }
