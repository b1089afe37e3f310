"""Samples of the data sets, the keys of all random draws, and the count of bad samples.

Each random draw has its own generator, made from the seed, the epoch and the sample. The draws are therefore the same
for any number of workers and processes, and in a resumed run.

Letters in shapes: T frames, S image size, P patches, C encoder width, K tokens per frame, Q Q-Former width.
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
NUM_NAMED = 5  # files that a message lists
MIN_TRIED = 100  # the share of bad samples is taken of at least this many: one bad file among three is not 33 %


class SampleKey(NamedTuple):
    """The key of a sample: its data set, its index, and its place in the run.

    batch: number of the global batch within the epoch. corpus: number of the data set in the mixture. index: index of
    the sample in the data set. round: number of complete passes over the data set earlier in this epoch.
    """

    epoch: int
    batch: int
    corpus: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which keys do not need
    round: int = 0


@dataclass(frozen=True)
class Failure:
    """A sample that could not be used. cause: one of `CAUSES`; subject: the file; sentence: the error message."""

    corpus: str
    cause: str
    subject: str
    sentence: str


@dataclass
class Sample:
    """One prepared sample: a medium with questions and answers, or only text.

    name: file and record, as error messages name them. media: "video", "image", or None for a text-only sample.
    A sample with a medium has one of three tensors: pixel_values (T, 3, S, S) uint8, or precomputed vision_features
    (T, 1+P, C) or query_features (T, K, Q).
    together: the turns are separate questions that share the medium, instead of one conversation.
    judge_options: the model is also trained to tell for each option whether it is the answer.
    failures: samples tried before this one that could not be used.
    """

    key: SampleKey
    name: str
    turns: tuple[Turn, ...]
    media: str | None = None
    pixel_values: Tensor | None = None
    vision_features: Tensor | None = None
    query_features: Tensor | None = None
    together: bool = False
    judge_options: bool = False
    failures: list[Failure] = field(default_factory=list)

    @property
    def num_frames(self) -> int:
        """The number of frames T; 0 for a text-only sample."""
        media = (self.pixel_values, self.vision_features, self.query_features)
        return next((len(tensor) for tensor in media if tensor is not None), 0)


# Called with a sample and its number of frames (0: text-only). Raises AnnotationError if it is too long for the model.
LengthCheck = Callable[[Sample, int], None]


class Corpus(Protocol):
    """A data set of the mixture, which prepares its samples by index.

    media: the kind of medium of all samples: "video", "image", or None for text only.
    """

    name: str
    media: str | None

    def __len__(self) -> int: ...

    def load(self, key: SampleKey, generator: np.random.Generator, check: LengthCheck | None = None) -> Sample:
        """Prepare the sample `key.index`.

        generator: makes the random choices (frames, crop, QA pair). check: function that is called with the sample's
        text before its medium is read. Raises MediaError or AnnotationError if the sample cannot be read, and any error
        of `check`.
        """
        ...


class Stream(IntEnum):
    """Kinds of random draws. Each is the first part of its generator's key, so no two kinds share a generator."""

    ORDER = 1  # the data set of each batch
    PERMUTATION = 2  # the order of a data set's samples
    SAMPLE = 3  # frames, crop, choice of a QA pair
    REPLACEMENT = 4  # the sample that replaces an unreadable one
    MASK_RATE = 5  # the share of visual tokens that a batch drops
    MASK = 6  # the dropped visual tokens of a sample


def keyed_numpy(seed: int, *parts: int) -> np.random.Generator:
    """Make a numpy generator from the seed and `parts`.

    parts: the kind of draw (`Stream`), then the epoch, sample and so on.
    """
    return np.random.default_rng([seed, *parts])


def keyed_torch(seed: int, *parts: int) -> torch.Generator:
    """Make a torch CPU generator from the seed and `parts`. parts: as in `keyed_numpy`."""
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
    """Call `corpus.load` with a time limit for reading the medium; see `time_bound.read_within`.

    setting: name of the limit, for the error message.
    """
    if corpus.media is None:
        return corpus.load(key, generator, check)
    medium = f"data set {corpus.name}, sample {key.index}"
    return read_within(seconds, partial(corpus.load, key, generator, check), medium=medium, setting=setting)


def failure_of(corpus: str, error: MediaError | AnnotationError) -> Failure:
    """Convert the error of a sample to a `Failure`."""
    sentence = str(error)
    # Both kinds of error begin with the file (and its record) and a colon.
    return Failure(corpus, error.cause, subject=sentence.split(": ", 1)[0], sentence=sentence)


class BadSampleLog:
    """A counter of samples that could not be used. It warns once about each file.

    max_bad_fraction: `check` raises if a larger share of the tried samples is bad. epoch_size: samples per epoch.
    by_cause: the number of bad samples for each cause.
    """

    def __init__(self, *, max_bad_fraction: float, epoch_size: int) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.epoch_size = epoch_size
        self.by_cause: Counter[str] = Counter()
        self._subjects: dict[str, None] = {}  # a dict keeps the order

    @property
    def total(self) -> int:
        """The number of bad samples; a file that was tried twice counts twice."""
        return self.by_cause.total()

    def add(self, failure: Failure) -> None:
        """Count a bad sample, and warn if its file is new."""
        self.by_cause[failure.cause] += 1
        if failure.subject not in self._subjects:
            self._subjects[failure.subject] = None
            log.warning("data set %s, left out: %s", failure.corpus, failure.sentence)

    def check(self, num_seen: int) -> None:
        """Raise UserError if too many samples were bad; it lists files. num_seen: samples trained on so far."""
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
        """Return the counts, as plain JSON, so that a resumed run can continue from them."""
        return {"by_cause": dict(self.by_cause), "subjects": list(self._subjects)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts that `state_dict` returned."""
        self.by_cause = Counter(state["by_cause"])
        self._subjects = dict.fromkeys(state["subjects"])
