"""configs/tiny: recipes load, and each stage of the pipeline starts from the output of the stage before."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from stllm.cli import main
from stllm.common.config import load_config
from stllm.common.registry import templates
from stllm.evaluation.benchmarks.mvbench import prompt_pieces
from stllm.processors.templates import SYSTEM, question_block
from stllm.runners.run_folder import RunFolder
from stllm.toy.questions import Asked
from stllm.toy.world import write_world
from tests.configs.recipes import CONFIGS

TINY = CONFIGS / "tiny"
STAGES = ("1_alignment", "2_images", "3_videos", "4_choices")
FEW = ["run.max_steps=2", "run.per_device_train_batch_size=2", "run.dataloader_num_workers=0", "run.logging_steps=1"]


@pytest.mark.parametrize("path", [*TINY.glob("*.yaml"), *(TINY / "stages").glob("*.yaml")], ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_has_needs_launch_and_override_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = path.relative_to(CONFIGS.parent)
    assert "\n# Needs: " in text and re.search(rf"^# Launch: .*stllm train --cfg-path {named}\b", text, re.M)
    override = re.search(r"^# Override: --options (.*?)(?:   \(.*\))?$", text, re.M)
    assert override is not None
    config = load_config(path, override[1].split())
    assert config.model.system == ""  # recipes train without a system sentence, so none is used in questions


@pytest.mark.parametrize("name", ["stages/3_videos", "stages/4_choices", "stages/temporal_base", "temporal"])
def test_multiple_choice_is_trained_with_the_tokens_of_mvbench(name: str, toy: Path) -> None:
    """In the template of the recipe, the instruction stands where the benchmark has it, and so does everything else."""
    config = load_config(TINY / f"{name}.yaml")
    instruction = config.datasets.toy_picture_choices.instruction[-1]
    template, asked = templates.get(config.model.template), Asked("Where is it?", "left", ("right", "left", "up"))
    choice = replace(asked.as_choice(), instruction=instruction)
    trained = [*template.render(choice, first=True, media="video"), str(choice.answer)]
    evaluated = prompt_pieces(question_block(asked.question, asked.options), SYSTEM, template)
    tokenizer = AutoTokenizer.from_pretrained(toy / "language_model")
    ids, expected = (
        [token for piece in pieces for token in tokenizer.encode(piece)] for pieces in (trained, evaluated)
    )
    assert ids[: len(expected)] == expected
    assert tokenizer.decode(ids[len(expected) :]) == "B) left"


@pytest.mark.slow
def test_each_stage_starts_from_the_output_of_the_stage_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage trains two steps on a few clips: frozen parts stay the same, trained parts change."""
    world, output = tmp_path / "world", tmp_path / "output"
    write_world(world, num_train=24, num_test=8, seed=3, long=True)
    monkeypatch.setenv("TOY_ROOT", str(world))
    monkeypatch.setenv("TINY_OUTPUT", str(output))
    before: dict[str, Tensor] = {}
    for stage in STAGES:
        recipe, options = str(TINY / "stages" / f"{stage}.yaml"), [*FEW, f"run.output_dir={output / stage}"]
        if stage in STAGES[1:]:  # from features of the frozen encoder and Q-Former
            words = ["--cfg-path", recipe, "--stage", "qformer", "--output", str(output / "features")]
            assert main(["extract", "--device", "cpu", *words]) == 0
            options.append(f"datasets.features_root={output / 'features'}")
        assert main(["train", "--device", "cpu", "--cfg-path", recipe, "--options", *options]) == 0
        assert RunFolder(str(output / stage)).is_finished()
        after = load_file(output / stage / "model.safetensors")
        if stage == "1_alignment":
            assert {key.split(".")[0] for key in after} == {"vision_encoder", "qformer"}
        elif stage == "2_images":
            assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        else:
            changed = {key.split(".")[0] for key, tensor in before.items() if not torch.equal(tensor, after[key])}
            assert changed == {"projection", "language_model"}
        before = after
    assert any(key.startswith("video_input.") for key in before)
    assert sum(tensor.nbytes for tensor in before.values()) < 12e6  # what is shipped
    mvbench = ["--anno-path", str(world / "mvbench"), "--output-dir", str(tmp_path / "result"), "--limit", "1"]
    assert main(["evaluate", "mvbench", "--device", "cpu", "--ckpt-path", str(output / "4_choices"), *mvbench]) == 0
