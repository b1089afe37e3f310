"""The matrix-multiply peak that the encoder stands against: as many products, however they are timed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import encoding


@pytest.mark.parametrize(("device", "calls", "expected"), [("cpu", 2, 960 / 9), ("meta", 9, 960 / 2)])
def test_the_peak_counts_every_product(
    device: str, calls: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time on the CPU; elsewhere all of a shape in one go. `meta` stands for a GPU; each timing takes 1 s."""
    shapes = [(3, 4, 2, 5), (6, 4, 5, 3)]  # 3 * 2 * 40 + 6 * 2 * 60 FLOP
    made = []

    def second(work: Callable[[], Any], **_: Any) -> float:
        work()
        return 1.0

    monkeypatch.setattr(encoding, "seconds", second)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: made.append(x.shape))
    assert encoding.matmul_peak(shapes, torch.device(device), torch.float32) == pytest.approx(expected)
    assert len(made) == calls
