"""FSDP 2 on CPUs: the memory of each process while loading, the types of weights, and resuming."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.helpers.training import ROOT, losses, train, write_recipe

pytestmark = pytest.mark.slow
LORA: dict[str, Any] = {"lora_r": 2, "freeze_LLM": True, "freeze_vit": True, "freeze_qformer": True}
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}


def test_no_process_holds_a_whole_model_while_it_loads(toy: Path, tmp_path: Path) -> None:
    """The language model has 200 million weights, stored in bfloat16 and trained in float32 (780 MiB)."""
    own, wide = toy / "language_model", tmp_path / "language_model"
    config = AutoConfig.from_pretrained(own, **WIDE, num_key_value_heads=8, head_dim=128, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(wide)
    AutoTokenizer.from_pretrained(own).save_pretrained(wide)
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={"llama_model": str(wide)}, fsdp=True)
    shares = {}
    for how in ("divided", "whole"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launch, "-m", "tests.helpers.loading", str(recipe), how]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
        found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        assert len(found) == 2 and all(one["weights"] > 700 << 20 for one in found)
        shares[how] = max(one["growth"] / one["weights"] for one in found)
    assert shares["divided"] <= 0.75 < 1 <= shares["whole"]


def test_frozen_weights_are_in_half_precision_and_any_number_of_processes_continues(toy: Path, tmp_path: Path) -> None:
    """With LoRA in bfloat16, two processes give the losses of one, and three and one can continue a run of two."""
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model=LORA, bf16=True, max_steps=5, save_steps=2)

    def run(name: str, processes: int, *options: str) -> list[list[float]]:
        size = f"run.per_device_train_batch_size={6 // processes}"
        train(recipe, f"run.output_dir={tmp_path / name}", size, *options, processes=processes)
        return losses(tmp_path / name)

    alone, two = run("alone", 1), run("two", 2, "run.fsdp=True")
    for found, expected in zip(two, alone, strict=True):
        assert found == pytest.approx(expected, abs=0.05)  # rounded to 8 bits at other places
    with safe_open(tmp_path / "two" / "model.safetensors", framework="pt") as weights:
        kinds = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    trained = {key for key in kinds if "lora_" in key or key.startswith(("projection.", "mvm_decoder."))}
    assert len(trained) > 6
    assert {kinds[key] for key in trained} == {"F32"} and {kinds[key] for key in kinds.keys() - trained} == {"BF16"}

    for processes in (3, 1):
        name = f"continued_by_{processes}"
        folder = tmp_path / name
        shutil.copytree(tmp_path / "two", folder, ignore=shutil.ignore_patterns("checkpoint-[45]", "model.safetensors"))
        shutil.copy(tmp_path / "two" / "checkpoint-2" / "model.safetensors", folder / "checkpoint-2")
        (folder / "config.json").unlink()
        for found, expected in zip(run(name, processes, "run.fsdp=True"), two, strict=True):
            assert found == pytest.approx(expected, abs=0.05)
