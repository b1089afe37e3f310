"""The clips of data sets, each medium and part of it once, decoded in batches: what feature extraction goes through.

Letters: B clips of a batch, T frames, S the model's image size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stllm.datasets.annotations import AnnotationError
from stllm.datasets.features import FeatureSource, FeatureWriter
from stllm.datasets.replacement import failure_of, load_within
from stllm.datasets.samples import Corpus, Failure, SampleKey
from stllm.media.info import MediaError


class DistinctClip(NamedTuple):
    """The number of its data set, a sample that shows it, and what its features are stored under."""

    corpus: int
    sample: int
    key: str


class ClipBatch(NamedTuple):
    """Clips of one data set and their frames, (B, T, 3, S, S), None without a clip; and what could not be read."""

    clips: list[DistinctClip]
    pixel_values: Tensor | None
    failures: list[Failure]


def distinct_clips(corpus: FeatureSource, number: int, *, done: FeatureWriter) -> Iterator[DistinctClip | None]:
    """For each sample the clip that it shows, where it is a new one; else None. done: what need not be made again.

    A sample whose record cannot be used shows none: training counts it.
    """
    seen: set[str] = set()
    for sample in range(len(corpus)):
        try:
            key = corpus.key_of(sample)
        except (AnnotationError, MediaError):
            yield None
            continue
        new = key not in seen and key not in done
        seen.add(key)
        yield DistinctClip(number, sample, key) if new else None


class ClipDataset(Dataset[ClipBatch]):
    """Batches of clips by number; every batch is of one data set, so that its clips have equal shapes.

    corpora: prepared as for evaluation, nothing random in them. media_seconds: the limit on reading a clip; 0: none.
    """

    def __init__(
        self, corpora: Sequence[Corpus], clips: Sequence[DistinctClip], *, batch_size: int, media_seconds: float
    ) -> None:
        self.corpora, self.media_seconds = corpora, media_seconds
        self.batches: list[list[DistinctClip]] = []
        for clip in clips:
            last = self.batches[-1] if self.batches else []
            if 0 < len(last) < batch_size and last[0].corpus == clip.corpus:
                last.append(clip)
            else:
                self.batches.append([clip])

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> ClipBatch:
        """Decodes a batch; what cannot be read is told in its place."""
        read, frames, failures = [], [], []
        for clip in self.batches[number]:
            corpus = self.corpora[clip.corpus]
            try:
                key, generator = SampleKey(0, 0, clip.corpus, clip.sample), np.random.default_rng(0)
                sample = load_within(self.media_seconds, corpus, key, generator, setting="--media-seconds")
            except (MediaError, AnnotationError) as error:
                failures.append(failure_of(corpus.name, error))
                continue
            assert sample.pixel_values is not None  # the data sets were built without features
            read.append(clip)
            frames.append(sample.pixel_values)
        return ClipBatch(read, torch.stack(frames) if frames else None, failures)
