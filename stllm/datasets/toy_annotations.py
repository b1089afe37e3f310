"""The toy world's training annotations, VideoChat2-IT's layout: one set of media, asked about in several ways.

train.json    a record a clip: every question openly, then as multiple choice; for single pairs (qa_sampling)
packed.json   for whole conversations (multi_turn): two records a clip, in which no answer tells a later one; what one
              asks openly, the other asks as multiple choice
open.json     the same without options: a third of the tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stllm.conversation.templates import Turn
from stllm.datasets.samples import keyed_numpy
from stllm.datasets.toy_clips import NUM_LONG_FRAMES, World
from stllm.datasets.toy_media import write_json
from stllm.datasets.toy_questions import Example
from stllm.datasets.toy_texts import PICTURE_REQUEST, STORY_REQUEST, VIDEO_REQUEST, frames_in_words

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
        self.packed += [record(medium, turns) for turns in dict.fromkeys(talks)]
        self.open += [record(medium, turns) for turns in dict.fromkeys(short)]

    def write(self, folder: Path) -> None:
        """train.json, packed.json and open.json."""
        for name in ("train", "packed", "open"):
            write_json(folder / f"{name}.json", getattr(self, name))


@dataclass
class Tellings:
    """Everything in words, so that all of a clip is learned: what happens, and what each of some frames shows."""

    stories: list[Fields] = field(default_factory=list)
    frames: list[Fields] = field(default_factory=list)
    pictures: list[Fields] = field(default_factory=list)

    def add_clip(self, world: World, example: Example, medium: Fields) -> None:
        """A clip; of long ones, whose events are too short for a few frames, the story alone."""
        self.stories.append(record(medium, [Turn(STORY_REQUEST, example.story)]))
        if world.length(example) < NUM_LONG_FRAMES or world.num_frames == NUM_LONG_FRAMES:
            words = frames_in_words(example.scene, *(example.bounds or (0.0, 1.0)))
            self.frames.append(record(medium, [Turn(VIDEO_REQUEST, words)]))

    def add_picture(self, example: Example, medium: Fields) -> None:
        """A picture, in the words of one frame."""
        words = frames_in_words(example.scene, num_frames=1)
        self.pictures.append(record(medium, [Turn(PICTURE_REQUEST, words)]))

    def write(self, root: Path) -> None:
        """video/caption/toy_story, video/caption/toy_frames and image/caption/toy_seen."""
        write_json(root / "video" / "caption" / "toy_story" / "train.json", self.stories)
        write_json(root / "video" / "caption" / "toy_frames" / "train.json", self.frames)
        write_json(root / "image" / "caption" / "toy_seen" / "train.json", self.pictures)


def record(medium: Fields, turns: Sequence[Turn]) -> Fields:
    """A record of VideoChat2-IT. medium: {} for text alone."""
    return {**medium, "QA": [{"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in turns]}
