"""The toy world's training annotations, VideoChat2-IT's layout: one set of media, asked about in several ways.

train.json    a record a clip: every question openly, then as multiple choice; for single pairs (qa_sampling)
packed.json   for whole conversations (multi_turn): two records a clip, in which no answer tells a later one; what one
              asks openly, the other asks as multiple choice
open.json     the same without options: a third of the tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stllm.datasets.samples import keyed_numpy
from stllm.processors.templates import Turn
from stllm.toy.media import write_json
from stllm.toy.questions import Example
from stllm.toy.texts import PICTURE_REQUEST, STORY_REQUEST, follow_turn, seen_in_words, times_of

Fields = dict[str, Any]


@dataclass
class TrainingSet:
    """The records of one set. seed: of the order of questions."""

    seed: int
    train: list[Fields] = field(default_factory=list)
    packed: list[Fields] = field(default_factory=list)
    open: list[Fields] = field(default_factory=list)

    def add(self, example: Example, medium: Fields) -> None:
        """A clip or picture. medium: its file, and bounds."""
        talks = example.conversations(keyed_numpy(self.seed, len(self.train)))
        short = example.open_conversations(keyed_numpy(self.seed, len(self.train)))
        self.train.append(record(medium, example.turns))
        self.packed += [record(medium, _instructed_once(turns)) for turns in dict.fromkeys(talks)]
        self.open += [record(medium, turns) for turns in dict.fromkeys(short)]

    def write(self, folder: Path) -> None:
        """train.json, packed.json and open.json."""
        for name in ("train", "packed", "open"):
            write_json(folder / f"{name}.json", getattr(self, name))


@dataclass
class Tellings:
    """Everything in words, so that all of it is learned: stories and paths of clips, and what a picture shows."""

    stories: list[Fields] = field(default_factory=list)
    paths: list[Fields] = field(default_factory=list)
    pictures: list[Fields] = field(default_factory=list)

    def add_clip(self, example: Example, medium: Fields) -> None:
        """A clip."""
        self.stories.append(record(medium, [Turn(STORY_REQUEST, example.story)]))
        times = times_of(example)
        self.paths.append(record(medium, [follow_turn(thing, times) for thing in example.scene.things]))

    def add_picture(self, example: Example, medium: Fields) -> None:
        """A picture."""
        self.pictures.append(record(medium, [Turn(PICTURE_REQUEST, seen_in_words(example.scene))]))

    def write(self, root: Path) -> None:
        """video/caption/toy_story, video/caption/toy_path and image/caption/toy_seen."""
        write_json(root / "video" / "caption" / "toy_story" / "train.json", self.stories)
        write_json(root / "video" / "caption" / "toy_path" / "train.json", self.paths)
        write_json(root / "image" / "caption" / "toy_seen" / "train.json", self.pictures)


def record(medium: Fields, turns: Sequence[Turn]) -> Fields:
    """A record of VideoChat2-IT. medium: {} for text alone."""
    return {**medium, "QA": [{"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in turns]}


def _instructed_once(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """A long instruction stands before a conversation, not before each of its turns."""
    return turns[0], *(replace(turn, instruction="") if turn.question else turn for turn in turns[1:])
