"""VcgBench, Video-ChatGPT's benchmark: generic, temporal and consistency questions with open-ended answers.

Source: arXiv 2306.05424. A judge scores the predictions (`stllm judge`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import text_of
from stllm.datasets.faults import Fault, check_item, records_of
from stllm.evaluation.benchmarks.base import Benchmark, Entry, Item, Record
from stllm.evaluation.benchmarks.ground_truth import MediaFolders, Search, chosen_tasks, open_requests
from stllm.processors.templates import PromptTemplate

CONSISTENCY = "consistency"
QUESTIONS = {"generic": ("Q",), "temporal": ("Q",), CONSISTENCY: ("Q1", "Q2")}  # task -> fields with its questions
FILES = "generic_qa.json, temporal_qa.json or consistency_qa.json"
EXPECTED = "a JSON list of {Q, A, video_name} or {Q1, Q2, A, video_name}"
OWN = ("Q", "Q1")  # fields that only this format has


class VcgBench(Benchmark):
    """The benchmark VcgBench. Its tasks are those whose files exist in the folder."""

    name, title = "vcgbench", "VcgBench"
    judged = True
    ground_truth = f"{FILES}, or the folder that holds them"

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Read the configured tasks. path: the folder of the benchmark's files, or one of the files."""
        files = _parts(path)
        media = MediaFolders(settings.video_dir, settings)
        for part in chosen_tasks(list(files), settings):
            keys = QUESTIONS[part]
            for number, (where, fields) in enumerate(records_of(files[part], EXPECTED, OWN)):
                if isinstance(fields, Fault):
                    yield fields
                    continue
                asked = tuple(key for key in keys if key in fields)
                if asked != keys:
                    expected = f"expected {' and '.join(keys)} in a file of {part} questions"
                    yield Fault("incomplete", where, "record", f"found the fields {', '.join(fields)}, {expected}")
                item = Item(
                    id=f"{part}/{number}",
                    task=part,
                    video=text_of(fields.get("video_name")) or "",
                    media=None,
                    questions=tuple(text_of(fields.get(key)) or "" for key in keys),
                    answer=text_of(fields.get("A")) or "",
                    fields=fields,
                )
                findings = check_item(fields, where, questions=asked, answer="A", media=("video_name",))
                yield media.entry(item, findings, Search(stems=[item.video]))

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return one request per question; the two questions of consistency are asked separately."""
        return open_requests(item, system)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return the prediction as `pred` (or `pred1` and `pred2`), with the ground truth's question and answer."""
        truth = {key: item.fields[key] for key in (*QUESTIONS[item.task], "A", "video_name")}
        return {**truth, **dict(zip(_keys(item), predictions, strict=True))}

    def official(self, items: Sequence[Item], records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the list for the official judge scripts, or one list per task if there are several.

        Failed items are left out, because a judge would score them."""
        lines = {line["id"]: line for line in records if not line.get("error")}
        parts: dict[str, list[Record]] = {item.task: [] for item in items}
        for item in items:
            if item.id in lines:
                parts[item.task].append({**item.fields, **{key: lines[item.id][key] for key in _keys(item)}})
        return parts if len(parts) > 1 else {"": next(iter(parts.values()))}


benchmarks.register(VcgBench.name)(VcgBench())


def _keys(item: Item) -> tuple[str, ...]:
    """Return the names that the official files give to the fields with an item's predictions."""
    return ("pred1", "pred2") if item.task == CONSISTENCY else ("pred",)


def _parts(path: Path) -> dict[str, Path]:
    """Return the file of each task that exists. Raises UserError."""
    if not path.is_dir():  # infer the task from the file's name or its first record
        _, fields = next(records_of(path, EXPECTED, OWN))
        usual = CONSISTENCY if isinstance(fields, dict) and "Q1" in fields else "generic"
        return {next((part for part in QUESTIONS if part in path.name.lower()), usual): path}
    endings = (".json", ".jsonl", "_qa.jsonl", "_qa.json")  # later ones have priority; the last is the official name
    named = [(part, path / f"{part}{ending}") for part in QUESTIONS for ending in endings]
    files = {part: file for part, file in named if file.is_file()}
    if not files:
        raise UserError(f"{path}: found none of VcgBench's files, expected {FILES}: name the folder that holds them")
    return files
