"""The data sets of a run as one: which samples make which batch, and each of them loaded.

Every batch, over all processes, comes from one data set, so that all ranks see the same kind of media at a step. The
order is a function of seed, epoch, sizes, ratios and the global batch alone: worker count, process count and a resume
change nothing. Letters: G samples of a global micro-batch, n samples of a data set.
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
    """A data set and its weight in the mixture; ratio None: its share of all samples.

    indices: the samples of it that are used; None: all.
    """

    corpus: Corpus
    ratio: float | None = None
    indices: np.ndarray | None = None


@dataclass(eq=False)
class Mixture(Dataset[Sample]):
    """Samples by `SampleKey`. A sample that cannot be used is replaced as a whole by another one of its data set.

    Media, question, answer and bounds are replaced together, so that a question never meets another video. The
    published code replaced the video alone and retried without end.

    max_tries: samples tried in place of one that cannot be used. check: refuses samples that are too long.
    media_seconds: the limit on reading one medium; 0: none.
    Raises UserError for no data set, or an empty one.
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
        """The sample of that key, or the one in its place; `failures` lists what could not be used before it.

        The replacement depends on the key and the seed alone. Raises UserError, naming data set and last file, when
        `max_tries` replacements could not be used either, and when the storage hangs (time_bound.py).
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
            if size > 1:  # any other one
                drawn = int(generator.integers(size - 1))
                key = key._replace(index=drawn + (drawn >= key.index))
        verb = "used" if any(failure.cause == TOO_LONG for failure in failures) else "read"
        raise UserError(
            f"data set {corpus.name}: {len(failures)} samples drawn one after another could not be {verb}, the last "
            f"one is {failures[-1].sentence}; check it with `stllm doctor`, or raise run.max_tries ({self.max_tries})"
        )


class MixtureSampler:
    """This rank's rows of every global batch: lists of `SampleKey`, for a DataLoader's `batch_sampler`.

    batch_size: samples of one process; G = batch_size * world_size. Rank r takes rows [r, r + 1) * batch_size of each
    global batch, so that one process with batches of 4 and two with batches of 2 see the same.
    A data set is gone through in a random order, and then again in another (`SampleKey.round`): in proportion to the
    sizes it ends within its second round, which fills up the last batch.
    """

    def __init__(self, mixture: Mixture, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        assert batch_size > 0 and 0 <= rank < world_size
        self.sizes, self.seed = mixture.sizes, mixture.seed
        self.batch_size, self.rank = batch_size, rank
        self.global_batch = batch_size * world_size
        self.counts = batches_of(mixture.sizes, mixture.ratios, self.global_batch)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, done = self.epoch, [0] * len(self.sizes)
        orders: dict[int, tuple[int, np.ndarray]] = {}  # of each data set: the round, and its permutation
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
    """This rank's rows of every sample once, data set by data set, for a DataLoader's `batch_sampler`.

    Every rank has equally many batches, as sharded models need. Where a rank has no rows left, its batch is one sample
    of `SampleKey.round` 1, which does not count.
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
    """Global batches an epoch of each data set.

    Without ratios: as many as hold all its samples, ceil(n / G). With any: as many in all as without, shared out by
    ratio (largest remainder); a data set without one counts by its share of all samples, and each gets one at least.
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
    """The data set of each global batch of an epoch, (batches,)."""
    order = np.repeat(np.arange(len(counts)), counts)
    keyed_numpy(seed, Stream.ORDER, epoch).shuffle(order)
    return order
