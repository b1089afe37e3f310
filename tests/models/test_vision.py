"""The image encoder: chunks of frames, the temporal adapter, normalisation."""

import pytest
import torch

from stllm.common.errors import UserError
from stllm.models.vision import CLIP_MEAN, CLIP_STD, Float32LayerNorm, normalised, sine_cosine_positions
from tests.helpers.tiny import tiny_model

VIDEO = torch.randn(2, 6, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("encoder", ["eva_clip_g", "eva_btadapter_g"])
@pytest.mark.parametrize("chunk_size", [1, 5, 64, None])
def test_encoding_in_chunks_equals_encoding_at_once(encoder: str, chunk_size: int | None) -> None:
    vision = tiny_model(encoder=encoder).vision_encoder
    vision.chunk_size = 12
    whole = vision(VIDEO)
    vision.chunk_size = chunk_size
    assert whole.shape == (2, 6, 5, 32)
    assert torch.allclose(vision(VIDEO), whole, atol=1e-6)


def test_without_the_adapter_frames_are_encoded_independently() -> None:
    vision = tiny_model(encoder="eva_clip_g").vision_encoder
    assert torch.allclose(vision(VIDEO[:, :1]), vision(VIDEO)[:, :1], atol=1e-6)


def test_with_the_adapter_a_frame_depends_on_the_others_and_their_order() -> None:
    vision = tiny_model(encoder="eva_btadapter_g").vision_encoder
    alone, together = vision(VIDEO[:, :1]), vision(VIDEO)[:, :1]
    assert not torch.allclose(alone, together, atol=1e-3)
    assert not torch.allclose(vision(VIDEO.flip(1)).flip(1), vision(VIDEO), atol=1e-3)


def test_a_new_adapter_ignores_the_order_of_frames() -> None:
    """Its temporal_fc starts at zero, and its spatial layers start as copies of the backbone's last blocks."""
    from stllm.models.st_llm import STLLM
    from tests.helpers.tiny import tiny_config

    torch.manual_seed(0)
    vision = STLLM(tiny_config(encoder="eva_btadapter_g")).eval().vision_encoder
    patches = torch.randn(1, 3, 4, 32)
    for layer in vision.adapter.temporal:
        assert torch.equal(layer(patches), patches)
    for layer, block in zip(vision.adapter.spatial, vision.backbone.blocks[-3:], strict=True):
        assert torch.equal(layer.attn.qkv.weight, block.attn.qkv.weight)
        assert torch.equal(layer.mlp.fc2.bias, block.mlp.fc2.bias)


def test_more_frames_than_positions_in_time_is_refused_with_a_sentence() -> None:
    vision = tiny_model(encoder="eva_btadapter_g").vision_encoder
    with pytest.raises(UserError, match="17 frames were given, but the temporal adapter knows 16"):
        vision(torch.randn(1, 17, 3, 28, 28))


def test_layer_norm_runs_in_float32() -> None:
    norm, x = Float32LayerNorm(64, eps=1e-5), torch.randn(4, 64) * 100
    expected = torch.nn.functional.layer_norm(x.bfloat16().float(), (64,), eps=1e-5)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, expected.bfloat16())


def test_initial_position_embeddings_of_neighbours_are_similar() -> None:
    """All embeddings differ, and nearer patches have more similar ones, in both directions and for any width."""
    grid = sine_cosine_positions((4, 6), 98)
    assert grid.shape == (1, 25, 98) and not grid[0, 0].any() and not grid[..., 96:].any()
    patches = grid[0, 1:].unflatten(0, (4, 6))
    apart = (patches[0, 0] - patches).norm(dim=-1)  # (4, 6), from the upper left corner
    assert (apart[0].diff() > 0).all() and (apart[:, 0].diff() > 0).all()
    assert torch.allclose(apart[0, :4], apart[:, 0], atol=1e-6)
    backbone = tiny_model(encoder="eva_clip_g").vision_encoder.backbone
    assert backbone.pos_embed is not None
    assert torch.equal(backbone.pos_embed, sine_cosine_positions((2, 2), 32))


def test_bytes_are_normalised_as_in_float32() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 1, 3, 16, 16).contiguous()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    expected = (pixels / 255 - mean) / std
    assert torch.equal(normalised(pixels), expected)
    assert normalised(expected) is expected
    vision = tiny_model(encoder="eva_clip_g").vision_encoder
    frames = torch.randint(256, VIDEO.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(vision(frames), vision((frames / 255 - mean) / std))
    assert torch.equal(vision.bfloat16()(frames), vision(((frames / 255 - mean) / std).bfloat16()))
