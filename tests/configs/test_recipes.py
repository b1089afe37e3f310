"""configs/train: recipes have the published values, build at full size, and refuse misspelled keys."""

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from stllm.cli import main
from stllm.common.config import load_config, yaml_layers
from stllm.common.errors import UserError
from stllm.common.schema import RunSettings
from stllm.datasets.corpora import resolved_settings
from stllm.models.build import build_audited
from stllm.models.checkpoints.inspect import parameters_by_part
from tests.common.test_config import PUBLISHED
from tests.configs.recipes import CONFIGS, RECIPES, full_size
from tests.helpers.training import read_log
from tests.helpers.videos import write_video
from tests.models.checkpoints.conftest import FOREIGN, HEADS

ADAPTER, LLM, SMALL = "temporal adapter", "language model", {"projection", "video input", "mvm decoder"}
TRAINED = {  # recipe -> its trainable parts
    "instructblip_avp": {ADAPTER, "projection", LLM},
    "minigpt4_avp": {ADAPTER, "projection", LLM},
    "instructblip_avp_frozen_llm": {ADAPTER, "projection"},
    "instructblip_qa": {ADAPTER, "projection", "mvm decoder", LLM},
    "instructblip_qa_all_corpora": {ADAPTER, "projection", "mvm decoder", LLM},
    "minigpt4_qa": {ADAPTER, "projection", "mvm decoder", LLM},
    "lora_one_gpu": {*SMALL, LLM},
    "own_data": {*SMALL, LLM},
    "own_shards": {*SMALL, LLM},
    "instructblip_conversation": {*SMALL, LLM},
    "fsdp": {*SMALL, LLM},
    "image_video_joint": {*SMALL, LLM},
    "published": {*SMALL, LLM},
}
BASES = [f"base/{path.stem}" for path in sorted((CONFIGS / "train" / "base").glob("*.yaml"))]
OWN = "own"  # a data set of the user's own, whose name is free

# The published configurations, key by key (facts of the published repository, not read from our YAMLs).
MODEL = {
    "arch": "st_llm_hf",
    "use_grad_checkpoint": True,
    "max_txt_len": 256,
    "end_sym": "###",
    "freeze_LLM": False,
    "freeze_vit": True,
    "freeze_qformer": True,
    "drop_path_rate": 0,
    "lora_r": 0,
}
RUN = {
    "task": "video_text_it",
    "bf16": True,
    "num_train_epochs": 2,
    "dataloader_num_workers": 4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "no",
    "optim": "adamw_torch",
    "learning_rate": 2e-5,
    "projection_lr": None,
    "weight_decay": 0,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "qa_sampling": "one",
}
# Published keys that the recipes name though they may have no effect here.
NAMED: dict[str, dict[str, Any]] = {
    "model": {"vit_precision": "fp16"},
    "run": {"tf32": False, "model_max_length": 1024, "warmup_ratio": 0.03, "per_device_eval_batch_size": 16},
}
INSTRUCTBLIP = {
    "qformer_text_input": True,
    "llama_model": "weights/vicuna-7b-v1.1",
    "q_former_model": "weights/instruct_blip_vicuna7b_trimmed.pth",
    "ckpt": "weights/instruct_blip_vicuna7b_trimmed.pth",
}
MINIGPT4 = {
    "qformer_text_input": False,
    "llama_model": "weights/vicuna-7b-v0",
    "q_former_model": "weights/blip2_pretrained_flant5xxl.pth",
    "ckpt": "weights/prerained_minigpt4_7b.pth",
}
ADAPTED = {"vit_model": "eva_btadapter_g"}
AVP = {**ADAPTED, "video_input": "mean", "use_mask": False, "mvm_decode": False}
QA = {**ADAPTED, "video_input": "all", "use_mask": True, "mvm_decode": True}
CONVERSATION = {"vit_model": "eva_clip_g", "video_input": "residual", "residual_size": 16}
CONVERSATION |= {"use_mask": True, "mvm_decode": True}
VIDEO, FLAT = "video/{}/train.json", "video/conversation/{}_flat.json"
FILES = {  # corpus -> annotation file, for both lists of corpora
    "caption_videochat": VIDEO.format("caption/videochat"),
    "caption_videochatgpt": FLAT.format("videochatgpt/train_full"),
    "caption_webvid": VIDEO.format("caption/webvid"),
    "classification_k710": VIDEO.format("classification/k710"),
    "classification_ssv2": VIDEO.format("classification/ssv2"),
    "conversation_videochat1": FLAT.format("videochat1/train"),
    "reasoning_next_qa": VIDEO.format("reasoning/next_qa"),
    "reasoning_clevrer_qa": VIDEO.format("reasoning/clevrer_qa"),
    "reasoning_clevrer_mc": VIDEO.format("reasoning/clevrer_mc"),
    "vqa_webvid_qa": VIDEO.format("vqa/webvid_qa"),
}
MEDIA = {  # corpus -> folder of its media
    **dict.fromkeys(("caption_videochat", "caption_webvid", "conversation_videochat1", "vqa_webvid_qa"), "webvid"),
    **dict.fromkeys(("reasoning_clevrer_qa", "reasoning_clevrer_mc"), "clevrer"),
    "caption_videochatgpt": "activitynet",
    "classification_k710": "kinetics",
    "classification_ssv2": "ssv2",
    "reasoning_next_qa": "nextqa",
}
Q = {"caption_videochatgpt", "classification_k710", "classification_ssv2", "reasoning_next_qa"}
Q |= {"reasoning_clevrer_qa", "reasoning_clevrer_mc", "vqa_webvid_qa"}
C = {"caption_videochat", "conversation_videochat1", "caption_videochatgpt", "caption_webvid", "vqa_webvid_qa"}
# recipe -> model_type, its keys of `model`, corpora, frames, DeepSpeed's ZeRO stage
TABLE: dict[str, tuple[str, dict[str, Any], set[str], int, int]] = {
    "instructblip_avp": ("instructblip_vicuna0_btadapter", {**INSTRUCTBLIP, **AVP}, Q, 16, 3),
    "instructblip_qa": ("instructblip_vicuna0_btadapter", {**INSTRUCTBLIP, **QA}, Q, 16, 3),
    "instructblip_conversation": ("instructblip_vicuna0", {**INSTRUCTBLIP, **CONVERSATION}, C, 64, 2),
    "minigpt4_avp": ("minigpt4_vicuna0_btadapter", {**MINIGPT4, **AVP}, Q, 16, 3),
    "minigpt4_qa": ("minigpt4_vicuna0_btadapter", {**MINIGPT4, **QA}, Q, 16, 3),
}


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set ANNO_ROOT and MEDIA_ROOT to new folders and unset the variables of weights. Returns the parent folder."""
    monkeypatch.setenv("ANNO_ROOT", str(tmp_path / "anno"))
    monkeypatch.setenv("MEDIA_ROOT", str(tmp_path / "media"))
    for name in ("VICUNA", "QFORMER_CKPT", "VIT_CKPT", "VICUNA_V0", "BLIP2_CKPT", "MINIGPT4_CKPT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", TABLE)
def test_a_published_recipe_equals_the_published_configuration(name: str, roots: Path) -> None:
    model_type, own, corpora, num_frames, stage = TABLE[name]
    path = CONFIGS / "train" / f"{name}.yaml"
    cfg = load_config(path)
    expected = {"model_type": model_type, **MODEL, **own}
    assert {key: cfg.model[key] for key in expected} == expected
    assert {key: cfg.run[key] for key in RUN} == RUN
    assert cfg.run.get("warmup_steps", cfg.run.get("warmup_ratio")) == 0.03  # below 1: the share of all steps
    zero = json.loads(Path(cfg.run.deepspeed).read_text(encoding="utf-8"))
    assert zero["zero_optimization"]["stage"] == stage
    written: Any = OmegaConf.merge(*(OmegaConf.create(layer.values) for layer in yaml_layers(path)))
    for section, keys in NAMED.items():
        assert {key: written[section].get(key) for key in keys} == keys
    assert written.model.get("prompt_template") == (
        "###Human: {} ###Assistant: " if name == "instructblip_conversation" else None
    )

    entries = resolved_settings(cfg)
    assert {entry: entries[entry].anno_path for entry in entries} == {
        entry: str(roots / "anno" / FILES[entry]) for entry in corpora
    }
    for entry in entries.values():
        assert (entry.num_frames, entry.sampling, entry.crop, entry.qa_sampling) == (
            num_frames,
            "rand",
            "random",
            "one",
        )
        assert (entry.sample_ratio, entry.max_samples, entry.instruction, entry.multi_turn) == (None, None, None, False)
    built = full_size(cfg).config
    assert (built.vision_config["image_size"], built.num_query_tokens) == (224, 32)
    assert built.template == ("instructblip" if own["qformer_text_input"] else "minigpt4")


def write_corpora(corpora: set[str], roots: Path) -> int:
    """Write, for each corpus, a record with one question and its video, at the published paths.

    Returns the number of records.

    The two flat files are made by `stllm doctor --flatten` from one record of one pair and one of two.
    """
    video = write_video(roots / "v.mp4", num_frames=4)
    num_records = 0
    for number, corpus in enumerate(sorted(corpora)):
        pairs = [{"i": "", "q": f"What is in {corpus}, {n}?", "a": f"Number {number}."} for n in range(3)]
        anno = roots / "anno" / FILES[corpus]
        anno.parent.mkdir(parents=True, exist_ok=True)
        if "_flat" in anno.name:
            records = [{"video": f"{corpus}.mp4", "QA": part} for part in (pairs[:1], pairs[1:])]
            deep = anno.with_name("train.json")
            deep.write_text(json.dumps(records), encoding="utf-8")
            assert main(["doctor", "--flatten", str(deep), str(anno)]) == 0
        else:
            anno.write_text(json.dumps([{"video": f"{corpus}.mp4", "QA": pairs[:1]}]), encoding="utf-8")
        num_records += len(json.loads(anno.read_text(encoding="utf-8")))
        media = roots / "media" / MEDIA[corpus] / f"{corpus}.mp4"
        media.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, media)
    return num_records


@pytest.mark.parametrize("name", TABLE)
def test_the_doctor_reads_the_corpora_of_a_published_recipe(
    name: str, roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora = TABLE[name][2]
    num_records = write_corpora(corpora, roots)
    capsys.readouterr()
    argv = ["doctor", "--cfg-path", str(CONFIGS / "train" / f"{name}.yaml"), "--num-workers", "0"]
    assert main(argv) == 0
    _, *lines, note, last = capsys.readouterr().out.splitlines()
    assert note.startswith("lengths are counted in words, not in tokens")  # the weights are not here
    assert last == f"nothing found in {num_records} records, {len(corpora)} media"
    expected = {corpus: "3" if "_flat" in FILES[corpus] else "1" for corpus in corpora}
    assert dict(line.split() for line in lines) == expected
    missing = roots / "anno" / FILES[sorted(corpora)[0]]  # a corpus that is not there is named
    missing.unlink()
    assert main(argv) == 1
    assert str(missing) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["instructblip_conversation", "minigpt4_avp"])
def test_a_published_recipe_trains_from_the_base_weights(
    name: str, roots: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains two epochs with 8 frames in one process, on tiny versions of the published files, also the flat ones."""
    family = name.partition("_")[0]
    llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOREIGN / f"vicuna_for_{family}"))
    llm.save_pretrained(roots / "vicuna")
    for path in (FOREIGN / f"vicuna_for_{family}").glob("tokenizer*"):
        shutil.copy(path, roots / "vicuna")
    files = {"QFORMER_CKPT": "instruct_blip_vicuna7b_trimmed.pth", "VIT_CKPT": "eva_vit_g.pth"}
    files |= {"BLIP2_CKPT": "blip2_pretrained_flant5xxl.pth", "MINIGPT4_CKPT": "pretrained_minigpt4.pth"}
    files |= {"VICUNA": str(roots / "vicuna"), "VICUNA_V0": str(roots / "vicuna")}
    for variable, file in files.items():
        monkeypatch.setenv(variable, str(FOREIGN / file))
    num_records = write_corpora(TABLE[name][2], roots)
    asked: list[bool] = []
    from_pretrained = AutoTokenizer.from_pretrained

    def from_hub(source: str | Path, **options: Any) -> Any:
        if source == "bert-base-uncased":
            asked.append(options["local_files_only"])
            source = FOREIGN / "bert"
        return from_pretrained(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_hub)
    tiny = [*HEADS, "model.image_size=28", "model.num_query_token=4"]
    alone = ["run.deepspeed=null", "run.per_device_train_batch_size=1", "run.dataloader_num_workers=0"]
    options = [*tiny, *alone, "run.logging_steps=1", f"run.output_dir={roots / 'run'}", "run.bf16=False"]
    options += [f"datasets.{corpus}.num_frames=8" for corpus in TABLE[name][2]]
    argv = ["train", "--cfg-path", str(CONFIGS / "train" / f"{name}.yaml"), "--device", "cpu", "--options", *options]
    assert main(argv) == 0
    assert asked == ([False] if family == "instructblip" else [])  # the published tokenizer, which may be downloaded
    losses = [line["loss"] for line in read_log(roots / "run")]
    assert len(losses) == 2 * num_records and all(0 < loss < 20 for loss in losses)
    fresh = re.search(r"note: from random weights, as no file gives them: (.*)", capsys.readouterr().err)
    parts = set(re.findall(r"([a-z ]+) \(\d+ weights\)", fresh[1].replace(", ", ",") if fresh else ""))
    assert parts == (TRAINED[name] - {"projection", LLM})
    saved = [path.name for path in (roots / "run").glob("checkpoint-*")]
    assert saved == [f"checkpoint-{2 * num_records}"]  # one an epoch, the last one kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the recipes that includes the published configuration as published.yaml."""
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
def test_a_recipe_gives_valid_training_arguments(name: str, folder: Path, tmp_path: Path) -> None:
    run = OmegaConf.to_container(load_config(folder / f"{name}.yaml").run)
    assert isinstance(run, dict)
    ours = {f.name for f in dataclasses.fields(RunSettings)}
    said = {str(key): value for key, value in run.items() if key not in ours and value is not None}
    zero = said.pop("deepspeed", None)  # it would need the package
    # bf16 is accepted if a CPU is requested
    arguments = TrainingArguments(**{**said, "output_dir": str(tmp_path), "use_cpu": True})
    assert arguments.bf16 and arguments.lr_scheduler_type == "cosine" and arguments.get_warmup_steps(1000) == 30
    assert (arguments.fsdp_plugin_args is not None) == (name == "fsdp")
    assert zero is None or Path(zero).is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_the_data_sets_of_a_recipe_are_known(name: str) -> None:
    entries = resolved_settings(load_config(CONFIGS / "train" / f"{name}.yaml"))
    assert all(entry.anno_path or entry.shards for entry in entries.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_of_a_recipe_has_needs_launch_and_override_lines(name: str) -> None:
    text = (CONFIGS / "train" / f"{name}.yaml").read_text(encoding="utf-8")
    header = text[: text.index("\nbase:")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(
        rf"^# Launch: (NPROC=8 bash scripts/train.sh|stllm train --cfg-path) configs/train/{name}.yaml$", header, re.M
    )
    assert "\n# Needs: " in header
    override = re.search(r"^# Override: --options (.*?)(?:   \(.*\))?$", header, re.M)
    assert override is not None
    load_config(CONFIGS / "train" / f"{name}.yaml", override[1].split())


@pytest.mark.parametrize(("stage", "frozen"), [("instructblip_avp", False), ("instructblip_avp_frozen_llm", True)])
def test_an_avp_stage_s_weights_can_start_the_qa_stage(stage: str, frozen: bool, tmp_path: Path) -> None:
    """At a tiny size, the QA recipe loads the output of the AVP recipe; only the MVM decoder is initialized."""
    tiny = ["model.model_type=tiny", "model.vit_model=eva_btadapter_g", "model.vit_ckpt=null"]
    nothing = ["model.llama_model=null", "model.q_former_model=null", "model.ckpt=null"]
    avp, _ = build_audited(load_config(CONFIGS / "train" / f"{stage}.yaml", [*tiny, *nothing]), device="cpu")
    assert (avp.config.video_input, avp.config.freeze_llm) == ("mean", frozen)
    avp.save_pretrained(tmp_path)
    cfg = load_config(CONFIGS / "train" / "instructblip_qa_all_corpora.yaml", [*tiny, f"model.ckpt={tmp_path}"])
    qa, report = build_audited(cfg, device="cpu")
    assert (qa.config.video_input, qa.config.use_mask, qa.config.freeze_llm) == ("all", True, False)
    assert {key.split(".")[0] for key in report.keys("fresh")} == {"mvm_decoder"}
    weights = qa.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in avp.state_dict().items())


def test_a_misspelled_section_is_refused(folder: Path) -> None:
    for section in ("base", "model", "datasets", "run"):
        raw = _raw(folder / "instructblip_qa.yaml")
        raw[section + "s"] = raw.pop(section, {})
        assert f"did you mean '{section}'?" in _refused(folder, raw)


@pytest.mark.parametrize("name", [*RECIPES, "published", *BASES])
def test_every_misspelled_key_is_refused_and_the_nearest_named(name: str, folder: Path) -> None:
    """In each key of each file, one letter is doubled."""
    raw = _raw(folder / f"{name}.yaml")
    for key, path in {path[-1]: path for path in _key_paths(raw)}.items():
        middle = len(key) // 2
        wrong = key[:middle] + key[middle] + key[middle:]
        message = _refused((folder / name).parent, _renamed(raw, path, wrong))
        assert wrong in message and f"did you mean '{key}'?" in message


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_random_misspellings_are_refused(folder: Path, data: st.DataObject) -> None:
    """One letter is added, removed or replaced, at any place of any key."""
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
    """Yield the path of each key below the sections, except below published keys without an effect."""
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
    """Return the error for a configuration written beside the recipes."""
    path = folder / "typo.yaml"
    path.write_text(yaml.safe_dump(dict(raw)), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        resolved_settings(load_config(path, model_type="tiny"))
    return str(caught.value)
