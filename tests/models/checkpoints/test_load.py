"""Loading: every format in every type, any language model, device maps, and no weight left on the meta device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from stllm.common.errors import UserError
from stllm.models.build import build_audited
from stllm.models.checkpoints import load
from stllm.models.checkpoints.convert import convert
from stllm.models.checkpoints.formats import open_source
from stllm.models.checkpoints.infer_config import open_model
from stllm.models.checkpoints.load import (
    load_model,
    load_pretrained,
    processor_of,
    restore,
)
from stllm.models.st_llm import STLLM, config_of
from tests.helpers.tiny import VISION, tiny_batch, tiny_model
from tests.models.checkpoints.conftest import FOREIGN, GOLDEN, HEADS, golden_weights
from tests.models.test_language_model import ARCHITECTURES

NAME = "instructblip_bta_all_mvm"
LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def assert_same(one: STLLM, other: STLLM) -> None:
    expected = other.state_dict()
    assert set(one.state_dict()) == set(expected)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    for (key, buffer), (_, same) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(buffer, same) and buffer.dtype == same.dtype, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_released_folder_is_loaded_whole(dtype: str) -> None:
    model = load_model(GOLDEN / NAME, device="cpu", dtype=dtype)
    kind = getattr(torch, dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    assert model.config.dtype == kind
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    weights = golden_weights(NAME)
    assert torch.equal(model.projection.weight, weights["model.stllm_model.llama_proj.weight"].to(kind))
    assert not any(p.requires_grad for p in model.vision_encoder.backbone.parameters())  # its configuration freezes it
    assert model.projection.weight.requires_grad


def test_buffers_that_no_file_holds_are_initialized() -> None:
    model = load_model(GOLDEN / NAME, device="cpu", dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    try:
        plain = STLLM(config_of(model))
    finally:
        torch.set_default_dtype(torch.float32)
    buffers = dict(model.named_buffers())
    assert any(key.endswith("k_bias") for key in buffers)
    for key, expected in plain.named_buffers():
        assert torch.equal(buffers[key], expected) and buffers[key].dtype == expected.dtype, key


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}, {"has_qformer": False}, {"encoder": "eva_btadapter_g"}])
def test_our_format_loads_the_same_here_and_through_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    streamed = load_model(tmp_path, device="cpu")
    assert_same(streamed, model)
    assert_same(STLLM.from_pretrained(tmp_path), model)
    placed = load_model(tmp_path, device="cpu", device_map={"": "cpu"})
    assert_same(placed, model)
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(streamed(**batch).loss, model(**batch).loss)


# weights with another name on disk, or stored there in several tensors
RENAMED = {"gpt_neox", "mixtral", "phimoe", "granitemoe", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "jamba"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_language_model_is_read_back(name: str, tmp_path: Path) -> None:
    """Read by chat, a resumed run, transformers and as `model.llama_model`; with names as on disk and as in memory."""
    text, vision = {"model_type": name, **ARCHITECTURES[name]}, {**VISION, "depth": 1}
    model = tiny_model(text_config=text, vision_config=vision, has_qformer=False)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) - set(model.state_dict()) or name not in RENAMED
    read = load_model(tmp_path, device="cpu")
    assert_same(read, model)
    for parameter in read.parameters():
        parameter.data.zero_()
    restore(read, tmp_path)
    assert_same(read, model)
    assert_same(STLLM.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert_same(load_model(tmp_path / "memory", device="cpu"), model)
    plain = model.language_model
    plain.save_pretrained(tmp_path / "plain")
    source = open_source(tmp_path / "plain")
    found = {key: source.weights.read(entry.key) for key, entry in source.entries.items()}
    for key, tensor in plain.state_dict().items():
        if key not in plain.all_tied_weights_keys:
            assert torch.equal(found.pop(f"language_model.{key}"), tensor), key
    assert not found


def test_a_quantized_language_model_is_dequantized(tmp_path: Path) -> None:
    """GPT-OSS as published has experts in MXFP4: blocks of 32 four-bit numbers that share a power of two."""
    try:
        torch.accelerator.current_accelerator()  # transformers asks
    except RuntimeError as error:
        pytest.skip(f"torch 2.6 without a GPU: {error}")
    sizes = {**ARCHITECTURES["gpt_oss"], "intermediate_size": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = weights.pop(key).shape
        weights[f"{key}_blocks"] = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
        weights[f"{key}_scales"] = torch.full((experts, rows, width // 32), 127 - 3, dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, key = open_source(tmp_path), "model.layers.1.mlp.experts.gate_up_proj"
    read = source.weights.read(key)
    assert (read.float().abs() * 2**3).unique().tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    with pytest.raises(KeyError):  # copied weights are freed
        source.weights.read(key)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    text = {"model_type": "qwen3_moe", **ARCHITECTURES["qwen3_moe"]}
    model = tiny_model(text_config=text, has_qformer=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["language_model.model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(weights, path)
    key = r"language_model\.model\.layers\.1\.mlp\.experts\.down_proj"
    with pytest.raises(UserError, match=rf"{key}: found \(3, 32, 16\), expected \(4, 32, 16\)"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(UserError, match=rf"does not hold all of the model's weights: {key}: found"):
        restore(model, tmp_path)


def test_a_model_that_transformers_cannot_build_gives_one_sentence(tmp_path: Path) -> None:
    tiny_model(has_qformer=False).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change in ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, {"num_attention_heads": "four"}):
        path.write_text(json.dumps({**config, "text_config": {**config["text_config"], **change}}))
        with pytest.raises(UserError, match=r"config\.json: .*(magic|four)"):
            load_model(tmp_path, device="cpu")


def test_sharded_safetensors_and_the_device_map_load_equal(tmp_path: Path) -> None:
    model = tiny_model(mvm_decode=True, video_input="residual")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(load_model(tmp_path, device="cpu"), model)


def test_a_released_folder_loads_with_a_device_map() -> None:
    placed = load_model(GOLDEN / "minigpt4_plain_all", device="cpu", device_map={"": "cpu"})
    assert_same(placed, load_model(GOLDEN / "minigpt4_plain_all", device="cpu"))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    text = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = tiny_model(text_config={**text, "intermediate_size": 96, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_same(loaded, model)


def test_settings_of_the_user_override_the_checkpoint() -> None:
    options = ["model.video_input=mean", "model.max_txt_len=9", "model.vit_chunk_size=2", "model.freeze_LLM=True"]
    model, processor = load_pretrained(GOLDEN / "minigpt4_plain_all", options=options, device="cpu")
    assert (model.config.video_input, model.config.vit_chunk_size, processor.max_txt_len) == ("mean", 2, 9)
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())


def test_a_checkpoint_without_meta_json_needs_its_head_counts(golden_copy: Callable[[str], Path]) -> None:
    folder = golden_copy("instructblip_residual_mvm")
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"how many attention heads the vision encoder has .*model\.vision\.num_heads="):
        load_model(folder, device="cpu")
    model = load_model(folder, options=HEADS, device="cpu")
    assert model.config.video_input == "residual"  # there are a down_proj and an up_proj
    assert model.config.residual_size == 4  # residual_index has as many entries
    assert model.config.mvm_decode
    assert_same(model, load_model(GOLDEN / "instructblip_residual_mvm", device="cpu"))


def test_a_configuration_file_adds_what_the_weights_do_not_determine(
    golden_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = golden_copy("minigpt4_bta_mean")
    (folder / "meta.json").unlink()
    cfg = tmp_path / "model.yaml"
    cfg.write_text(
        "model: {model_type: minigpt4_vicuna0_btadapter, video_input: mean, vision: {num_heads: 4}, "
        "qformer: {num_attention_heads: 4}, image_size: 28, num_query_token: 4}"
    )
    assert load_model(folder, cfg, device="cpu").config.video_input == "mean"


def test_lora_is_added_to_foreign_weights_and_starts_without_effect() -> None:
    settings = {"ckpt": str(GOLDEN / "minigpt4_plain_all"), "image_size": 28, "lora_r": 2, "freeze_LLM": True}
    settings |= {"qformer_text_input": False, "video_input": "all", "num_query_token": 4}
    torch.manual_seed(0)
    model, report = build_audited(settings, device="cpu")
    plain = load_model(GOLDEN / "minigpt4_plain_all", device="cpu")
    fresh = report.keys("fresh")
    assert fresh and all("lora_" in key for key in fresh)
    layer = model.language_model.model.layers[1].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, plain.language_model.model.layers[1].self_attn.q_proj.weight)
    assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()
    assert layer.lora_A["default"].weight.requires_grad and not layer.base_layer.weight.requires_grad
    ids = torch.randint(3, 500, (1, 9))
    with torch.no_grad():
        assert torch.equal(model.language_model(input_ids=ids).logits, plain.language_model(input_ids=ids).logits)


def test_lora_weights_are_not_dropped_silently(tmp_path: Path) -> None:
    tiny_model(lora=LORA).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has LoRA weights \(rank 2\)"):
        load_model(tmp_path, options=["model.lora_r=0"], device="cpu")


def test_a_missing_prefix_of_a_language_model_is_added(tmp_path: Path) -> None:
    """Old GPT-2 checkpoints have tied embeddings, and no `transformer.` prefix on disk."""
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=80, n_positions=64)
    ).eval()
    gpt2.config.save_pretrained(tmp_path)
    state = {
        key.removeprefix("transformer."): value for key, value in gpt2.state_dict().items() if "lm_head" not in key
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    settings = {
        "vit_ckpt": str(FOREIGN / "eva_vit_g.pth"),
        "q_former_model": str(FOREIGN / "blip2_pretrained_flant5xxl.pth"),
        "llama_model": str(tmp_path),
        "qformer_text_input": False,
        "image_size": 28,
        "num_query_token": 4,
        "vision": {"num_heads": 4},
        "qformer": {"num_attention_heads": 4},
    }
    model, report = build_audited(settings, device="cpu")
    assert not report.keys("unexpected")
    ids = torch.randint(0, 80, (1, 5))
    with torch.no_grad():
        assert torch.equal(model.language_model(input_ids=ids).logits, gpt2(input_ids=ids).logits)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_conversion_keeps_the_stored_type(tmp_path: Path) -> None:
    load_model(GOLDEN / NAME, device="cpu", dtype="bfloat16").save_pretrained(tmp_path / "a")
    processor_of(open_model(GOLDEN / NAME)).save_pretrained(tmp_path / "a")
    convert([tmp_path / "a"], tmp_path / "b")
    assert open_model(tmp_path / "b").sources[0].weights.specs["projection.weight"].dtype == torch.bfloat16


def test_running_out_of_memory_while_loading_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(load, "fill", full)
    with pytest.raises(
        UserError, match=r"not enough memory on cpu: the weights need \d+\.\d GiB as bfloat16; use a smaller"
    ):
        load_model(GOLDEN / NAME, device="cpu", dtype="bfloat16")
