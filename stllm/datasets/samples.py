"""Samples, which data sets give to the mixture and the collator; the keys of everything random; samples that are bad.

Randomness is never taken from a process or worker: each draw has its own generator, made from the seed, the epoch and
the sample, so that any worker count, process count or resumed run draws the same.

Letters: T frames, S the model's image size, P patches, C encoder width, K tokens a frame, Q Q-Former width.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.datasets.annotations import AnnotationError
from stllm.media.info import MediaError
from stllm.media.time_bound import read_within
from stllm.processors.templates import Turn

log = logging.getLogger(__name__)

TOO_LONG = "too long"
CAUSES = ("missing", "unreadable", "bounds", "annotation", TOO_LONG)
NUM_NAMED = 5  # files that a message names
MIN_TRIED = 100  # a share of fewer samples says little: one bad file among the first three is no reason to stop


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
    """A sample that could not be used. cause: one of `CAUSES`; subject: the file."""

    corpus: str
    cause: str
    subject: str
    sentence: str


@dataclass
class Sample:
    """One prepared sample: what is seen, what is asked and answered.

    media: "video", "image", or None for text alone. pixel_values: (T, 3, S, S) uint8; or one of vision_features
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


# Raises AnnotationError when a sample is too long for the model. The number is T of the medium, 0 for text alone.
LengthCheck = Callable[[Sample, int], None]


class Corpus(Protocol):
    """One data set of the mixture: samples by index, each prepared whole (media, question, answer, bounds together).

    media: what every sample shows: "video", "image" or None (text alone).
    """

    name: str
    media: str | None

    def __len__(self) -> int: ...

    def load(self, key: SampleKey, generator: np.random.Generator, check: LengthCheck | None = None) -> Sample:
        """The sample `key.index`. generator: for whatever is random in it (frames, crop, choice of a QA pair).

        check: called with the sample's text before its medium is read. Data sets do not know the model.
        Raises MediaError or AnnotationError when the sample cannot be read as annotated, and what `check` raises.
        """
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


# ---- bad samples -----------------------------------------------------------------------------------------------------


def load_within(
    seconds: float,
    corpus: Corpus,
    key: SampleKey,
    generator: np.random.Generator,
    check: LengthCheck | None = None,
    *,
    setting: str = "run.media_seconds",
) -> Sample:
    """`corpus.load` with a limit on reading a medium; see `time_bound.read_within`. setting: the limit's name."""
    if corpus.media is None:
        return corpus.load(key, generator, check)
    medium = f"data set {corpus.name}, sample {key.index}"
    return read_within(seconds, partial(corpus.load, key, generator, check), medium=medium, setting=setting)


def failure_of(corpus: str, error: MediaError | AnnotationError) -> Failure:
    """The error of a data set's sample, to be counted."""
    sentence = str(error)
    # Both kinds of error begin with the file (and its record) and a colon.
    return Failure(corpus, error.cause, subject=sentence.split(": ", 1)[0], sentence=sentence)


class BadSampleLog:
    """A count of samples that could not be used. It warns of each file once and stops the run when there are too many.

    max_bad_fraction: the share of all samples tried above which `check` raises. epoch_size: samples an epoch.
    total: samples that could not be used; by_cause: the same by cause.
    """

    def __init__(self, *, max_bad_fraction: float, epoch_size: int) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.epoch_size = epoch_size
        self.by_cause: Counter[str] = Counter()
        self._subjects: dict[str, None] = {}  # in the order they were met

    @property
    def total(self) -> int:
        """Samples that could not be used; a file that was met twice counts twice."""
        return self.by_cause.total()

    def add(self, failure: Failure) -> None:
        """Count one; its file is named in a warning the first time."""
        self.by_cause[failure.cause] += 1
        if failure.subject not in self._subjects:
            self._subjects[failure.subject] = None
            log.warning("data set %s, left out: %s", failure.corpus, failure.sentence)

    def check(self, num_seen: int) -> None:
        """Raise UserError, naming files, when too many samples were bad. num_seen: samples trained on so far."""
        tried = num_seen + self.total
        if self.total <= self.max_bad_fraction * max(tried, min(MIN_TRIED, self.epoch_size)):
            return
        causes = ", ".join(f"{self.by_cause[cause]} {cause}" for cause in CAUSES if self.by_cause[cause])
        verb = "used" if self.by_cause[TOO_LONG] else "read"
        named, more = "; ".join(list(self._subjects)[:NUM_NAMED]), len(self._subjects) - NUM_NAMED
        raise UserError(
            f"{self.total} of {tried} samples could not be {verb} ({causes}), more than run.max_bad_fraction "
            f"({self.max_bad_fraction:g}) allows: {named}{f' and {more} more' if more > 0 else ''}; check the data "
            "with `stllm doctor`, mend or remove them, or raise run.max_bad_fraction"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts from which a resumed run goes on, as plain JSON."""
        return {"by_cause": dict(self.by_cause), "subjects": list(self._subjects)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.by_cause = Counter(state["by_cause"])
        self._subjects = dict.fromkeys(state["subjects"])
