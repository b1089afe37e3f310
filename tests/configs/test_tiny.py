"""configs/tiny: recipes load, and each stage of the pipeline starts from the output of the stage before."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from stllm.cli import main
from stllm.common.config import load_config
from stllm.runners.run_folder import RunFolder
from stllm.toy.world import write_world
from tests.configs.recipes import CONFIGS

TINY = CONFIGS / "tiny"
STAGES = ("0_vision", "0_letters", "0_language", "1_images", "2_videos", "3_masking", "4_long")
FEW = ["run.max_steps=2", "run.per_device_train_batch_size=2", "run.dataloader_num_workers=0", "run.logging_steps=1"]
LEARNED = {  # the parts that a stage changes
    "0_language": {"language_model"},
    "1_images": {"qformer", "projection", "language_model"},
    "2_videos": {"qformer", "projection", "language_model"},
    "3_masking": {"qformer", "projection", "language_model"},
    "4_long": {"qformer", "projection", "language_model"},
}
BEFORE = {"1_images": "0_vision", "4_long": "2_videos"}  # stages that do not start from the stage before


@pytest.mark.parametrize("path", [*TINY.glob("*.yaml"), *(TINY / "stages").glob("*.yaml")], ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_has_needs_launch_and_override_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = path.relative_to(CONFIGS.parent)
    assert "\n# Needs: " in text and re.search(rf"^# Launch: .*stllm train --cfg-path {named}\b", text, re.M)
    override = re.search(r"^# Override: --options (.*?)(?:   \(.*\))?$", text, re.M)
    assert override is not None
    config = load_config(path, override[1].split())
    assert config.model.system == ""  # recipes train without a system sentence, so none is used in questions


@pytest.mark.slow
def test_each_stage_starts_from_the_output_of_the_stage_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage trains two steps on a few clips: frozen parts stay the same, trained parts change."""
    world, output = tmp_path / "world", tmp_path / "output"
    write_world(world, num_train=24, num_test=8, seed=3, long=True)
    monkeypatch.setenv("TOY_ROOT", str(world))
    monkeypatch.setenv("TINY_OUTPUT", str(output))
    left: dict[str, dict[str, Tensor]] = {}
    for number, stage in enumerate(STAGES):
        recipe = str(TINY / "stages" / f"{stage}.yaml")
        options = [*FEW, f"run.output_dir={output / stage}"]
        if stage == "4_long":  # from features of the short clips, which are the same for all data sets
            clips = str(TINY / "stages" / "base" / "clips.yaml")
            assert main(["extract", "--device", "cpu", "--cfg-path", clips, "--output", str(output / "features")]) == 0
            entries = load_config(recipe).datasets.items()
            short = [name for name, entry in entries if isinstance(entry, DictConfig) and entry.get("num_frames") == 8]
            options += [f"datasets.{name}.features_dir={output / 'features' / 'toy_path'}" for name in short]
        assert main(["train", "--device", "cpu", "--cfg-path", recipe, "--options", *options]) == 0
        assert RunFolder(str(output / stage)).is_finished()
        after = left[stage] = load_file(output / stage / "model.safetensors")
        if stage == "0_vision":
            assert {key.split(".")[0] for key in after} == {"vision_encoder", "qformer"}
        if stage in LEARNED:
            before = left[BEFORE.get(stage, STAGES[number - 1])]
            if stage == "1_images":
                before = {**left["0_language"], **before}
            changed = {key.split(".")[0] for key, tensor in before.items() if not torch.equal(tensor, after[key])}
            assert changed == LEARNED[stage]
    config: dict[str, Any] = dict(load_config(TINY / "stages" / "3_masking.yaml").model)
    assert config["use_mask"] and config["mvm_decode"]
    assert any(key.startswith("mvm_decoder.") for key in left["3_masking"])
    assert any(key.startswith("video_input.") for key in left["4_long"])
    assert sum(tensor.nbytes for tensor in left["4_long"].values()) < 12e6  # what is shipped
