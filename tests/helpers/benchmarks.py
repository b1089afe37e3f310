"""A small multiple-choice benchmark without files, and replacements for a model."""

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
    """Return an item. Its number determines which option is the answer."""
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
    """Return an MVBench with these items."""
    return Loaded(MVBench(), items, excluded or {}, num_excluded)


def lines_of(loaded: Loaded, answer: Callable[[Item], str | None]) -> list[Record]:
    """Return a line for each item, as the evaluation writes it. answer: the model's text; None: unreadable video."""
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
    """Return the text of a model that chooses this option."""
    return f"{ascii_uppercase[item.candidates.index(text)]}) {text}"


class Asking(Benchmark):
    """A benchmark that asks the questions of its items unchanged."""

    name, title, ground_truth = "asking", "Asking", "nothing"

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Not used."""
        raise NotImplementedError

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return the questions unchanged."""
        return tuple(Request((Turn(question),), media=item.media) for question in item.questions)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Check whether the first reply equals the answer."""
        return {"right": predictions[0] == item.answer}


def asking(items: Sequence[Item]) -> Loaded:
    """Return an `Asking` benchmark of these items."""
    return Loaded(Asking(), items)


class Judged(Asking):
    """A benchmark that a judge scores."""

    judged = True

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return only the predictions."""
        return {"prediction": predictions[0] if len(predictions) == 1 else list(predictions)}


def judged_benchmark(items: Sequence[Item], name: str = "vcgbench") -> Loaded:
    """Return a `Judged` benchmark of these items."""
    return Loaded(Judged(name), items)
