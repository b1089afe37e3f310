"""FSDP 2 and ZeRO-3 on CPUs: the memory of each process while loading, the types of weights, and resuming."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stllm.cli import main
from tests.helpers.training import ROOT, losses, train, write_recipe

LORA: dict[str, Any] = {"lora_r": 2, "freeze_LLM": True, "freeze_vit": True, "freeze_qformer": True}
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}


FSDP = "run.fsdp=True"
ZERO3 = f"run.deepspeed={ROOT}/configs/deepspeed/zero3.json"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [FSDP, pytest.param(ZERO3, marks=needs_deepspeed)])
def test_no_process_holds_a_whole_model_while_it_loads(toy: Path, tmp_path: Path, sharding: str) -> None:
    """The language model has 200 million weights, stored in bfloat16 and trained in float32 (780 MiB)."""
    own, wide = toy / "language_model", tmp_path / "language_model"
    config = AutoConfig.from_pretrained(own, **WIDE, num_key_value_heads=8, head_dim=128, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(wide)
    AutoTokenizer.from_pretrained(own).save_pretrained(wide)
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={"llama_model": str(wide)})
    shares = {}
    for how in ("divided", "whole"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launch, "-m", "tests.helpers.loading", str(recipe), how, sharding]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
        found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        assert len(found) == 2 and all(one["weights"] > 700 << 20 for one in found)
        shares[how] = max(one["growth"] / one["weights"] for one in found)
    assert shares["divided"] <= 0.75 < 1 <= shares["whole"]


@pytest.mark.slow
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


@pytest.mark.slow
@needs_deepspeed
def test_zero3_learns_what_one_process_does_and_continues(toy: Path, tmp_path: Path) -> None:
    """From files in our format, with frozen weights; the trained model is whole, and names what trained."""
    recipe = write_recipe(tmp_path / "first.yaml", toy, max_steps=1)
    train(recipe)
    model = {"ckpt": str(tmp_path / "run"), "fresh": [], "freeze_vit": True}
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model=model, max_steps=4, save_steps=2)
    train(recipe, f"run.output_dir={tmp_path / 'alone'}")
    options = [f"run.output_dir={tmp_path / 'two'}", "run.per_device_train_batch_size=2", ZERO3]
    train(recipe, *options, processes=2)
    alone, two = losses(tmp_path / "alone"), losses(tmp_path / "two")
    for found, expected in zip(two, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    trained = load_file(tmp_path / "two" / "model.safetensors")
    for key, weight in load_file(tmp_path / "alone" / "model.safetensors").items():
        torch.testing.assert_close(trained[key], weight, rtol=0.02, atol=2e-3)

    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    (tmp_path / "two" / "config.json").unlink()
    train(recipe, *options, processes=2)
    assert losses(tmp_path / "two") == two


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model_fsdp.bin", "divided by FSDP, but now it is whole in each process: continue with run.fsdp=True"),
        ("global_step1", "divided by DeepSpeed, but now it is whole in each process: continue with run.deepspeed"),
    ],
)
def test_what_was_divided_is_not_continued_whole(
    file: str,
    words: str,
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence, before any weight is read; with the model alone the run continues."""
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=1)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / file).mkdir()
    options = [f"run.output_dir={tmp_path / 'other'}", f"run.resume_from_checkpoint={checkpoint}", "run.max_steps=2"]
    with monkeypatch.context() as patched:
        patched.setattr("stllm.runners.train._build_model", lambda *_: pytest.fail("weights are read"))
        assert main(["train", "--cfg-path", str(recipe), "--options", *options]) == 1
    assert words in capsys.readouterr().err
    assert main(["train", "--cfg-path", str(recipe), "--options", *options, "run.resume_only_model=True"]) == 0
    assert len(losses(tmp_path / "other")) == 1
