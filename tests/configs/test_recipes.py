"""The recipes under configs/train: they parse, build at full size, give valid TrainingArguments, and no typo passes."""

import copy
import dataclasses
import json
import re
import shutil
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import TrainingArguments

from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.common.schema import RunSettings
from stllm.datasets.corpora import resolved_settings
from stllm.models.checkpoints.inspect import parameters_by_part
from stllm.models.factory import build_audited
from tests.common.test_config import PUBLISHED
from tests.configs.recipes import CONFIGS, RECIPES, full_size

ADAPTER, LLM, SMALL = "temporal adapter", "language model", {"projection", "video input", "mvm decoder"}
TRAINED = {  # the parts that learn something
    "instructblip_avp": {ADAPTER, "projection"},
    "minigpt4_avp": {ADAPTER, "projection"},
    "instructblip_qa": {ADAPTER, "projection", "mvm decoder", LLM},
    "minigpt4_qa": {ADAPTER, "projection", "mvm decoder", LLM},
    "lora_one_gpu": {*SMALL, LLM},
    "own_data": {*SMALL, LLM},
    "instructblip_conversation": {*SMALL, LLM},
    "fsdp": {*SMALL, LLM},
    "image_video_joint": {*SMALL, LLM},
    "published": {*SMALL, LLM},
}
OWN = "own"  # a data set of the user's own: any spelling of its name is right


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipes, with the published text among them."""
    copied = tmp_path_factory.mktemp("recipes") / "configs"
    shutil.copytree(CONFIGS, copied)
    (copied / "train" / "published.yaml").write_text(PUBLISHED, encoding="utf-8")
    return copied / "train"


@pytest.mark.parametrize("name", [*RECIPES, "published"])
def test_a_recipe_builds_at_full_size(name: str, folder: Path) -> None:
    cfg = load_config(folder / f"{name}.yaml")
    parts = parameters_by_part(full_size(cfg))
    assert {part for part, count in parts.items() if count["trainable"]} == TRAINED[name]
    assert parts["vision encoder"]["total"] == 985_894_528
    whole = 6_738_423_808 if cfg.model.qformer_text_input else 6_738_415_616  # Vicuna-7B, with [PAD] and without
    lora = 32 * 2 * (16 * 4096 + 4096 * 16) if cfg.model.lora_r else 0  # layers, q and v, rank 16
    assert parts[LLM] == {"total": whole + lora, "trainable": lora if cfg.model.freeze_LLM else whole}


@pytest.mark.parametrize("name", [*RECIPES, "published"])
def test_a_recipe_gives_training_arguments(name: str, folder: Path, tmp_path: Path) -> None:
    run = OmegaConf.to_container(load_config(folder / f"{name}.yaml").run)
    assert isinstance(run, dict)
    ours = {f.name for f in dataclasses.fields(RunSettings)}
    said = {str(key): value for key, value in run.items() if key not in ours and value is not None}
    zero = said.pop("deepspeed", None)  # it would need the package
    # bf16 passes on a CPU that is asked for
    arguments = TrainingArguments(**{**said, "output_dir": str(tmp_path), "use_cpu": True})
    assert arguments.bf16 and arguments.lr_scheduler_type == "cosine" and arguments.get_warmup_steps(1000) == 30
    assert (arguments.fsdp_plugin_args is not None) == (name == "fsdp")
    assert zero is None or json.loads(Path(zero).read_text(encoding="utf-8"))["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("name", RECIPES)
def test_the_data_sets_of_a_recipe_are_known(name: str) -> None:
    entries = resolved_settings(load_config(CONFIGS / "train" / f"{name}.yaml"))
    assert all(entry.anno_path or entry.shards for entry in entries.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_of_a_recipe_says_how(name: str) -> None:
    text = (CONFIGS / "train" / f"{name}.yaml").read_text(encoding="utf-8")
    header = text[: text.index("\nbase:")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(
        rf"^# Launch: (bash scripts/train.sh|stllm train --cfg-path) configs/train/{name}.yaml$", header, re.M
    )
    assert "\n# Needs: " in header
    override = re.search(r"^# Override: --options (.*?)(?:   \(.*\))?$", header, re.M)
    assert override is not None
    load_config(CONFIGS / "train" / f"{name}.yaml", override[1].split())


def test_the_avp_stage_s_weights_start_the_qa_stage(tmp_path: Path) -> None:
    """At a tiny size: what the one recipe leaves is what the other names; the MVM decoder alone starts fresh."""
    tiny = ["model.model_type=tiny", "model.vit_model=eva_btadapter_g", "model.vit_ckpt=null"]
    nothing = ["model.llama_model=null", "model.q_former_model=null"]
    avp, _ = build_audited(load_config(CONFIGS / "train" / "instructblip_avp.yaml", [*tiny, *nothing]), device="cpu")
    assert (avp.config.video_input, avp.config.freeze_llm) == ("mean", True)
    avp.save_pretrained(tmp_path)
    cfg = load_config(CONFIGS / "train" / "instructblip_qa.yaml", [*tiny, f"model.ckpt={tmp_path}"])
    qa, report = build_audited(cfg, device="cpu")
    assert (qa.config.video_input, qa.config.use_mask, qa.config.freeze_llm) == ("all", True, False)
    assert {key.split(".")[0] for key in report.keys("fresh")} == {"mvm_decoder"}
    weights = qa.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in avp.state_dict().items())


def test_a_whole_misspelled_section_is_caught(folder: Path) -> None:
    for section in ("base", "model", "datasets", "run"):
        raw = _raw(folder / "instructblip_qa.yaml")
        raw[section + "s"] = raw.pop(section, {})
        assert f"did you mean '{section}'?" in _refused(folder, raw)


@pytest.mark.parametrize("name", [*RECIPES, "published", "base/common", "base/avp", "base/qa", "base/lora"])
def test_every_misspelled_key_is_refused_and_the_nearest_named(name: str, folder: Path) -> None:
    """One letter doubled, in every key of every file."""
    raw = _raw(folder / f"{name}.yaml")
    for key, path in {path[-1]: path for path in _key_paths(raw)}.items():
        middle = len(key) // 2
        wrong = key[:middle] + key[middle] + key[middle:]
        message = _refused((folder / name).parent, _renamed(raw, path, wrong))
        assert wrong in message and f"did you mean '{key}'?" in message


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_no_misspelling_passes(folder: Path, data: st.DataObject) -> None:
    """A letter more, less or other, anywhere in any key."""
    name = data.draw(st.sampled_from(RECIPES))
    raw = _raw(folder / f"{name}.yaml")
    path = data.draw(st.sampled_from(list(_key_paths(raw))))
    key, letter = path[-1], data.draw(st.sampled_from(string.ascii_lowercase))
    place, removed = data.draw(st.integers(0, len(key))), data.draw(st.integers(0, 1))
    wrong = key[:place] + letter + key[place + removed :]
    assume(wrong != key)
    assert wrong in _refused(folder, _renamed(raw, path, wrong))


def _raw(path: Path) -> dict[str, Any]:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(raw, dict)
    return raw


def _key_paths(raw: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys below the sections, each as its way from the top; below published keys without an effect are none."""
    for key, value in raw.items():
        path = (*prefix, key)
        if len(path) > 1 and key != OWN and path[0] != "preprocess":
            yield path
        if isinstance(value, dict) and key != "vis_processor":
            yield from _key_paths(value, path)


def _renamed(raw: Mapping[str, Any], path: tuple[str, ...], name: str) -> dict[str, Any]:
    changed = copy.deepcopy(dict(raw))
    section = changed
    for part in path[:-1]:
        section = section[part]
    section[name] = section.pop(path[-1])
    return changed


def _refused(folder: Path, raw: Mapping[str, Any]) -> str:
    """The sentence with which a configuration, beside the recipes, is refused."""
    path = folder / "typo.yaml"
    path.write_text(yaml.safe_dump(dict(raw)), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        resolved_settings(load_config(path, model_type="tiny"))
    return str(caught.value)
