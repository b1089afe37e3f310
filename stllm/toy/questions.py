"""How the toy world asks: a question with its answer and options, openly and as multiple choice.

The wording of a choice is MVBench's: its system sentence, its question block, the beginning of its answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stllm.processors.choices import ANSWER_BEGINS, REQUEST, SYSTEM, question_block
from stllm.processors.templates import Turn
from stllm.toy.scenes import Scene

T = TypeVar("T")
Generator = np.random.Generator

NUM_OPTIONS = 4  # of a choice among many


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the options in the order shown.

    only: 0 or 1 when a clip's first or second conversation alone may have it, since one answer would tell another.
    """

    question: str
    answer: str
    options: tuple[str, ...]
    only: int | None = None

    def openly(self) -> Turn:
        """Without options."""
        return Turn(self.question, self.answer)

    def as_choice(self) -> Turn:
        """With its options, as MVBench asks, to the newlines: a small model takes other ones for another question."""
        letter = chr(ord("A") + self.options.index(self.answer))
        return Turn(
            f"{question_block(self.question, self.options)}\n{REQUEST}\n",
            f"{ANSWER_BEGINS}{letter}) {self.answer}",
            f"{SYSTEM}\n",
        )


@dataclass(frozen=True)
class Example:
    """One clip or picture, what is asked about it, and answered.

    asked: questions with options, no fact twice; a test asks the first one. told: turns without options, after them.
    story: what is seen, in words.
    length: of the clip, in clips of the usual length. bounds: which part of it is meant, from 0 to 1.
    """

    scene: Scene
    story: str
    asked: tuple[Asked, ...] = ()
    told: tuple[Turn, ...] = ()
    length: float = 1.0
    bounds: tuple[float, float] | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Every question openly and as multiple choice, then what is told."""
        both = (turn for asked in self.asked for turn in (asked.openly(), asked.as_choice()))
        return (*both, *self.told)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The first question's options; none where answers are free."""
        return self.asked[0].options if self.asked else ()

    def conversations(self, generator: Generator) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """Two conversations in which no answer tells a later one: what one asks openly, the other asks as a choice."""
        ordered = shuffled(generator, self.asked)
        ways = [shuffled(generator, (asked.openly(), asked.as_choice())) for asked in ordered]
        first, second = (
            tuple(way[number] for asked, way in zip(ordered, ways, strict=True) if asked.only in (None, number))
            for number in (0, 1)
        )
        return (*first, *self.told), (*second, *self.told)

    def open_conversations(self, generator: Generator) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """The same without options; both are alike unless an answer would tell another."""
        ordered = shuffled(generator, self.asked)
        first, second = (
            tuple(asked.openly() for asked in ordered if asked.only in (None, number)) for number in (0, 1)
        )
        return (*first, *self.told), (*second, *self.told)


def ask(
    generator: Generator, question: str, answer: str, candidates: Iterable[str], *, only: int | None = None
) -> Asked:
    """A question with its options shuffled."""
    return Asked(question, answer, tuple(shuffled(generator, candidates)), only)


def ask_among(generator: Generator, question: str, answer: str, candidates: Iterable[str]) -> Asked:
    """A question with some of the wrong options, `NUM_OPTIONS` in all."""
    wrong = shuffled(generator, [candidate for candidate in candidates if candidate != answer])
    return ask(generator, question, answer, [answer, *wrong[: NUM_OPTIONS - 1]])


def ask_whether(generator: Generator, question: str, answer: bool) -> Asked:
    """A question whose answer is yes or no."""
    return ask(generator, question, "yes" if answer else "no", ("yes", "no"))


def pick(generator: Generator, choices: Iterable[T]) -> T:
    """One of them, each as likely."""
    listed = list(choices)
    return listed[int(generator.integers(len(listed)))]


def shuffled(generator: Generator, choices: Iterable[T]) -> list[T]:
    """All of them in any order."""
    listed = list(choices)
    return [listed[number] for number in generator.permutation(len(listed))]
