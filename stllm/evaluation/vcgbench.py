"""VcgBench, Video-ChatGPT's benchmark: generic, temporal and consistency questions, answered freely.

Source: arXiv 2306.05424. A judge scores the predictions (`stllm judge`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.evaluation_section import EvaluationSettings
from stllm.common.registry import benchmarks
from stllm.conversation.requests import Request
from stllm.conversation.templates import PromptTemplate
from stllm.datasets.annotations import Fields, text_of
from stllm.datasets.doctor_checks import check_vcgbench
from stllm.evaluation.ground_truth import (
    MediaFolders,
    check_any_found,
    chosen_tasks,
    examined,
    open_requests,
    read_records,
    system_of,
)
from stllm.evaluation.items import Item, Record

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
    if settings.anno_path is None:
        raise UserError(f"vcgbench: no ground truth was named: give {EXPECTED}, or the folder that holds them")
    files = _parts(Path(settings.anno_path).expanduser())
    media = MediaFolders(settings.video_dir, settings)
    items, asked = [], []
    for part in chosen_tasks(list(files), settings):
        records = enumerate(read_records(files[part], "vcgbench"))
        of_part = [_item(part, number, where, fields, media) for number, (where, fields) in records]
        items += of_part
        asked += of_part[: settings.limit]
    check_any_found(items, settings.anno_path)
    return VcgBench(items=asked, system=system_of(settings))


def _parts(path: Path) -> dict[str, Path]:
    """The file of each part that is there. Raises UserError."""
    if not path.is_dir():
        return {_part_of(path): path}
    named = [(part, path / f"{part}{ending}") for part in QUESTIONS for ending in (".json", "_qa.json")]
    files = {part: file for part, file in named if file.is_file()}  # the official name, the last one, before the short
    if not files:
        raise UserError(f"{path}: found none of VcgBench's files, expected {EXPECTED}: name the folder that holds them")
    return files


def _part_of(file: Path) -> str:
    """The part whose name the file bears, or that its first record's fields show. Raises UserError."""
    fields = next(read_records(file, "vcgbench"))[1]
    consistency = CONSISTENCY if "Q1" in fields else None
    return next((part for part in QUESTIONS if part in file.name.lower()), consistency or "generic")


def _item(part: str, number: int, where: str, fields: Fields, media: MediaFolders) -> Item:
    medium, error = examined(check_vcgbench(fields, where))
    asked = tuple(key for key in QUESTIONS[part] if key in fields)
    if asked != QUESTIONS[part]:
        questions, names = " and ".join(QUESTIONS[part]), ", ".join(fields)
        raise UserError(f"{where}: found the fields {names}, expected {questions} in a file of {part} questions")
    found = None
    if not error and medium is not None:
        found = media.find(medium, stems=medium.stems)
        error = "" if found else media.missing(medium.name)
    return Item(
        id=f"{part}/{number}",
        task=part,
        video=text_of(fields.get("video_name")) or "",
        media=found,
        questions=tuple(text_of(fields[key]) or "" for key in asked),
        answer=text_of(fields.get("A")) or "",
        fields=fields,
        error=error,
    )


def _truth(item: Item) -> Record:
    keys = (*QUESTIONS[item.task], "A", "video_name")
    return {key: item.fields[key] for key in keys}


def _predicted(item: Item, predictions: Sequence[str]) -> Record:
    if item.task != CONSISTENCY:
        return {"pred": predictions[0]}
    return {"pred1": predictions[0], "pred2": predictions[1]}
