"""Fixtures: weights of golden folders, copies of these folders to change, and small language models of `foreign/`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "golden"
FOREIGN = GOLDEN / "foreign"
FOLDERS = (
    "instructblip_bta_all_mvm",
    "instructblip_bta_mean",
    "instructblip_residual_mvm",
    "minigpt4_bta_all_mvm",
    "minigpt4_bta_mean",
    "minigpt4_plain_all",
)
# what cannot be inferred from the foreign files, because their sizes are not the published ones
HEADS = ["model.vision.num_heads=4", "model.qformer.num_attention_heads=4"]


def golden_weights(name: str) -> dict[str, torch.Tensor]:
    """Return the weights of a golden folder under their released names."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((GOLDEN / name).glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
    return weights


@pytest.fixture(scope="session")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return `foreign/vicuna_for_<family>` with the weights of that family's golden model, without [PAD]."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name = {"instructblip": "instructblip_residual_mvm", "minigpt4": "minigpt4_plain_all"}[family]
            folder = tmp_path_factory.mktemp("vicuna") / family
            shutil.copytree(FOREIGN / f"vicuna_for_{family}", folder)
            weights = {key: value for key, value in golden_weights(name).items() if "stllm_model" not in key}
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                weights[key] = weights[key][:512].clone()
            torch.save(weights, folder / "pytorch_model.bin")
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def golden_copy(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a golden folder to tmp_path/<name>, with the BERT vocabulary where meta.json expects it."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        if not (tmp_path / "foreign").exists():
            shutil.copytree(FOREIGN / "bert", tmp_path / "foreign" / "bert")
        return folder

    return copy


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Apply `change` to all weights of a released folder, and save them in one shard."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
        file.unlink()
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
