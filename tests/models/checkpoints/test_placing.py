"""Quantised loading where it can't work, what it would ask of bitsandbytes, and audited device maps."""

import sys
import types
from typing import Any

import pytest
import torch

from stllm.common.errors import UserError
from stllm.models.checkpoints import loading, placing
from stllm.models.checkpoints.loading import load_model, load_opened, open_model
from stllm.models.checkpoints.placing import quantization_config
from stllm.models.factory import build_model
from tests.helpers.tiny import tiny_model
from tests.models.checkpoints.conftest import GOLDEN

NAME = GOLDEN / "minigpt4_plain_all"


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_quantisation_needs_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{name} loading needs a CUDA GPU"):
        load_model(NAME, device="cpu", quantization=name)


def test_quantisation_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantization_config("8bit", torch.float16)


def test_only_the_language_models_layers_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    config: Any = quantization_config("4bit", torch.bfloat16)
    assert config.load_in_4bit and not config.load_in_8bit
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    parts = {name for name, _ in tiny_model(mvm_decode=True).named_children()}
    assert parts - set(config.llm_int8_skip_modules) == {"language_model"}


def test_an_unknown_quantisation_lists_the_known() -> None:
    with pytest.raises(UserError, match="4bit, 8bit"):
        quantization_config("3bit", torch.bfloat16)


def test_the_published_8bit_switch_means_8bit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(*_: Any, **arguments: Any) -> None:
        asked.append(arguments)
        raise UserError("not here")

    monkeypatch.setattr(loading, "place", refuse)
    monkeypatch.setattr(placing, "place", refuse)
    with pytest.raises(UserError, match="not here"):
        load_opened(open_model(NAME, options=["model.low_resource=True"]), device="cpu")
    settings = {
        "ckpt": str(NAME),
        "image_size": 28,
        "qformer_text_input": False,
        "low_resource": True,
        "device_8bit": 1,
    }
    with pytest.raises(UserError, match="not here"):
        build_model(settings)
    assert [arguments["quantization"] for arguments in asked] == ["8bit", "8bit"]
    assert asked[1]["device"] == "cuda:1"
