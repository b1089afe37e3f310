"""The mixture of a run's data sets, and the samplers that choose the samples of each batch.

A global batch (the samples of one micro-batch over all processes) comes from one data set, so all ranks read the same
kind of media at a step. The order depends only on the seed, epoch, sizes, ratios and the global batch size. It does not
depend on the number of workers and processes, or on a resume.
Letters in formulas: G samples of a global batch, n samples of a data set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from stllm.common.errors import UserError
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.samples import (
    TOO_LONG,
    Corpus,
    Failure,
    LengthCheck,
    Sample,
    SampleKey,
    Stream,
    failure_of,
    keyed_numpy,
    load_within,
)
from stllm.media.info import MediaError


class MixturePart(NamedTuple):
    """A data set in the mixture.

    ratio: its weight; None: its share of all samples. indices: indices of the samples to use; None: all.
    """

    corpus: Corpus
    ratio: float | None = None
    indices: np.ndarray | None = None


@dataclass(eq=False)
class Mixture(Dataset[Sample]):
    """The samples of several data sets, by `SampleKey`.

    A sample that cannot be used is replaced by another one of its data set: medium, question and answer together. The
    published code replaced only the video, and retried without end.

    max_tries: number of other samples to try in place of an unusable one. check: rejects samples that are too long.
    media_seconds: time limit in seconds for reading one medium; 0: no limit.
    Raises UserError if there is no data set, or if one is empty.
    """

    sources: Sequence[MixturePart]
    _: KW_ONLY
    seed: int
    max_tries: int
    check: LengthCheck | None = None
    media_seconds: float = 0

    def __post_init__(self) -> None:
        self.corpora = [source.corpus for source in self.sources]
        self.ratios = [source.ratio for source in self.sources]
        self.sizes = [len(source.corpus if source.indices is None else source.indices) for source in self.sources]
        if not self.sources:
            raise UserError("no data set is named: list at least one under `datasets`")
        for corpus, size in zip(self.corpora, self.sizes, strict=True):
            if not size:
                raise UserError(f"data set {corpus.name} has no samples: leave it out, or name another annotation file")

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Load the sample of a key, or a replacement. In the result, `failures` lists the unusable samples tried first.

        The replacement depends only on the key and the seed. Raises UserError, with the data set and the last file, if
        `max_tries` replacements cannot be used either, or if reading hangs (time_bound.py).
        """
        corpus, size = self.corpora[key.corpus], self.sizes[key.corpus]
        indices = self.sources[key.corpus].indices
        parts = (key.epoch, key.corpus, key.index, key.round)
        generator = keyed_numpy(self.seed, Stream.SAMPLE, *parts)
        failures: list[Failure] = []
        for attempt in range(1, self.max_tries + 2):
            try:
                asked = key if indices is None else key._replace(index=int(indices[key.index]))
                sample = load_within(self.media_seconds, corpus, asked, generator, self.check)
                return replace(sample, failures=failures)
            except (MediaError, AnnotationError) as error:
                failures.append(failure_of(corpus.name, error))
            generator = keyed_numpy(self.seed, Stream.REPLACEMENT, *parts, attempt)
            if size > 1:  # draw any other sample
                drawn = int(generator.integers(size - 1))
                key = key._replace(index=drawn + (drawn >= key.index))
        verb = "used" if any(failure.cause == TOO_LONG for failure in failures) else "read"
        raise UserError(
            f"data set {corpus.name}: {len(failures)} samples drawn one after another could not be {verb}, the last "
            f"one is {failures[-1].sentence}; check it with `stllm doctor`, or raise run.max_tries ({self.max_tries})"
        )


class MixtureSampler:
    """The `batch_sampler` of a training DataLoader: yields this rank's part of every global batch, as `SampleKey`s.

    batch_size: samples per process; G = batch_size * world_size. Rank r takes the rows from r * batch_size to
    (r + 1) * batch_size of each global batch. One process with batches of 4 and two with batches of 2 thus train on the
    same global batches.
    A data set is passed in random order. After its last sample it starts again in another order (`SampleKey.round`),
    which also fills the last batch.
    """

    def __init__(self, mixture: Mixture, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        assert batch_size > 0 and 0 <= rank < world_size
        self.sizes, self.seed = mixture.sizes, mixture.seed
        self.batch_size, self.rank = batch_size, rank
        self.global_batch = batch_size * world_size
        self.counts = batches_of(mixture.sizes, mixture.ratios, self.global_batch)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, whose batches are yielded next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is equal on all ranks."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, done = self.epoch, [0] * len(self.sizes)
        orders: dict[int, tuple[int, np.ndarray]] = {}  # data set -> its round, and the permutation of that round
        for number, corpus in enumerate(batch_order(self.counts, self.seed, epoch).tolist()):
            first = done[corpus] * self.global_batch + self.rank * self.batch_size
            done[corpus] += 1
            keys, size = [], self.sizes[corpus]
            for place in range(first, first + self.batch_size):
                round, rest = divmod(place, size)
                if corpus not in orders or orders[corpus][0] != round:
                    draw = keyed_numpy(self.seed, Stream.PERMUTATION, epoch, corpus, round)
                    orders[corpus] = round, draw.permutation(size)
                keys.append(SampleKey(epoch, number, corpus, int(orders[corpus][1][rest]), round))
            yield keys


class HeldOutSampler:
    """The `batch_sampler` of a validation DataLoader: every sample once, one data set after the other.

    All ranks have the same number of batches, as sharded models need. A rank without samples left yields a batch of one
    sample with `SampleKey.round` 1, which is not counted in the loss.
    """

    def __init__(self, sizes: Sequence[int], *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.sizes, self.batch_size, self.rank = sizes, batch_size, rank
        self.global_batch = batch_size * world_size

    def __len__(self) -> int:
        return sum(-(-size // self.global_batch) for size in self.sizes)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for corpus, size in enumerate(self.sizes):
            for number, start in enumerate(range(0, size, self.global_batch)):
                first = start + self.rank * self.batch_size
                rows = range(first, min(first + self.batch_size, size))
                yield [SampleKey(0, number, corpus, row) for row in rows] or [SampleKey(0, number, corpus, 0, 1)]


def batches_of(sizes: Sequence[int], ratios: Sequence[float | None], global_batch: int) -> list[int]:
    """Compute the number of global batches per epoch of each data set.

    Without ratios, each data set has ceil(n / G) batches. With ratios, the same total is divided by ratio (largest
    remainder method). A data set without a ratio has its share of all samples as ratio. Each data set with a positive
    ratio gets at least one batch. Raises UserError if all ratios are 0.
    """
    whole = [-(-size // global_batch) for size in sizes]
    if all(ratio is None for ratio in ratios):
        return whole
    shares = [size / sum(sizes) for size in sizes]
    weights = np.array([share if ratio is None else ratio for ratio, share in zip(ratios, shares, strict=True)])
    if not weights.sum() > 0:
        raise UserError("the sample_ratio of every data set is 0: give at least one a positive ratio")
    exact = sum(whole) * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    short = sum(whole) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    for left_out in np.flatnonzero((counts == 0) & (weights > 0)):
        counts[counts.argmax()] -= 1
        counts[left_out] += 1
    return [int(count) for count in counts]


def batch_order(counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Draw the order of an epoch: the number of the data set of each global batch, (batches,)."""
    order = np.repeat(np.arange(len(counts)), counts)
    keyed_numpy(seed, Stream.ORDER, epoch).shuffle(order)
    return order
