"""Dynamic masking and the MVM loss."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from stllm.models.masking import draw_dropped, draw_mask_rate, mvm_loss

PUBLISHED = {"mean": 0.5, "std": 0.1, "min": 0.1, "max": 0.7}


def draw_token_mask(batch: int, num_tokens: int, *, generator: torch.Generator, **rates: float) -> torch.Tensor:
    rate = draw_mask_rate(**rates, generator=generator)
    return draw_dropped(batch, num_tokens, rate=rate, generator=generator)


@given(batch=st.integers(1, 5), num_tokens=st.integers(1, 200), seed=st.integers(0, 10_000))
def test_each_row_drops_the_same_number(batch: int, num_tokens: int, seed: int) -> None:
    mask = draw_token_mask(batch, num_tokens, **PUBLISHED, generator=torch.Generator().manual_seed(seed))
    dropped = mask.sum(dim=1)
    assert mask.shape == (batch, num_tokens)
    assert (dropped == dropped[0]).all()
    assert int(0.1 * num_tokens) <= dropped[0] <= int(0.7 * num_tokens)


@given(num_tokens=st.integers(1, 200), rate=st.floats(0, 0.7), bucket=st.integers(1, 64))
def test_a_bucket_rounds_the_number_of_kept_tokens(num_tokens: int, rate: float, bucket: int) -> None:
    kept = num_tokens - int(draw_dropped(1, num_tokens, rate=rate, bucket=bucket).sum())
    exact = num_tokens - int(rate * num_tokens)
    assert kept % bucket == 0 or kept == num_tokens
    assert 0 < kept <= num_tokens and (abs(kept - exact) <= bucket / 2 or exact < bucket)
    assert bucket > 1 or kept == exact


def test_the_same_generator_seed_draws_the_same_mask() -> None:
    draws = [draw_token_mask(3, 50, **PUBLISHED, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_rates_follow_the_published_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = torch.stack([draw_token_mask(1, 1000, **PUBLISHED, generator=generator).float().mean() for _ in range(400)])
    assert abs(rates.mean() - 0.5) < 0.02
    assert abs(rates.std() - 0.1) < 0.02


def test_every_position_is_dropped_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    share = draw_token_mask(4000, 10, mean=0.5, std=0.0, min=0.5, max=0.5, generator=generator).float().mean(0)
    assert (share - 0.5).abs().max() < 0.04


def test_loss_is_zero_for_parallel_two_for_orthogonal_four_for_opposite_states() -> None:
    state = torch.tensor([[1.0, 0.0]])
    assert mvm_loss(3 * state, state).abs() < 1e-6
    assert (mvm_loss(torch.tensor([[0.0, 2.0]]), state) - 2).abs() < 1e-6
    assert (mvm_loss(-state, state) - 4).abs() < 1e-6


def test_loss_is_computed_in_float32() -> None:
    student, teacher = torch.randn(10, 64), torch.randn(10, 64)
    half = mvm_loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, mvm_loss(student.bfloat16().float(), teacher.bfloat16().float()))
