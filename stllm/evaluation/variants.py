"""The same benchmark asked in another way: its clips under another view, or its options in another order.

A variant is a benchmark itself, with the same ids, so the engine and its lines know nothing of variants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stllm.conversation.requests import Request
from stllm.evaluation.items import Benchmark, Item, Record
from stllm.processors.templates import PromptTemplate


class Variant:
    """A benchmark whose items were changed; everything else is the original's. items: with the original's ids."""

    def __init__(self, benchmark: Benchmark, items: Sequence[Item]) -> None:
        self.name = benchmark.name
        self.items = items
        self.excluded = benchmark.excluded
        self.num_excluded = benchmark.num_excluded
        self.notes = benchmark.notes
        self._original = benchmark

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """The original's prompts, of the changed item."""
        return self._original.requests(item, template)

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """The original's fields, of the changed item."""
        return self._original.fields(item, predictions)

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """The original's scores."""
        return self._original.scores(records)

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """The original's official files."""
        return self._original.official(records)


def viewed(benchmark: Benchmark, view: str) -> Variant:
    """Every clip under that view (media/views.py). Raises UserError for an unknown one."""
    items = [
        item if item.media is None else replace(item, media=replace(item.media, view=view)) for item in benchmark.items
    ]
    return Variant(benchmark, items)


def rotated(benchmark: Benchmark, places: int) -> Variant:
    """Options moved up by so many places, 1 or more, the first ones to the end.

    Only items with more options than places: with the benchmark itself, an item is asked once for each of its options,
    and each option stands at each letter once.
    """
    items = [
        replace(item, candidates=(*item.candidates[places:], *item.candidates[:places]))
        for item in benchmark.items
        if len(item.candidates) > places
    ]
    return Variant(benchmark, items)


def num_rotations(benchmark: Benchmark) -> int:
    """Of the item with the most options; 0 without any."""
    return max((len(item.candidates) for item in benchmark.items), default=0)
