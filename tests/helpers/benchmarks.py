"""A small benchmark of multiple choice without files, and answerers that need no model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from stllm.conversation.requests import Media, Request
from stllm.evaluation.items import Benchmark, Item, Record
from stllm.evaluation.mvbench import MVBench
from stllm.processors.templates import PromptTemplate, Turn

OPTIONS = ("up", "down", "left", "right")


def choice_item(number: int, task: str = "Moving Direction", options: Sequence[str] = OPTIONS) -> Item:
    """An item whose answer goes through its options with the number."""
    return Item(
        id=f"{task.lower().replace(' ', '_')}/{number}",
        task=task,
        video=f"{number}.mp4",
        media=Media(f"/videos/{number}.mp4", num_frames=4),
        questions=("Where does it go?",),
        answer=options[number % len(options)],
        candidates=tuple(options),
    )


def choice_benchmark(
    items: Sequence[Item], excluded: Mapping[str, str] | None = None, num_excluded: int = 0
) -> MVBench:
    """MVBench of those items."""
    return MVBench(items=items, excluded=excluded or {}, num_excluded=num_excluded)


def lines_of(benchmark: Benchmark, answer: Callable[[Item], str | None]) -> list[Record]:
    """A line an item, as the engine gives it. answer: the model's text; None for a video that cannot be read."""
    lines = []
    for item in benchmark.items:
        text = answer(item)
        head: Record = {"id": item.id, "task": item.task, "video": item.video, "answer": item.answer}
        head |= {"candidates": list(item.candidates)} if item.candidates else {}
        if text is None:
            lines.append({**head, "prediction": None, "error": f"/videos/{item.video}: the file is cut short"})
        else:
            lines.append({**head, "error": None, **benchmark.fields(item, [text])})
    return lines


def letter_of(item: Item, text: str) -> str:
    """What a model says that chooses this option."""
    return f"{ascii_uppercase[item.candidates.index(text)]}) {text}"


class Asking:
    """A benchmark that asks its items plainly. items: given."""

    name = "asking"
    excluded: Mapping[str, str] = {}
    num_excluded = 0
    notes: Sequence[str] = ()

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """The questions as they are."""
        return tuple(Request((Turn(question),), media=item.media) for question in item.questions)

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """Whether the first reply is the answer."""
        return {"right": predictions[0] == item.answer}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """None."""
        return {}

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """None."""
        return {}


@dataclass(frozen=True)
class OpenBenchmark:
    """A benchmark that a judge decides."""

    items: Sequence[Item]
    name: str = "vcgbench"
    excluded: Mapping[str, str] = field(default_factory=dict)
    num_excluded: int = 0
    notes: Sequence[str] = ()

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """Is never asked."""
        raise NotImplementedError

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """The predictions alone."""
        return {"prediction": predictions[0] if len(predictions) == 1 else list(predictions)}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """A judge's affair."""
        return {}

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """None is looked at."""
        return {}
