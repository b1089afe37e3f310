"""`stllm inspect`: the published size without weights, golden folders, single files, failed audits, training memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from stllm.cli import main
from stllm.models.checkpoints.inspect import (
    ParameterCounts,
    count_parameters,
    inspect_config,
    inspect_path,
    memory_by_dtype,
    parameters_by_part,
    training_memory,
)
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


def test_missing_weight_files_do_not_stop_inspect(tmp_path: Path) -> None:
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


def test_assumed_settings_are_listed(golden_copy: Callable[[str], Path]) -> None:
    folder = golden_copy("minigpt4_plain_all")
    (folder / "meta.json").unlink()
    found, _ = inspect_path(folder, options=["model.vision.num_heads=4", "model.qformer.num_attention_heads=4"])
    assert "video_input = 'all' (the weights don't tell)" in found["assumed"]


def test_a_single_file_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(FOREIGN / "eva_vit_g.pth")]) == 0
    out = capsys.readouterr().out
    assert "EVA-ViT-g" in out and "depth 4" in out and "float16" in out


def test_a_failed_audit_is_shown_and_gives_an_exit_code(
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


def test_parameter_counts_equal_those_of_the_model() -> None:
    model = tiny_model(mvm_decode=True, video_input="residual", freeze_llm=True)
    parts = parameters_by_part(model)
    assert sum(part["total"] for part in parts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(part["trainable"] for part in parts.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert memory_by_dtype(model)["float32"] == 4 * sum(p.numel() for p in model.parameters())


COUNTS = ParameterCounts(frozen=100, trained=40, largest=7, gathered=20)


class Layer(nn.Linear):
    """4 x 4 weights and 4 biases: 20 parameters."""

    def __init__(self) -> None:
        super().__init__(4, 4)


class Model(nn.Module):
    _no_split_modules = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)  # 40
        self.layers = nn.Sequential(Layer(), Layer())  # 20 each
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight  # a tied weight counts once
        self.layers[0].requires_grad_(False)


def test_parameters_are_counted() -> None:
    counts = count_parameters(Model())
    assert counts == ParameterCounts(frozen=20, trained=60, largest=40, gathered=20 + 40)
    model = tiny_model(freeze_llm=True)
    counts = count_parameters(model)
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.all == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("strategy", "one", "eight", "host_one", "host_eight"),
    [
        # bytes a parameter: frozen 2; trained 4 + 4 + 8, and 4 in DDP's buckets
        ("DDP", 200 + 640, 200 + 640 + 160, 0, 0),
        # 2 a parameter; trained: 2 + 4 + 4 + 8, sharded; loading: 2 a parameter in each process
        ("ZeRO-2", 280 + 720, 280 + 90, 280, 2240),
        ("ZeRO-2 offload", 280, 280, 640, 2240),
        # 2 a parameter, and 16 a trained one, sharded; 4 a parameter of the largest module
        # each process loads only its share
        ("ZeRO-3", 28 + 280 + 640, 28 + 35 + 80, 0, 0),
        ("ZeRO-3 offload", 28, 28, 280 + 640, 920),
        # frozen 2, trained 16, sharded; 4 a gathered parameter
        ("FSDP", 80 + 200 + 640, 80 + 25 + 80, 0, 0),
        ("FSDP offload", 80, 80, 200 + 640, 840),
    ],
)
def test_bytes_of_each_strategy(strategy: str, one: int, eight: int, host_one: int, host_eight: int) -> None:
    figures = training_memory(COUNTS, half=True)[strategy]
    assert figures == {"gpu": {1: one, 8: eight}, "host": {1: host_one, 8: host_eight}}


def test_no_deepspeed_memory_is_computed_for_float32() -> None:
    figures = training_memory(COUNTS, half=False, num_gpus=[2])
    assert figures == {
        "DDP": {"gpu": {2: 400 + 800}, "host": {2: 0}},
        "FSDP": {"gpu": {2: 160 + 520}, "host": {2: 0}},
        "FSDP offload": {"gpu": {2: 160}, "host": {2: 1040}},
    }


def test_inspect_computes_the_training_memory_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = tmp_path / "train.yaml"
    cfg.write_text("model: {model_type: instructblip_vicuna0_btadapter, freeze_LLM: False}\nrun: {bf16: True}")
    assert main(["inspect", "--cfg-path", str(cfg), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["training_memory_bytes"]
    assert found["precision"] == "bfloat16"
    trained = 105_600_128 + 3_149_824 + 6_738_423_808  # the adapter, the projection, the language model
    frozen = 985_894_528 + 2_816 + 185_684_736
    assert found["strategies"]["DDP"]["gpu"] == {"1": 2 * frozen + 16 * trained, "8": 2 * frozen + 20 * trained}
    assert found["strategies"]["ZeRO-2"]["gpu"]["8"] == 2 * (frozen + trained) + 18 * trained // 8
    embeddings = 32001 * 4096  # the module with most parameters of its own
    assert found["strategies"]["ZeRO-3 offload"]["gpu"]["1"] == 4 * embeddings


@pytest.mark.parametrize(
    ("run", "told"), [("{bf16: True}", "bfloat16"), ("{fp16: True}", "float16"), ("{max_steps: 1}", "float32")]
)
def test_inspect_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, told: str) -> None:
    cfg = tmp_path / "train.yaml"
    cfg.write_text(f"model: {{model_type: tiny}}\nrun: {run}")
    assert main(["inspect", "--cfg-path", str(cfg)]) == 0
    out = capsys.readouterr().out
    assert f"training in {told} with AdamW" in out and "FSDP offload" in out
    assert ("ZeRO-3" in out) == (told != "float32")


def test_no_training_memory_is_computed_without_a_run_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tmp_path / "model.yaml"
    cfg.write_text("model: {model_type: tiny}")
    assert main(["inspect", "--cfg-path", str(cfg), "--json"]) == 0
    assert "training_memory_bytes" not in json.loads(capsys.readouterr().out)
