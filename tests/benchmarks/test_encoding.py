"""`benchmarks.encoding`: its baseline, and the peak speed of matrix products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import EvaAttention

from benchmarks import encoding
from stllm.models.configuration import VISION_DEFAULTS


@pytest.mark.parametrize(("device", "calls", "expected"), [("cpu", 2, 960 / 9), ("meta", 9, 960 / 2)])
def test_the_peak_speed_includes_every_product(
    device: str, calls: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU products are timed singly, on a GPU (here: `meta`) all of a shape together. Each timing takes 1 s."""
    shapes = [(3, 4, 2, 5), (6, 4, 5, 3)]  # 3 * 2 * 40 + 6 * 2 * 60 FLOP
    made = []

    def second(work: Callable[[], Any], **_: Any) -> float:
        work()
        return 1.0

    monkeypatch.setattr(encoding, "seconds", second)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: made.append(x.shape))
    assert encoding.matmul_peak(shapes, torch.device(device), torch.float32) == pytest.approx(expected)
    assert len(made) == calls


def test_the_slowest_operators_are_named_in_words() -> None:
    sizes = {**VISION_DEFAULTS, "image_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 4}
    found = encoding.operators(encoding.build(sizes, torch.device("cpu"), torch.float32), torch.randn(1, 3, 3, 28, 28))
    assert "linear layers (aten::addmm)" in found and len(found) == encoding.NUM_OPERATORS
    assert 0 < sum(found.values()) <= 1.01
    page = (Path(encoding.__file__).parent / "results" / "README.md").read_text(encoding="utf-8")
    assert page.count("(aten::") == page.count("aten::") == encoding.NUM_OPERATORS


def test_the_baseline_computes_the_same_without_fused_attention() -> None:
    sizes = {**VISION_DEFAULTS, "image_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 4}
    encoder = encoding.build(sizes, torch.device("cpu"), torch.float32)
    video = torch.randn(1, 3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ours = encoder(video)
    torch.testing.assert_close(encoding.eager_one_by_one(encoder, video), ours)
    attention = [module for module in encoder.modules() if isinstance(module, EvaAttention)]
    assert len(attention) == 2 and not any(module.fused_attn for module in attention) and encoder.chunk_size == 1
