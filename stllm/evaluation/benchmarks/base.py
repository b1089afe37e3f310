"""A benchmark is a class with three methods: load, ask and score.

ground truth -> load -> items -> ask -> requests (prompts as published) -> engine -> predictions -> score -> lines

Everything else is shared: limits, excluded tasks, batches, several processes, continuing, lines, tables and charts.
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
    """One question about a medium, or two, and the gold answer.

    id: unique in the benchmark and the same in every run. task: a task or part of the benchmark, "" where it has none.
    video: as the ground truth names it. media: where it is, with the part to use; None if it cannot be asked about, and
        then `error` says why in a sentence.
    questions: one; two where consistency is asked. candidates: the options, in order, of a multiple choice.
    fields: the record as in the ground truth, with extra keys. groups: what else it is reported by, kind -> names, such
        as {"dimension": ("speed",)}.
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
    """A record of a ground truth as it was read; see `ground_truth.MediaFolders.entry`.

    item: what is asked; its `error` is the first fault that prevents it. medium: what the record names, None if it
    names nothing. place: the path of that medium, or where it should be. folder: the searched folder in which it was
    found, None if it is missing. faults: all faults except a missing medium.
    """

    item: Item
    medium: Medium | None = None
    place: str = ""
    folder: str | None = None
    faults: tuple[Fault, ...] = ()


class Benchmark(ABC):
    """A benchmark before anything is read. One object serves every run, so it keeps no state.

    name: as `stllm evaluate` takes it. title: as its authors write it. ground_truth: what --anno-path names, in words.
    excludes_tasks: a task without any medium is left out of all scores instead of counted as failed.
    judged: the predictions are scored by `stllm judge`, so lines have no `correct` and a run has no scores.
    finds_media: the media are found relative to the ground truth; if False, --video-dir must name their folder.
    rotates: options are a list, which `--permute` rotates; False: questions hold them.
    mean_over: what the average is over: ITEMS, TASKS, or the name of the task whose score it is.
    rules: how the two rules decide, in sentences for the report.
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
        """Read the ground truth, look for its media, and yield one entry for each record, and faults of whole files.

        `stllm evaluate` stops at such a fault, `stllm doctor` lists all of them. path: what --anno-path names.
        settings: this method obeys `tasks`, but not `limit`. Raises UserError.
        """

    @abstractmethod
    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return one request for each question, with the prompt published for the template's family of weights.

        system: the sentence to use, None for the published one, "" for none.
        """

    @abstractmethod
    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return fields to add to the item's line: the official fields, and `correct` where no judge is needed.

        predictions: the model's text for each question. `correct`: {"strict": ..., "official": ...}, as bools.
        `parsed`, in the same form: whether the rule could read the text; a rule that reads every text is left out.
        """

    def needs_judge(self, item: Item) -> bool:
        """Return True where a judge decides about the item, so that it has no `correct` and probes leave it out."""
        return self.judged

    def scored(self, records: Sequence[Record]) -> list[Record]:
        """Return the lines that scores are computed of: these lines, or others in the same form, such as one a pair.

        records: all lines, including failed ones (with `error`)."""
        return list(records)

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return `scores` of the results file, which table and chart show: those of `accuracies`, or others in the same
        form; {} where a judge decides. records: as for `scored`."""
        return {} if self.judged else accuracies(self.scored(records), self.mean_over)

    def official(self, items: Sequence[Item], records: Sequence[Record]) -> Mapping[str, Any]:
        """Return files in the official scripts' layout: {"": ...} for `<name>.json`, {"generic": ...} for
        `<name>.generic.json`. By default there are none."""
        return {}

    def notes(self, entries: Sequence[Entry], settings: EvaluationSettings) -> Iterator[str]:
        """Yield notes for the results, such as media found outside the official folders."""
        yield from ()


@dataclass(frozen=True)
class Loaded:
    """A benchmark whose ground truth was read, or a variant of one with changed items (see evaluation/probes).

    excluded: tasks that cannot be asked as a whole, and why; none of their items is in `items`, but `num_excluded`
    counts them. system: see `Benchmark.ask`.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    excluded: Mapping[str, str] = field(default_factory=dict)
    num_excluded: int = 0
    notes: Sequence[str] = ()
    system: str | None = None

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return self.benchmark.name

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """Return the item's prompts, with the system sentence of the settings."""
        return self.benchmark.ask(item, template, self.system)


def load_benchmark(name: str, settings: EvaluationSettings) -> Loaded:
    """Read the ground truth of a registered benchmark.

    Raises UserError for a fault that concerns a whole file, and when no item has its medium.
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
    if not any(entry.item.media for entry in entries):  # the folder is most likely another one
        raise UserError(f"{settings.anno_path}: {_no_media([entry.item for entry in entries])}")
    notes = tuple(benchmark.notes(entries, settings))
    return Loaded(benchmark, items, excluded, num_excluded, notes, system_of(settings))


def _no_media(items: Sequence[Item]) -> str:
    return f"none of its {len(items)} items can be asked, the first one because: {items[0].error}"


def system_of(settings: EvaluationSettings) -> str | None:
    """The system sentence in the form that `Benchmark.ask` expects: None for the published one, "" for none."""
    return None if settings.system == "template" else str(settings.system or "")  # None: an empty value in a YAML


def read_entries(benchmark: Benchmark, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
    """Yield what `Benchmark.load` reads. Raises UserError when no ground truth is named."""
    if settings.anno_path is None:
        raise UserError(f"{benchmark.name}: no ground truth was named: give {benchmark.ground_truth}")
    yield from benchmark.load(user_path(settings.anno_path), settings)
