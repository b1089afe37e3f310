"""What a benchmark is to the engine: items to be asked, and what becomes of their answers.

ground truth -> items -> requests (prompts as published) -> engine -> records, one a line -> scores and official files
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stllm.conversation.requests import Media, Request
from stllm.processors.templates import PromptTemplate

Record = dict[str, Any]  # a line of `<name>.jsonl`


@dataclass(frozen=True)
class Item:
    """One thing that is asked, and the gold answer.

    id: unique in the benchmark and the same in every run. task: a task or part of the benchmark, "" where it has none.
    video: as the ground truth names it. media: where it lies and the part that is meant; None when there is none, and
        `error` says why in a sentence.
    questions: one; two where consistency is asked. candidates: the options, in order, of a multiple choice.
    fields: the record as the ground truth has it, extra keys kept.
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


class Benchmark(Protocol):
    """A benchmark with its ground truth read; built by its registered factory from `EvaluationSettings`.

    excluded: tasks that cannot be asked as a whole (their media are not there) and why; no item of theirs is in `items`
        but `num_excluded` counts them.
    notes: what else the results should mention, such as media that were not found in the official folders.
    """

    @property
    def name(self) -> str: ...

    @property
    def items(self) -> Sequence[Item]: ...

    @property
    def excluded(self) -> Mapping[str, str]: ...

    @property
    def num_excluded(self) -> int: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """What the model is asked, one request a question; prompts as published for this family of weights."""

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """What joins the item's line: the official fields, and `correct` where no judge is needed."""

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """`scores` of the results file from all lines, failed ones (`error`) among them; {} where a judge decides."""

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """JSON contents in the official scripts' layout: {"": ...} for `<name>.json`, {"generic": ...} for
        `<name>.generic.json`."""
