"""Base class of benchmarks. A benchmark has three methods: load, ask and score.

ground truth -> load -> items -> ask -> requests (published prompts) -> model -> predictions -> score -> records

All other code is shared: limits, excluded tasks, batches, several processes, resuming, result files, tables and charts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Media, Request
from stllm.datasets.faults import Fault, Medium
from stllm.evaluation.scores import ITEMS, Record, accuracies
from stllm.processors.templates import PromptTemplate


@dataclass(frozen=True)
class Item:
    """One question about a medium and its correct answer. (In VcgBench's task consistency, an item has two questions.)

    id: unique in the benchmark and the same in every run. task: task or part of the benchmark; "" if it has none.
    video: the medium's name in the ground truth. media: the medium's path, part and frames; None if the item cannot be
        asked, and then `error` gives the reason in a sentence.
    candidates: the options of a multiple-choice question, in order.
    fields: the record as in the ground truth, with its extra keys. groups: further categories by which results are
        reported, kind -> names, such as {"dimension": ("speed",)}.
    """

    id: str
    task: str
    video: str
    media: Media | None
    questions: tuple[str, ...]
    answer: str
    candidates: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An item with the findings of reading its record and searching for its medium (`MediaFolders.entry`).

    item: its `error` is the first fault that prevents asking it. medium: the medium named in the record, None if there
    is no name. place: the medium's path, or its expected path. folder: the searched folder that has it, None if it is
    missing. faults: all faults except a missing medium.
    """

    item: Item
    medium: Medium | None = None
    place: str = ""
    folder: str | None = None
    faults: tuple[Fault, ...] = ()


class Benchmark(ABC):
    """A benchmark. One object is used for every run, so it keeps no state.

    name: the name for `stllm evaluate`. title: the name in tables. ground_truth: description of the file or folder for
    --anno-path.
    excludes_tasks: a task without any medium is left out of all scores instead of being counted as failed.
    judged: `stllm judge` scores the predictions, so records have no `correct` and a run has no scores.
    finds_media: the media are found relative to the ground truth; if False, --video-dir must name their folder.
    rotates: options are a list that `--permute` can rotate; if False, they are part of the question's text.
    mean_over: ITEMS if the average is the mean over all items, TASKS if it is the mean of the tasks' scores, or the
    name of the task whose score is the average.
    rules: sentences for the report that explain how the official and the strict rule decide.
    """

    name: str
    title: str
    ground_truth: str
    excludes_tasks = False
    finds_media = False
    judged = False
    rotates = True
    mean_over = ITEMS
    rules = ""

    @abstractmethod
    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Read the ground truth, search for its media, and yield an entry per record, and faults of whole files.

        `stllm evaluate` stops at the first fault of a file, `stllm doctor` lists all. path: the value of --anno-path.
        settings: `tasks` is applied here, `limit` by the caller. Raises UserError.
        """

    @abstractmethod
    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return one request per question, with the prompt published for the template's model family.

        system: the system message; None for the published one, "" for none.
        """

    @abstractmethod
    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return fields to add to the item's record: official ones, and `correct` unless a judge decides.

        predictions: the model's text for each question. `correct` has the form {"strict": bool, "official": bool}.
        `parsed` has this form, too: whether the rule could interpret the text. A rule that interprets every text is
        left out of it.
        """

    def needs_judge(self, item: Item) -> bool:
        """Check whether a judge must score the item. Then it has no `correct`, and diagnostics leave it out."""
        return self.judged

    def scored(self, records: Sequence[Record]) -> list[Record]:
        """Return the records from which scores are computed. A benchmark may merge several records into one.

        records: all records, including failed ones (with `error`)."""
        return list(records)

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the scores for the results file, table and chart, in the form of `accuracies`; {} if a judge decides.

        records: as in `scored`."""
        return {} if self.judged else accuracies(self.scored(records), self.mean_over)

    def official(self, items: Sequence[Item], records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the contents of the result files in the official scripts' format. By default there are none.

        Each key becomes part of a file's name: the content under "generic" is written to `<name>.generic.json`, the
        content under "" to `<name>.json`.
        """
        return {}

    def notes(self, entries: Sequence[Entry], settings: EvaluationSettings) -> Iterator[str]:
        """Yield sentences for the results file, such as about media found outside the official folders."""
        yield from ()


@dataclass(frozen=True)
class Loaded:
    """A benchmark with the items that were read from its ground truth, or changed for a diagnostic (evaluation/probes).

    excluded: tasks of which no item can be asked -> the reason. Their items are not in `items`; `num_excluded` is their
    number. system: see `Benchmark.ask`.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    excluded: Mapping[str, str] = field(default_factory=dict)
    num_excluded: int = 0
    notes: Sequence[str] = ()
    system: str | None = None

    @property
    def name(self) -> str:
        """Return the benchmark's name."""
        return self.benchmark.name

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """Return one request per question of the item, with the configured system message."""
        return self.benchmark.ask(item, template, self.system)


def load_benchmark(name: str, settings: EvaluationSettings) -> Loaded:
    """Read the ground truth of a registered benchmark.

    Raises UserError for a fault that concerns a whole file, and if no item's medium is found.
    """
    benchmark: Benchmark = benchmarks.get(name)
    entries: list[Entry] = []
    tasks: dict[str, list[Item]] = {}
    for found in read_entries(benchmark, settings):
        if isinstance(found, Entry):
            entries.append(found)
            tasks.setdefault(found.item.task, []).append(found.item)
        elif not found.note:
            raise UserError(found.in_words)
    items: list[Item] = []
    excluded: dict[str, str] = {}
    num_excluded = 0
    for task, of_task in tasks.items():
        asked = of_task[: settings.limit]
        if benchmark.excludes_tasks and not any(item.media for item in of_task):
            excluded[task] = _no_media(of_task)
            num_excluded += len(asked)
        else:
            items += asked
    if not any(entry.item.media for entry in entries):  # the media folder is most likely wrong
        raise UserError(f"{settings.anno_path}: {_no_media([entry.item for entry in entries])}")
    notes = tuple(benchmark.notes(entries, settings))
    return Loaded(benchmark, items, excluded, num_excluded, notes, system_of(settings))


def _no_media(items: Sequence[Item]) -> str:
    return f"none of its {len(items)} items can be asked, the first one because: {items[0].error}"


def system_of(settings: EvaluationSettings) -> str | None:
    """Return the configured system message for `Benchmark.ask`: None for the published one, "" for none."""
    return None if settings.system == "template" else str(settings.system or "")  # None: an empty value in a YAML


def read_entries(benchmark: Benchmark, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
    """Yield the results of `Benchmark.load`. Raises UserError if no ground truth is configured."""
    if settings.anno_path is None:
        raise UserError(f"{benchmark.name}: no ground truth was named: give {benchmark.ground_truth}")
    yield from benchmark.load(user_path(settings.anno_path), settings)
