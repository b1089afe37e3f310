"""Quantization to 4 and 8 bits: which layers, equal answers, QLoRA with the commands, and errors."""

import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from stllm.cli import main
from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.conversation.chat import FOLDER, find_examples
from stllm.models import build
from stllm.models.build import build_model
from stllm.models.checkpoints import load
from stllm.models.checkpoints.formats import open_source
from stllm.models.checkpoints.infer_config import open_model
from stllm.models.checkpoints.inspect import inspect_path
from stllm.models.checkpoints.load import load_model, load_opened
from stllm.models.lora import merge_lora
from stllm.models.quantization import quantization_config, quantized_layers, quantized_weight
from stllm.models.settings import quantization_of
from stllm.models.st_llm import STLLM
from stllm.tasks.video_text_it import VideoTextTask
from tests.helpers.tiny import tiny_batch, tiny_model
from tests.helpers.training import losses, train, write_recipe
from tests.models.checkpoints.conftest import GOLDEN

BITS = ("4bit", "8bit")
QLORA: dict[str, Any] = {"quantization": "4bit", "lora_r": 4, "lora_dropout": 0.0, "freeze_LLM": True}


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a stand-in for bitsandbytes that suffices to make its settings."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))


# ---- settings -------------------------------------------------------------------------------------------------------


def test_an_unsuitable_device_and_a_missing_package_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="4bit loading works on CUDA GPUs and on CPUs, not on mps: use --device cpu"):
        quantization_config("4bit", torch.float16, torch.device("mps"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'stllm\[quantization\]'"):
        load_model(GOLDEN / "minigpt4_plain_all", device="cpu", quantization="8bit")


def test_an_unknown_quantisation_lists_the_known() -> None:
    with pytest.raises(UserError, match="4bit, 8bit"):
        quantization_config("3bit", torch.bfloat16)
    with pytest.raises(UserError, match=r"model\.quantization.*4bit, 8bit"):
        load_config(options=["model.model_type=tiny", "model.quantization=3bit"])


def test_only_the_language_models_layers_are_quantised(pretended: None) -> None:
    config: Any = quantization_config("4bit", torch.bfloat16)
    assert config.load_in_4bit and not config.load_in_8bit
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    parts = {name for name, _ in tiny_model(mvm_decode=True).named_children()}
    assert parts - set(config.llm_int8_skip_modules) == {"language_model"}


def test_low_resource_means_8bit_and_must_not_contradict_quantization() -> None:
    assert quantization_of({}) is None
    assert quantization_of({"low_resource": False, "quantization": "4bit"}) == "4bit"
    assert quantization_of({"low_resource": True, "quantization": "8bit"}) == "8bit"
    with pytest.raises(UserError, match=r"model\.quantization is 4bit, but model\.low_resource is True.*leave one out"):
        quantization_of({"low_resource": True, "quantization": "4bit"})


def test_quantization_settings_reach_the_loader_and_each_process_keeps_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(*_: Any, **arguments: Any) -> None:
        asked.append(arguments)
        raise UserError("not here")

    monkeypatch.setattr(load, "assemble", refuse)
    monkeypatch.setattr(build, "assemble", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for option in ("model.low_resource=True", "model.quantization=4bit"):
        with pytest.raises(UserError, match="not here"):
            load_opened(open_model(GOLDEN / "minigpt4_plain_all", options=[option]), device="cpu")
    settings = {
        "ckpt": str(GOLDEN / "minigpt4_plain_all"),
        "image_size": 28,
        "qformer_text_input": False,
        "low_resource": True,
        "device_8bit": 1,
    }
    with pytest.raises(UserError, match="not here"):
        build_model(settings)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UserError, match="not here"):
        build_model(settings)
    assert [arguments["quantization"] for arguments in asked] == ["8bit", "4bit", "8bit", "8bit"]
    assert [arguments["device"] for arguments in asked[2:]] == ["cuda:1", "auto"]


def test_the_option_quantization_equals_the_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def load_chat(*_: Any, options: list[str], **__: Any) -> None:
        seen.append(options)
        raise UserError("not here")

    monkeypatch.setattr("stllm.conversation.chat.load_chat", load_chat)
    assert main(["chat", "--quantization", "4bit", "--options", "model.num_frames=4"]) == 1
    assert seen == [["model.num_frames=4", "model.quantization=4bit"]]
    assert main(["chat", "--quantization", "4bit", "--engine", "http://127.0.0.1:9"]) == 2
    assert "does not apply to a language model behind --engine" in capsys.readouterr().err
    assert main(["serve", "--quantization", "2bit"]) == 2


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_the_tiny_model_answers_the_same(bits: str, bitsandbytes: None, capfd: pytest.CaptureFixture[str]) -> None:
    clip, question = find_examples()[5]
    expected = json.loads((clip.parent / "examples.json").read_text())[5]["answer"]
    chat = ["chat", "--device", "cpu", "--dtype", "bfloat16", "--video", str(clip), "--question", question]
    assert main([*chat, "--quantization", bits]) == 0
    shown = capfd.readouterr()
    assert (shown.out, shown.err.replace("note: ", "")[:21]) == (f"{expected}\n", "no checkpoint was nam")
    assert len(shown.err.splitlines()) == 1  # nothing of bitsandbytes'


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1100, 576), (96, 64), (50, 36)])  # more than a piece; not whole blocks
def test_weights_are_quantised_as_bitsandbytes_does(
    shape: tuple[int, int], dtype: torch.dtype, bitsandbytes: None
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0  # no scale
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = Linear4bit(*shape[::-1], bias=False, quant_type="nf4", compress_statistics=False, device="meta")
    layer.source_cls = torch.nn.Linear  # type: ignore[assignment]  # an attribute of transformers, not a part
    found: Any = quantized_weight(layer, weight, torch.device("cpu"))
    assert torch.equal(found, packed) and found.quant_state == state and layer.quant_state == state
    assert torch.equal(dequantize_4bit(found, found.quant_state), dequantize_4bit(packed, state))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("folder", [FOLDER, GOLDEN / "minigpt4_plain_all"])  # ours, the released layout
def test_a_quantised_model_is_smaller_and_saved_unquantised(
    folder: Path, bits: str, bitsandbytes: None, tmp_path: Path
) -> None:
    whole = load_model(folder, device="cpu", dtype="bfloat16")
    model = load_model(folder, device="cpu", dtype="bfloat16", quantization=bits)
    layers = quantized_layers(model)
    assert {name.split(".")[0] for name in layers} == {"language_model"}
    assert len(layers) == 7 * model.config.text_config.num_hidden_layers  # all but the head
    assert all(layer.weight.dtype in (torch.uint8, torch.int8) for layer in layers.values())
    names = {f"{name}.weight" for name in layers}
    assert all(
        torch.equal(p, q) and p.dtype == q.dtype
        for (name, p), (_, q) in zip(model.named_parameters(), whole.named_parameters(), strict=True)
        if name not in names
    )
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        found, expected = (one.language_model(input_ids=ids).logits.float() for one in (model, whole))
        assert float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean()) > 0.5
    model.save_pretrained(tmp_path)  # as it was read
    again = load_model(tmp_path, device="cpu", dtype="bfloat16")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_gpt2s_transposed_layers_are_quantised(bits: str, bitsandbytes: None, tmp_path: Path) -> None:
    text = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 128}
    model = tiny_model(text_config=text)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu", dtype="float32", quantization=bits)
    assert len(quantized_layers(again)) == 4
    with torch.no_grad():
        found, expected = (one.language_model(input_ids=torch.arange(20)[None]).logits for one in (again, model))
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)) > 0.98


def test_an_evaluation_records_the_bits(bitsandbytes: None, toy: Path, tmp_path: Path) -> None:
    run = ["evaluate", "mvbench", "--ckpt-path", str(FOLDER), "--anno-path", str(toy / "mvbench"), "--limit", "1"]
    run += ["--device", "cpu", "--output-dir", str(tmp_path), "--num-workers", "0"]
    assert main([*run, "--quantization", "4bit"]) == 0
    kept = yaml.safe_load((tmp_path / "mvbench.config.yaml").read_text())
    assert kept["model"]["quantization"] == "4bit"
    assert main(run) == 1  # its predictions have another setting


# ---- folders that are stored quantized ------------------------------------------------------------------------------

STORED: tuple[dict[str, Any], ...] = (
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},  # FP4
    {"load_in_8bit": True},
)


@pytest.mark.parametrize("settings", STORED)
def test_a_stored_quantised_language_model_is_dequantised_and_trains(
    settings: dict[str, Any], bitsandbytes: None, toy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(toy / "language_model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    stored: Any = AutoModelForCausalLM.from_pretrained(
        toy / "language_model", quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )
    layers = quantized_layers(stored)
    assert layers
    expected: dict[str, torch.Tensor] = {
        name: dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
        for name, layer in layers.items()
    }
    stored.save_pretrained(folder)
    source = open_source(folder)
    for name, weight in expected.items():
        read = source.weights.read(f"{name}.weight")
        assert read.dtype == torch.float32
        torch.testing.assert_close(read, weight, rtol=1e-6, atol=0)
    assert not source.unknown_keys

    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={**QLORA, "llama_model": str(folder)}, max_steps=1)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    trained = load_file(tmp_path / "run" / "model.safetensors")
    base = {key.replace(".base_layer", ""): weight for key, weight in trained.items()}
    for name, weight in expected.items():
        torch.testing.assert_close(base[f"language_model.{name}.weight"], weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_a_stored_quantised_whole_model_answers_and_converts(bits: str, bitsandbytes: None, tmp_path: Path) -> None:
    folder, plain = tmp_path / "stored", tmp_path / "plain"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = BitsAndBytesConfig(**{f"load_in_{bits}": True})
    stored: Any = STLLM.from_pretrained(FOLDER, quantization_config=settings, device_map={"": "cpu"})
    stored.save_pretrained(folder)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = stored.language_model(input_ids=ids).logits
        for quantization in (None, bits):
            model = load_model(folder, device="cpu", dtype="float32", quantization=quantization)
            assert len(quantized_layers(model)) == (42 if quantization else 0)
            found = model.language_model(input_ids=ids).logits
            assert float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean()) > 0.99
    assert main(["convert", str(folder), "--to", str(plain)]) == 0
    stored_bytes = [inspect_path(one)[0]["stored_bytes"] for one in (folder, plain)]
    assert stored_bytes[0] < 0.6 * stored_bytes[1]
    read, again = (load_model(one, device="cpu", dtype="float32") for one in (folder, plain))
    assert all(torch.equal(p, q) for p, q in zip(read.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptq_and_awq_are_refused(method: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(toy / "language_model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={"llama_model": str(folder)})
    assert main(["train", "--cfg-path", str(recipe)]) == 1
    expected = (
        f"stored is quantized with {method.upper()}, which can't be read here: name a folder with the model's own"
    )
    assert expected in capsys.readouterr().err


def test_a_quantised_folder_without_its_scales_is_named(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"load_in_8bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.0.mlp.up_proj.SCB": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"quantized, but model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        open_source(tmp_path)


# ---- QLoRA ----------------------------------------------------------------------------------------------------------


def test_qlora_trains_resumes_and_saves_a_whole_model(bitsandbytes: None, toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model=QLORA)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    run, first = tmp_path / "run", losses(tmp_path / "run")
    assert first[-1][0] < 0.9 * first[0][0]

    # from a checkpoint: quantized weights come from the language model's folder, all others from the checkpoint
    for name in ("config.json", "model.safetensors"):
        (run / name).unlink()
    for step in (6, 8):
        os.rename(run / f"checkpoint-{step}", tmp_path / f"gone-{step}")
    assert main(["train", "--cfg-path", str(recipe), "--quantization", "4bit"]) == 0
    assert losses(run) == first

    # the output is a whole model with unquantized weights, which can be merged and converted like any other
    weights, base = load_file(run / "model.safetensors"), load_file(toy / "language_model" / "model.safetensors")
    for name in ("mlp.gate_proj", "self_attn.q_proj.base_layer"):
        key = f"model.layers.0.{name}.weight"
        assert torch.equal(weights[f"language_model.{key}"], base[key.replace(".base_layer", "")])
    assert (run / "lora_adapter" / "adapter_model.safetensors").is_file()
    assert "quantization_config" not in json.loads((run / "config.json").read_text())
    assert main(["convert", str(run), "--to", str(tmp_path / "merged"), "--merge-lora"]) == 0
    model = load_model(run, device="cpu", quantization="4bit")
    with pytest.raises(UserError, match="LoRA can't be merged into quantized weights"):
        merge_lora(model)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lora_r", [0, 2])
def test_gradients_are_those_of_the_quantised_model(bits: str, lora_r: int, bitsandbytes: None) -> None:
    settings = {
        "ckpt": str(GOLDEN / "minigpt4_plain_all"),
        "image_size": 28,
        "qformer_text_input": False,
        "freeze_LLM": True,
        "freeze_vit": True,
        "lora_r": lora_r,
        "lora_dropout": 0.0,
    }
    gradients: list[torch.Tensor] = []
    precise: dict[str, torch.Tensor] = {}
    for quantization in (bits, None):
        torch.manual_seed(0)
        model = build_model({**settings, "quantization": quantization}, device="cpu", dtype="float32").train()
        layers = quantized_layers(model)
        assert bool(layers) == bool(quantization)
        for name, layer in layers.items():
            precise[f"{name}.weight"] = dequantize_bnb_weight(layer.weight, layer.weight).float()
        if not quantization:  # the same weights in a plain model
            model.load_state_dict(precise, strict=False)
        model(**tiny_batch(model)).loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.dtype == torch.float32 for p in trained.values())
        assert bool([name for name in trained if "lora_" in name]) == bool(lora_r)
        assert model.projection.weight.grad is not None
        gradients.append(model.projection.weight.grad.flatten())
    assert float(torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.99


def test_two_processes_train_like_one(bitsandbytes: None, toy: Path, tmp_path: Path) -> None:
    alone = write_recipe(tmp_path / "recipe.yaml", toy, model=QLORA, max_steps=3)
    main(["train", "--cfg-path", str(alone)])
    options = (f"run.output_dir={tmp_path / 'two'}", "run.per_device_train_batch_size=2")
    train(alone, *options, processes=2)
    for one, two in zip(losses(tmp_path / "run"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_quantisation_settings_that_training_refuses(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy)
    assert main(["train", "--cfg-path", str(recipe), "--quantization", "8bit"]) == 1
    assert (
        "a language model in 8bit (model.quantization) can't be trained itself: train LoRA" in capsys.readouterr().err
    )
    for key in ("fsdp=full_shard", "deepspeed=zero2.json"):
        options = ["model.freeze_LLM=True", "model.low_resource=True", f"run.{key}"]
        with pytest.raises(UserError, match=r"in 8bit .* is not divided among processes"):
            VideoTextTask.from_config(load_config(recipe, options), seed=0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # by `accelerate launch --use_fsdp`
    with pytest.raises(UserError, match=r"in 4bit .* is not divided among processes"):
        VideoTextTask.from_config(load_config(recipe, ["model.freeze_LLM=True", "model.quantization=4bit"]), seed=0)


def test_a_stage_without_a_language_model_trains_the_same(bitsandbytes: None, toy: Path, tmp_path: Path) -> None:
    model = {"num_query_token": 8, "image_size": 64, "qformer_text_input": False}
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model=model, datasets={}, task="toy_seeing", max_steps=2)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    first = losses(tmp_path / "run", ["loss"])
    options = ["--options", f"run.output_dir={tmp_path / 'second'}"]
    assert main(["train", "--cfg-path", str(recipe), "--quantization", "4bit", *options]) == 0
    assert losses(tmp_path / "second", ["loss"]) == first


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_loads_onto_its_own_gpu(rank: str, bitsandbytes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def refuse(model: Any, plan: Any, device: torch.device, *_: Any) -> None:
        assert quantized_layers(model)
        asked.append(device)
        raise UserError("not here")

    monkeypatch.setattr(load, "fill", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    for bits in BITS:
        with pytest.raises(UserError, match="not here"):
            load_model(GOLDEN / "minigpt4_plain_all", dtype="bfloat16", quantization=bits)
    assert asked == [torch.device("cuda", int(rank))] * 2


def test_commands_without_a_language_model_have_no_quantisation_option(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["extract", "--cfg-path", "a.yaml", "--output", "b"], ["convert", "a", "--to", "b"]):
        assert main([*command, "--quantization", "4bit"]) == 2
        assert "--quantization" in capsys.readouterr().err
    # the setting of a recipe has no effect on them
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={"quantization": "4bit", "freeze_vit": True})
    extract = ["extract", "--cfg-path", str(recipe), "--output", str(tmp_path / "features"), "--stage", "vit"]
    assert main([*extract, "--device", "cpu"]) == 0
    convert = ["convert", str(FOLDER), "--to", str(tmp_path / "whole"), "--options", "model.quantization=4bit"]
    assert main(convert) == 0
    whole, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", FOLDER))
    assert all(torch.equal(whole[key], weight) for key, weight in first.items())
