"""Building a model from a configuration, with loaded or random weights."""

from typing import Any

import pytest
import torch

import stllm
from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.models.build import build_audited, build_model, config_from_settings
from stllm.models.checkpoints.load import load_model
from tests.helpers.tiny import tiny_batch
from tests.models.checkpoints.conftest import GOLDEN


def test_a_tiny_model_is_built_without_weights() -> None:
    options = [
        "model.video_input=residual",
        "model.vit_model=eva_btadapter_g",
        "model.mvm_decode=True",
        "model.use_mask=True",
    ]
    model, report = build_audited(load_config(options=options, model_type="tiny"), device="cpu", dtype="float32")
    assert not model.training
    assert not report.keys("missing") and len(report.keys("fresh")) == len(model.state_dict())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.video_input.up_proj.weight.any()  # starts without an effect
    encoder: Any = model.vision_encoder
    spatial, block = encoder.adapter.spatial[-1], encoder.backbone.blocks[-1]
    assert torch.equal(spatial.attn.qkv.weight, block.attn.qkv.weight)  # starts as a copy
    batch = tiny_batch(model)
    output = model(**batch)
    assert torch.isfinite(output.loss)


def test_the_seed_determines_the_weights() -> None:
    cfg = load_config(model_type="tiny")
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build_model(cfg, device="cpu").projection.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_public_names_are_the_same() -> None:
    assert stllm.build_model is build_model and stllm.load_model is load_model


def test_the_template_follows_the_family() -> None:
    tiny = load_config(model_type="tiny").model
    assert config_from_settings({**tiny, "qformer_text_input": True}).template == "instructblip"
    assert config_from_settings({**tiny, "qformer_text_input": False}).template == "minigpt4"
    assert config_from_settings({**tiny, "template": "minigpt4"}).template == "minigpt4"


def test_a_language_model_must_be_named() -> None:
    with pytest.raises(UserError, match=r"no language model is named: set model\.llama_model"):
        build_model(load_config(model_type="instructblip_vicuna0"), device="cpu")


def test_training_may_add_parts_to_a_checkpoint() -> None:
    settings = {"ckpt": str(GOLDEN / "minigpt4_plain_all"), "image_size": 28, "qformer_text_input": False}
    settings |= {"vit_model": "eva_btadapter_g", "video_input": "residual", "mvm_decode": True, "residual_size": 2}
    model, report = build_audited(settings, device="cpu")
    parts = {part for part, audit in report.parts.items() if audit["fresh"]}
    assert parts == {"temporal adapter", "video input", "mvm decoder"}
    encoder: Any = model.vision_encoder
    spatial, block = encoder.adapter.spatial[0], encoder.backbone.blocks[1]
    assert torch.equal(spatial.mlp.fc1.weight, block.mlp.fc1.weight)  # of the loaded weights


def test_gradient_checkpointing_is_switched_on() -> None:
    cfg = load_config(options=["model.use_grad_checkpoint=True"], model_type="tiny")
    assert build_model(cfg, device="cpu").vision_encoder.gradient_checkpointing
