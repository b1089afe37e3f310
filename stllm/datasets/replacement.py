"""Replaces a sample that cannot be read, or is too long for the model, as a whole by another one, and counts it.

Media, question, answer and bounds are replaced together, so that a question never meets another video. The published
code replaced the video alone and retried without end.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from stllm.common.errors import UserError
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.samples import Corpus, Failure, LengthCheck, Sample, SampleKey, Stream, TextFirst, keyed_numpy
from stllm.media.info import MediaError
from stllm.media.time_bound import read_within

log = logging.getLogger(__name__)

TOO_LONG = "too long"
CAUSES = ("missing", "unreadable", "bounds", "annotation", TOO_LONG)
NUM_NAMED = 5  # files that a message names
MIN_TRIED = 100  # a share of fewer samples says little: one bad file among the first three is no reason to stop


def load_with_replacement(
    corpus: Corpus,
    key: SampleKey,
    *,
    seed: int,
    max_tries: int,
    check: LengthCheck | None = None,
    media_seconds: float = 0,
) -> Sample:
    """The sample of that key, or another of the same data set when it cannot be used; `failures` lists those.

    check: refuses samples that are too long; it is asked before a medium is read where the data set allows that.
    media_seconds: the limit on reading one medium; 0: none.
    The replacement depends on the key and the seed alone. Raises UserError, naming data set and last file, when
    `max_tries` replacements could not be used either, and when the storage hangs (time_bound.py).
    """
    parts = (key.epoch, key.corpus, key.index, key.round)
    generator = keyed_numpy(seed, Stream.SAMPLE, *parts)
    failures: list[Failure] = []
    for attempt in range(max_tries + 1):
        if attempt:
            generator = keyed_numpy(seed, Stream.REPLACEMENT, *parts, attempt)
            if len(corpus) > 1:  # any other one
                drawn = int(generator.integers(len(corpus) - 1))
                key = key._replace(index=drawn + (drawn >= key.index))
        try:
            if check is not None and isinstance(corpus, TextFirst):
                check(corpus.draft(key, deepcopy(generator)), 0 if corpus.media is None else corpus.num_frames)
                return replace(load_within(media_seconds, corpus, key, generator), failures=failures)
            sample = load_within(media_seconds, corpus, key, generator)
            if check is not None:
                check(sample, sample.num_frames)
            return replace(sample, failures=failures)
        except (MediaError, AnnotationError) as error:
            failures.append(failure_of(corpus.name, error))
    last = failures[-1]
    verb = "used" if any(failure.cause == TOO_LONG for failure in failures) else "read"
    raise UserError(
        f"data set {corpus.name}: {len(failures)} samples drawn one after another could not be {verb}, the last one is "
        f"{last.sentence}; check it with `stllm doctor`, or raise run.max_tries ({max_tries})"
    )


def load_within(
    seconds: float,
    corpus: Corpus,
    key: SampleKey,
    generator: np.random.Generator,
    *,
    setting: str = "run.media_seconds",
) -> Sample:
    """`corpus.load` with a limit on reading a medium; see `time_bound.read_within`. setting: the limit's name."""
    if corpus.media is None:
        return corpus.load(key, generator)
    medium = f"data set {corpus.name}, sample {key.index}"
    return read_within(seconds, partial(corpus.load, key, generator), medium=medium, setting=setting)


def failure_of(corpus: str, error: MediaError | AnnotationError) -> Failure:
    """The error of a data set's sample, to be counted."""
    sentence = str(error)
    # Both kinds of error begin with the file (and its record) and a colon.
    return Failure(corpus, error.cause, subject=sentence.split(": ", 1)[0], sentence=sentence)


class BadSampleLog:
    """Counts samples that could not be used, warns of each file once, and stops the run when there are too many.

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
        """Counts one; its file is named in a warning the first time."""
        self.by_cause[failure.cause] += 1
        if failure.subject not in self._subjects:
            self._subjects[failure.subject] = None
            log.warning("data set %s, left out: %s", failure.corpus, failure.sentence)

    def check(self, num_seen: int) -> None:
        """Raises UserError, naming files, when too many samples were bad. num_seen: samples trained on so far."""
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
        """Takes up what `state_dict` gave."""
        self.by_cause = Counter(state["by_cause"])
        self._subjects = dict.fromkeys(state["subjects"])
