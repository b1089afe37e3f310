"""The order of samples depends only on seed, epoch, sizes, ratios and the global batch size."""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stllm.common.errors import UserError
from stllm.datasets.mixture import Mixture, MixturePart, MixtureSampler, batches_of
from stllm.datasets.samples import LengthCheck, Sample, SampleKey

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


class Counted:
    """A data set of `size` samples. Each sample holds the random number drawn for it."""

    media: str | None = "video"

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size, self.num_loaded = name, size, 0

    def __len__(self) -> int:
        return self.size

    def load(self, key: SampleKey, generator: np.random.Generator, check: LengthCheck | None = None) -> Sample:
        self.num_loaded += 1
        return Sample(key, f"{self.name} {key.index} {generator.integers(2**60)}", ())


def counted(mixed: Mixture) -> list[Counted]:
    return [corpus for corpus in mixed.corpora if isinstance(corpus, Counted)]


def mixture(sizes: Sequence[int], ratios: Sequence[float | None] = (), seed: int = 0) -> Mixture:
    weights = ratios or [None] * len(sizes)
    corpora = [Counted(f"corpus {number}", size) for number, size in enumerate(sizes)]
    return Mixture([MixturePart(c, w) for c, w in zip(corpora, weights, strict=True)], seed=seed, max_tries=1)


def epoch_of(mixed: Mixture, epoch: int = 0, **division: int) -> list[list[SampleKey]]:
    sampler = MixtureSampler(mixed, **division)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


@given(sizes=SIZES, batch_size=st.integers(1, 6), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_sample_once_an_epoch_and_full_batches_of_one_data_set(sizes, batch_size, seed, epoch) -> None:
    batches = epoch_of(mixture(sizes, seed=seed), epoch, batch_size=batch_size)
    assert all(len(batch) == batch_size and len({key.corpus for key in batch}) == 1 for batch in batches)
    assert [batch[0].batch for batch in batches] == list(range(len(batches)))
    assert {key.epoch for batch in batches for key in batch} == {epoch}
    first = Counter((key.corpus, key.index) for batch in batches for key in batch if key.round == 0)
    assert first == {(c, index): 1 for c, size in enumerate(sizes) for index in range(size)}
    for corpus, size in enumerate(sizes):
        drawn = sum(len(batch) for batch in batches if batch[0].corpus == corpus)
        assert 0 <= drawn - size < batch_size  # no more than fills the last batch
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)  # no two draws share their randomness


@given(
    sizes=SIZES,
    ratios=st.lists(st.one_of(st.none(), st.floats(0.1, 9)), min_size=4, max_size=4),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_ranks_divide_the_global_batch(sizes, ratios, batch_size, world_size, seed) -> None:
    mixed = mixture(sizes, ratios[: len(sizes)], seed)
    whole = epoch_of(mixed, 3, batch_size=batch_size * world_size)
    parts = [epoch_of(mixed, 3, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    assert whole == [list(chain(*rows)) for rows in zip(*parts, strict=True)]


def test_epochs_and_seeds_differ() -> None:
    batches = epoch_of(mixture([50, 30]), batch_size=4)
    assert batches == epoch_of(mixture([50, 30]), batch_size=4)
    for other in (epoch_of(mixture([50, 30]), 1, batch_size=4), epoch_of(mixture([50, 30], seed=1), batch_size=4)):
        assert [[key.index for key in batch] for batch in batches] != [[key.index for key in batch] for batch in other]
        assert [batch[0].corpus for batch in batches] != [batch[0].corpus for batch in other]


def test_without_ratios_batches_are_in_proportion_to_the_sizes() -> None:
    assert batches_of([100, 50, 3], [None] * 3, 8) == [13, 7, 1]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1, 1, 1], [7, 7, 6]),
        ([3, 1, 0], [15, 5, 0]),
        ([115, 14, 0.001], [17, 2, 1]),  # one at least, where the ratio is not 0
        ([None, None, 0.2], [9, 7, 4]),  # of 0.5, 0.4 (their shares of all samples) and 0.2
    ],
)
def test_batches_are_divided_among_data_sets_by_ratio(ratios: list[float | None], expected: list[int]) -> None:
    assert batches_of([100, 80, 20], ratios, 10) == expected


def test_a_data_set_with_a_high_ratio_is_repeated_in_another_order() -> None:
    batches = epoch_of(mixture([40, 10], [1, 4]), batch_size=5)
    small = [key for batch in batches for key in batch if key.corpus == 1]
    rounds = {r: [key.index for key in small if key.round == r] for r in range(4)}
    assert len(small) == 40 and all(sorted(rounds[r]) == list(range(10)) for r in range(4))
    assert len({tuple(order) for order in rounds.values()}) == 4


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    ratios=st.lists(st.floats(0.01, 100), min_size=6, max_size=6),
    batch=st.integers(1, 32),
)
@settings(deadline=None)
def test_batches_by_ratio_are_within_one_of_the_exact_share(sizes, ratios, batch) -> None:
    weights = ratios[: len(sizes)]
    counts, total = batches_of(sizes, weights, batch), sum(batches_of(sizes, [None] * len(sizes), batch))
    assert sum(counts) == total and min(counts) >= 1
    if all(total * w / sum(weights) >= 1 for w in weights):
        assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(counts, weights, strict=True))


def test_invalid_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match="no data set is named"):
        mixture([])
    with pytest.raises(UserError, match="data set corpus 1 has no samples"):
        mixture([3, 0])
    with pytest.raises(UserError, match="the sample_ratio of every data set is 0"):
        batches_of([3, 4], [0, 0], 2)


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def test_the_number_of_workers_changes_nothing() -> None:
    mixed = mixture([13, 6])
    sampler = MixtureSampler(mixed, batch_size=4)
    alone = list(DataLoader(mixed, batch_sampler=sampler, collate_fn=names))
    assert alone == list(DataLoader(mixed, batch_sampler=sampler, collate_fn=names, num_workers=2))
    assert len({name for batch in alone for name in batch}) == 24  # every draw differs


def test_a_resumed_epoch_continues_without_loading_skipped_samples() -> None:
    mixed = mixture([13, 6])
    loader = DataLoader(mixed, batch_sampler=MixtureSampler(mixed, batch_size=4), collate_fn=names)
    whole = list(loader)
    for corpus in counted(mixed):
        corpus.num_loaded = 0
    assert list(skip_first_batches(loader, 4)) == whole[4:]
    assert sum(corpus.num_loaded for corpus in counted(mixed)) == 4 * len(whole[4:])


def test_ten_million_samples_are_ordered_quickly() -> None:
    sampler = MixtureSampler(mixture([10_000_000, 1000]), batch_size=8)
    start = time.perf_counter()
    batches = iter(sampler)
    keys = [key for _ in range(1000) for key in next(batches)]
    assert len(keys) == 8000 and time.perf_counter() - start < 20  # 1 s when the machine is idle
