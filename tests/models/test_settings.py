"""The `model` section: translation of its keys to fields and back, and the settings that the user made."""

from pathlib import Path

import pytest

from stllm.common.errors import UserError
from stllm.models.settings import explicit_settings, published_settings, settings_to_fields
from tests.helpers.tiny import tiny_config


def test_every_field_survives_translation_to_published_names_and_back() -> None:
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


def test_only_settings_of_the_user_are_explicit(tmp_path: Path) -> None:
    assert explicit_settings() == {}
    assert explicit_settings(options=["model.video_input=mean"]) == {"video_input": "mean"}
    cfg = tmp_path / "user.yaml"
    cfg.write_text("model: {vision: {depth: 7}, residual_size: 5}\nrun: {}")
    assert explicit_settings(cfg, ["model.vision.num_heads=2"]) == {
        "vision": {"depth": 7, "num_heads": 2},
        "residual_size": 5,
    }
    cfg.write_text("model: {model_type: minigpt4_vicuna0_btadapter}")  # model_type sets its defaults
    said = explicit_settings(cfg)
    assert said["vit_model"] == "eva_btadapter_g" and said["qformer_text_input"] is False
    assert "image_size" not in said
    top = tmp_path / "top.yaml"  # settings of the base file count, too
    top.write_text("base: user.yaml\nmodel: {residual_size: 3}")
    assert explicit_settings(top) == {**said, "residual_size": 3}


def test_a_mistyped_key_is_refused() -> None:
    with pytest.raises(UserError, match="video_imput"):
        explicit_settings(options=["model.video_imput=mean"])
