"""VcgBench, Video-ChatGPT's benchmark: generic, temporal and consistency questions, answered freely.

Source: arXiv 2306.05424. A judge scores the predictions (`stllm judge`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import Fields, text_of
from stllm.doctor.checks import Fault, check_vcgbench
from stllm.doctor.sources import records_of
from stllm.evaluation.ground_truth import (
    Entry,
    MediaFolders,
    Search,
    check_any_found,
    chosen_tasks,
    entries_of,
    open_requests,
    system_of,
)
from stllm.evaluation.items import Item, Record
from stllm.processors.templates import PromptTemplate

CONSISTENCY = "consistency"
QUESTIONS = {"generic": ("Q",), "temporal": ("Q",), CONSISTENCY: ("Q1", "Q2")}  # the fields of each part
EXPECTED = "generic_qa.json, temporal_qa.json or consistency_qa.json"


@dataclass(frozen=True)
class VcgBench:
    """The benchmark, read: the parts that are there. See `items.Benchmark`. system: as in `Request`."""

    items: Sequence[Item]
    system: str | None
    excluded: Mapping[str, str] = field(default_factory=dict)
    num_excluded: int = 0
    notes: Sequence[str] = ()
    name: str = field(default="vcgbench", init=False)

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """One a question; the two of consistency know nothing of each other."""
        return open_requests(item, self.system)

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """`pred`, or `pred1` and `pred2`, beside the questions and the answer as the ground truth spells them."""
        return {**_truth(item), **_predicted(item, predictions)}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """None: a judge decides."""
        return {}

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """The list that the official judge scripts read; one a part where there are several. Items that failed are left
        out: a judge would score them."""
        lines = {line["id"]: line for line in records if not line.get("error")}
        parts: dict[str, list[Record]] = {item.task: [] for item in self.items}
        for item in self.items:
            if item.id in lines:
                keys = _predicted(item, [""] * len(item.questions))
                parts[item.task].append({**item.fields, **{key: lines[item.id][key] for key in keys}})
        return parts if len(parts) > 1 else {"": next(iter(parts.values()))}


@benchmarks.register("vcgbench")
def vcgbench(settings: EvaluationSettings) -> VcgBench:
    """Reads the ground truth, a folder with its files or one of them, and looks for the videos. Raises UserError."""
    items = [entry.item for entry in entries_of(vcgbench_entries(settings))]
    check_any_found(items, settings.anno_path or "")
    asked = [[item for item in items if item.task == part][: settings.limit] for part in QUESTIONS]
    return VcgBench(items=[item for part in asked for item in part], system=system_of(settings))


def vcgbench_entries(settings: EvaluationSettings) -> Iterator[Entry | Fault]:
    """Every record of the chosen parts, and the faults that concern whole files. Raises UserError."""
    if settings.anno_path is None:
        raise UserError(f"vcgbench: no ground truth was named: give {EXPECTED}, or the folder that holds them")
    files = _parts(user_path(settings.anno_path))
    media = MediaFolders(settings.video_dir, settings)
    for part in chosen_tasks(list(files), settings):
        for number, (where, fields) in enumerate(records_of(files[part], "vcgbench")):
            if isinstance(fields, Fault):
                yield fields
                continue
            if tuple(key for key in QUESTIONS[part] if key in fields) != QUESTIONS[part]:
                expected = f"expected {' and '.join(QUESTIONS[part])} in a file of {part} questions"
                yield Fault("incomplete", where, "record", f"found the fields {', '.join(fields)}, {expected}")
            yield _entry(part, number, where, fields, media)


def _parts(path: Path) -> dict[str, Path]:
    """The file of each part that is there. Raises UserError."""
    if not path.is_dir():
        return {_part_of(path): path}
    endings = (".json", ".jsonl", "_qa.jsonl", "_qa.json")  # the last one is the official name, which goes first
    named = [(part, path / f"{part}{ending}") for part in QUESTIONS for ending in endings]
    files = {part: file for part, file in named if file.is_file()}
    if not files:
        raise UserError(f"{path}: found none of VcgBench's files, expected {EXPECTED}: name the folder that holds them")
    return files


def _part_of(file: Path) -> str:
    """The part that the file's name contains, or that its first record's fields show."""
    _, fields = next(records_of(file, "vcgbench"))
    consistency = CONSISTENCY if isinstance(fields, dict) and "Q1" in fields else None
    return next((part for part in QUESTIONS if part in file.name.lower()), consistency or "generic")


def _entry(part: str, number: int, where: str, fields: Fields, media: MediaFolders) -> Entry:
    item = Item(
        id=f"{part}/{number}",
        task=part,
        video=text_of(fields.get("video_name")) or "",
        media=None,
        questions=tuple(text_of(fields.get(key)) or "" for key in QUESTIONS[part]),
        answer=text_of(fields.get("A")) or "",
        fields=fields,
    )
    asked = tuple(key for key in QUESTIONS[part] if key in fields)
    return media.entry(item, check_vcgbench(fields, where, asked), Search(stems=[item.video]))


def _truth(item: Item) -> Record:
    keys = (*QUESTIONS[item.task], "A", "video_name")
    return {key: item.fields[key] for key in keys}


def _predicted(item: Item, predictions: Sequence[str]) -> Record:
    if item.task != CONSISTENCY:
        return {"pred": predictions[0]}
    return {"pred1": predictions[0], "pred2": predictions[1]}
