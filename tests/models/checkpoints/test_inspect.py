"""`stllm inspect`: the published size without a weight, golden folders, single files, audits that fail."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stllm.cli import main
from stllm.models.checkpoints.inspect import inspect_config, inspect_path, memory_by_dtype, parameters_by_part
from tests.helpers.tiny import tiny_model
from tests.models.checkpoints.conftest import FOREIGN, GOLDEN, change_weights


def test_the_published_size_is_built_without_memory(tmp_path: Path) -> None:
    cfg = tmp_path / "model.yaml"
    cfg.write_text("model: {model_type: instructblip_vicuna0, video_input: residual, mvm_decode: True}")
    found, report = inspect_config(cfg)
    assert report is None
    assert found["parameters"]["language model"]["total"] == 6_738_423_808  # LLaMA-7B and one [PAD] row twice
    assert found["parameters"]["vision encoder"]["total"] == 985_894_528  # EVA-ViT-g without its 40th block
    assert found["parameters"]["projection"]["total"] == 768 * 4096 + 4096
    assert found["parameters"]["video input"]["total"] == 2 * 4096 * 1024 + 4096 + 1024
    assert found["memory_bytes"]["float32"] == 4 * found["total"]["total"]
    assert found["memory_bytes"]["4bit"] < found["memory_bytes"]["8bit"] < found["memory_bytes"]["bfloat16 or float16"]
    wide, _ = inspect_config(
        cfg, ["model.llm.hidden_size=5120", "model.llm.num_hidden_layers=40", "model.llm.num_attention_heads=40"]
    )
    assert wide["sizes"]["language_model"]["hidden_size"] == 5120


def test_weights_that_are_not_here_do_not_stop_it(tmp_path: Path) -> None:
    cfg = tmp_path / "model.yaml"
    cfg.write_text("model: {model_type: minigpt4_vicuna0, llama_model: somewhere/vicuna}")
    found, _ = inspect_config(cfg)
    assert found["assumed"] == ["somewhere/vicuna is not here: its sizes are those of model.llm, or the published ones"]
    assert found["sizes"]["language_model"]["vocab_size"] == 32000


@pytest.mark.parametrize("name", ["instructblip_residual_mvm", "minigpt4_bta_mean"])
def test_a_checkpoint_is_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDEN / name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "released ST-LLM"
    assert found["family"] == ("InstructBLIP" if name.startswith("instruct") else "MiniGPT-4")
    assert ("temporal adapter" in found["parameters"]) == ("bta" in name)
    assert found["parameters"]["vision encoder"]["trainable"] == 0
    assert not any(part["missing"] or part["unexpected"] for part in found["audit"]["parts"].values())
    assert main(["inspect", str(GOLDEN / name)]) == 0
    out = capsys.readouterr().out
    assert "memory of the weights" in out and "language model, ignored: " in out


def test_what_had_to_be_assumed_is_said(golden_copy: Callable[[str], Path]) -> None:
    folder = golden_copy("minigpt4_plain_all")
    (folder / "meta.json").unlink()
    found, _ = inspect_path(folder, options=["model.vision.num_heads=4", "model.qformer.num_attention_heads=4"])
    assert "video_input = 'all' (the weights don't tell)" in found["assumed"]


def test_a_single_file_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(FOREIGN / "eva_vit_g.pth")]) == 0
    out = capsys.readouterr().out
    assert "EVA-ViT-g" in out and "depth 4" in out and "float16" in out


def test_an_audit_that_fails_is_shown_and_told(
    golden_copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden_copy("minigpt4_plain_all")

    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"]
        weights["something.else"] = torch.ones(1)

    change_weights(folder, change)
    assert main(["inspect", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "other, unexpected: something.else" in out
    assert "language model, missing: language_model.model.norm.weight" in out
    assert err.startswith("error: ") and "language_model.model.norm.weight" in err


def test_counts_are_those_of_the_model() -> None:
    model = tiny_model(mvm_decode=True, video_input="residual", freeze_llm=True)
    parts = parameters_by_part(model)
    assert sum(part["total"] for part in parts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(part["trainable"] for part in parts.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert memory_by_dtype(model)["float32"] == 4 * sum(p.numel() for p in model.parameters())
