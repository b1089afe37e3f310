"""A small benchmark of multiple choice without files, and answerers that need no model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Media, Request
from stllm.datasets.faults import Fault
from stllm.evaluation.benchmarks.base import Benchmark, Entry, Item, Loaded, Record
from stllm.evaluation.benchmarks.mvbench import MVBench
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


def choice_benchmark(items: Sequence[Item], excluded: Mapping[str, str] | None = None, num_excluded: int = 0) -> Loaded:
    """MVBench of those items."""
    return Loaded(MVBench(), items, excluded or {}, num_excluded)


def lines_of(loaded: Loaded, answer: Callable[[Item], str | None]) -> list[Record]:
    """A line an item, as the engine gives it. answer: the model's text; None for a video that cannot be read."""
    lines = []
    for item in loaded.items:
        text = answer(item)
        head: Record = {"id": item.id, "task": item.task, "video": item.video, "answer": item.answer}
        head |= {"candidates": list(item.candidates)} if item.candidates else {}
        if text is None:
            lines.append({**head, "prediction": None, "error": f"/videos/{item.video}: the file is cut short"})
        else:
            lines.append({**head, "error": None, **loaded.benchmark.score(item, [text])})
    return lines


def letter_of(item: Item, text: str) -> str:
    """What a model says that chooses this option."""
    return f"{ascii_uppercase[item.candidates.index(text)]}) {text}"


class Asking(Benchmark):
    """A benchmark that asks its items plainly."""

    name, title, ground_truth = "asking", "Asking", "nothing"

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Is never read."""
        raise NotImplementedError

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """The questions as they are."""
        return tuple(Request((Turn(question),), media=item.media) for question in item.questions)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Whether the first reply is the answer."""
        return {"right": predictions[0] == item.answer}


def asking(items: Sequence[Item]) -> Loaded:
    """A benchmark of those items."""
    return Loaded(Asking(), items)


class Judged(Asking):
    """A benchmark that a judge decides."""

    judged = True

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """The predictions alone."""
        return {"prediction": predictions[0] if len(predictions) == 1 else list(predictions)}


def judged_benchmark(items: Sequence[Item], name: str = "vcgbench") -> Loaded:
    """A benchmark of those items that a judge decides."""
    return Loaded(Judged(name), items)
