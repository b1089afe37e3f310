"""From a configuration to a model: published keys, what the user said, weights from pieces or from nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

import stllm
from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.models.factory import (
    build_audited,
    build_model,
    config_from_settings,
    explicit_settings,
    published_settings,
    settings_to_fields,
)
from tests.helpers.tiny import tiny_batch, tiny_config
from tests.models.checkpoints.conftest import GOLDEN


def test_a_tiny_model_is_built_from_nothing() -> None:
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


def test_two_seeds_two_models_one_seed_one() -> None:
    cfg = load_config(model_type="tiny")
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build_model(cfg, device="cpu").projection.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_public_name_is_the_same() -> None:
    assert stllm.build_model is build_model


def test_every_field_survives_the_way_through_the_published_names() -> None:
    config = tiny_config(
        encoder="eva_btadapter_g",
        video_input="residual",
        residual_size=3,
        mask_rate={"mean": 0.4, "max": 0.6},
        freeze_llm=True,
        system="Look.",
        template="minigpt4",
        mvm_decode=True,
    )
    fields = settings_to_fields(published_settings(config))
    for name, value in fields.items():
        found = getattr(config, name)
        if isinstance(value, dict):
            assert {key: found[key] for key in value} == value
        else:
            assert found == value, name


def test_lora_and_sizes_are_grouped() -> None:
    settings = {
        "lora_r": 4,
        "lora_alpha": 8,
        "vision": {"depth": 2, "num_heads": None},
        "qformer": {},
        "llm": {},
        "ckpt": None,
    }
    assert settings_to_fields(settings) == {
        "lora": {"r": 4, "alpha": 8, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "vision_config": {"depth": 2},
    }
    assert settings_to_fields({"lora_r": 0}) == {"lora": None}


def test_only_what_the_user_said_counts_as_said(tmp_path: Path) -> None:
    assert explicit_settings() == {}
    assert explicit_settings(options=["model.video_input=mean"]) == {"video_input": "mean"}
    cfg = tmp_path / "user.yaml"
    cfg.write_text("model: {vision: {depth: 7}, residual_size: 5}\nrun: {}")
    assert explicit_settings(cfg, ["model.vision.num_heads=2"]) == {
        "vision": {"depth": 7, "num_heads": 2},
        "residual_size": 5,
    }
    cfg.write_text("model: {model_type: minigpt4_vicuna0_btadapter}")  # naming a model says what it is
    said = explicit_settings(cfg)
    assert said["vit_model"] == "eva_btadapter_g" and said["qformer_text_input"] is False
    assert "image_size" not in said
    top = tmp_path / "top.yaml"  # what its base says was said too
    top.write_text("base: user.yaml\nmodel: {residual_size: 3}")
    assert explicit_settings(top) == {**said, "residual_size": 3}


def test_a_mistyped_key_is_refused() -> None:
    with pytest.raises(UserError, match="video_imput"):
        explicit_settings(options=["model.video_imput=mean"])


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
    parts = {part for part, audit in report.parts.items() if audit.fresh}
    assert parts == {"temporal adapter", "video input", "mvm decoder"}
    encoder: Any = model.vision_encoder
    spatial, block = encoder.adapter.spatial[0], encoder.backbone.blocks[1]
    assert torch.equal(spatial.mlp.fc1.weight, block.mlp.fc1.weight)  # of the loaded weights


def test_gradient_checkpointing_is_switched_on() -> None:
    cfg = load_config(options=["model.use_grad_checkpoint=True"], model_type="tiny")
    assert build_model(cfg, device="cpu").vision_encoder.gradient_checkpointing
