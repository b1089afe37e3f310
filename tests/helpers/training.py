"""A tiny run for tests: a recipe on a small toy world, and commands to train it in one or several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MODEL: dict[str, Any] = {
    "model_type": "instructblip_vicuna0",
    "image_size": 32,
    "vision": {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
    "num_query_token": 2,
    "qformer": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 160,
        "vocab_size": 513,
        "dropout": 0.0,  # drawn by each process for itself, so that losses would depend on their number
    },
    "fresh": ["vision_encoder", "qformer"],
    "freeze_vit": False,
    "freeze_qformer": False,
    "freeze_LLM": False,
    "use_mask": True,
    "mvm_decode": True,
    "max_txt_len": 64,
}
RUN: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": 3,
    "use_cpu": True,
}
VIDEOS = ("vqa/toy_direction", "reasoning/toy_state", "caption/toy_caption")


def write_recipe(
    path: Path, toy: Path, *, model: dict[str, Any] | None = None, datasets: dict[str, Any] | None = None, **run: Any
) -> Path:
    """Write a YAML that trains on the toy world in `toy`, with its output in the folder `run` beside it."""
    language = {"llama_model": str(toy / "language_model"), "qformer_tokenizer": str(toy / "qformer_tokenizer")}
    entries: dict[str, Any] = {"anno_root": str(toy / "vc2"), "media_root": str(toy / "vc2")}
    if datasets is None:
        for name in VIDEOS:
            entries[Path(name).name] = {"anno_path": f"video/{name}/train.json", "media_dir": "media", "num_frames": 4}
    content = {
        "model": {**MODEL, **language, **(model or {})},
        "datasets": {**entries, **(datasets or {})},
        "run": {**RUN, "output_dir": str(path.parent / "run"), **run},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def command(recipe: Path, *options: str, processes: int = 1) -> list[str]:
    """Return the command line that trains; for several processes and FSDP with torchrun."""
    launch = [sys.executable]
    if processes > 1 or "run.fsdp=True" in options:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launch, "-m", "stllm", "train", "--cfg-path", str(recipe), *(["--options", *options] if options else [])]


def train(recipe: Path, *options: str, processes: int = 1, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command to its end and check its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command(recipe, *options, processes=processes), capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == code, result.stderr[-3000:]
    return result


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_losses(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    """Check the losses of two runs that divide the same batches differently, line by line.

    The first line comes before the first update. Later ones differ more: AdamW's first updates enlarge rounding,
    up to 4.6e-5, with both signs, between a padded and a packed run.
    """
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(other, abs=2e-4 if step else 1e-5), f"line {step + 1}"


def losses(folder: Path, names: Sequence[str] = ("loss", "loss_lm", "loss_mvm")) -> list[list[float]]:
    """Return the losses of each line."""
    return [[line[name] for name in names] for line in read_log(folder)]
