"""Types passed between data sets, the mixture and the collator, and the keys of everything random.

Randomness is never taken from a process or worker: each draw has its own generator, made from the seed, the epoch and
the sample, so that any worker count, process count or resumed run draws the same.

Letters: T frames, S the model's image size, P patches, C encoder width, K tokens a frame, Q Q-Former width.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stllm.processors.templates import Turn


class SampleKey(NamedTuple):
    """A sample and its place in the run.

    epoch: of the run. batch: number of the global batch within the epoch. corpus: number of the data set in the
    mixture. index: of the sample in it. round: how many times the data set has been gone through in this epoch.
    """

    epoch: int
    batch: int
    corpus: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a key for
    round: int = 0


@dataclass(frozen=True)
class Failure:
    """A sample that could not be used. cause: one of `replacement.CAUSES`; subject: the file."""

    corpus: str
    cause: str
    subject: str
    sentence: str


@dataclass
class Sample:
    """One prepared sample: what is seen, what is asked and answered.

    media: "video", "image", or None for text alone. pixel_values: (T, 3, S, S), normalised; or one of vision_features
    (T, 1+P, C) and query_features (T, K, Q), both precomputed. name: file and record, for messages.
    failures: what was tried in this sample's place and could not be read.
    """

    key: SampleKey
    name: str
    turns: tuple[Turn, ...]
    media: str | None = None
    pixel_values: Tensor | None = None
    vision_features: Tensor | None = None
    query_features: Tensor | None = None
    failures: list[Failure] = field(default_factory=list)

    @property
    def num_frames(self) -> int:
        """T of the medium that was read; 0 for text alone."""
        media = (self.pixel_values, self.vision_features, self.query_features)
        return next((len(tensor) for tensor in media if tensor is not None), 0)


class Corpus(Protocol):
    """One data set of the mixture: samples by index, each prepared whole (media, question, answer, bounds together).

    media: what every sample shows: "video", "image" or None (text alone).
    """

    name: str
    media: str | None

    def __len__(self) -> int: ...

    def load(self, key: SampleKey, generator: np.random.Generator) -> Sample:
        """The sample `key.index`. generator: for whatever is random in it (frames, crop, choice of a QA pair).

        Raises MediaError or AnnotationError when it cannot be read as annotated.
        """
        ...


@runtime_checkable
class TextFirst(Protocol):
    """A data set that can give a sample's text before it reads the medium.

    num_frames: T of every sample that has a medium.
    """

    num_frames: int

    def draft(self, key: SampleKey, generator: np.random.Generator) -> Sample:
        """The sample that `load` returns with this key and generator, without its medium. Raises AnnotationError."""
        ...


class LengthCheck(Protocol):
    """Checks that a sample is not too long for the model. Data sets call it, as they do not know the model."""

    def __call__(self, sample: Sample, num_frames: int) -> None:
        """Raises AnnotationError when a sample with a medium of `num_frames` frames (0: text alone) is too long."""
        ...


class Stream(IntEnum):
    """Kinds of random draws: the first part of every key, so that no two kinds share a generator."""

    ORDER = 1  # which data set each batch comes from
    PERMUTATION = 2  # the order of a data set's samples
    SAMPLE = 3  # frames, crop, choice of a QA pair
    REPLACEMENT = 4  # the sample in place of an unreadable one
    MASK_RATE = 5  # the share of visual tokens that a batch drops
    MASK = 6  # which of a sample's visual tokens are dropped


def keyed_numpy(seed: int, *parts: int) -> np.random.Generator:
    """numpy's generator for these numbers (a `Stream` first) and no other."""
    return np.random.default_rng([seed, *parts])


def keyed_torch(seed: int, *parts: int) -> torch.Generator:
    """torch's generator (CPU) for these numbers (a `Stream` first) and no other."""
    state = np.random.SeedSequence([seed, *parts]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
