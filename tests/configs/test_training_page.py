"""docs/training.md: its example records can be read, and its memory table equals the computed values."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stllm.common.config import load_config
from stllm.datasets.annotations import JsonRecords
from stllm.models.checkpoints.inspect import count_parameters, training_memory
from tests.configs.recipes import CONFIGS, RECIPES, full_size

ROOT = CONFIGS.parent
PAGES = ("weights", "training", "evaluation", "serving")
TEXT = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in PAGES)
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "CUDA_VISIBLE_DEVICES",
    "VLLM_API_KEY",
    "VLLM_CPU_KVCACHE_SPACE",
)  # variables that no recipe reads


def test_the_example_records_can_be_read(tmp_path: Path) -> None:
    example = re.search(r"^```json\n(.*?)^```$", TEXT, re.M | re.S)
    assert example is not None
    path = tmp_path / "train.jsonl"
    path.write_text(example[1], encoding="utf-8")
    records = JsonRecords(path, media_dir="m")
    assert [len(records[index].turns) for index in range(len(records))] == [1, 1, 2]
    assert records[1].bounds == (12.5, 31.0) and records[0].media == "m/clips/kitchen.mp4"
    header = (CONFIGS / "train" / "own_data.yaml").read_text(encoding="utf-8")
    assert "QA" in json.loads(next(line[1:] for line in header.splitlines() if '{"video"' in line))


def test_every_environment_variable_is_read_by_a_recipe() -> None:
    recipes = [path for folder in ("train", "eval") for path in (CONFIGS / folder).rglob("*.yaml")]
    read = "".join(path.read_text(encoding="utf-8") for path in recipes)
    named = set(re.findall(r"`\$?([A-Z][A-Z0-9_]+)(?:`|/)", TEXT)) - {"RECIPE", *LAUNCHERS}
    assert named == set(re.findall(r"oc\.env:([A-Z0-9_]+)", read)) - {"CKPT", "OUTPUT_DIR"}  # said in the headers


def test_the_memory_table_equals_the_computed_values() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) B \(([\d.]+) B\) \| (.+) \|$", TEXT, re.M)
    columns = [("DDP", 1), ("DDP", 8), ("ZeRO-2", 8), ("ZeRO-3", 8), ("FSDP", 8), ("ZeRO-2 offload", 8)]
    for name, total, trained, figures in rows:
        counts = count_parameters(full_size(load_config(CONFIGS / "train" / f"{name}.yaml")))
        assert (total, trained) == (f"{counts.all / 1e9:.2f}", f"{counts.trained / 1e9:.2f}")
        memory = training_memory(counts, half=True)
        computed = [f"{memory[strategy]['gpu'][gpus] / 2**30:.1f}" for strategy, gpus in columns]
        assert figures.split(" | ") == computed
    same = {"fsdp": "instructblip_conversation", "image_video_joint": "instructblip_conversation"}
    same |= {"own_data": "lora_one_gpu", "own_shards": "lora_one_gpu", "instructblip_qa_all_corpora": "instructblip_qa"}
    assert {name for name, *_ in rows} | set(same) == set(RECIPES)
    for name, other in same.items():
        models = [full_size(load_config(CONFIGS / "train" / f"{recipe}.yaml")) for recipe in (name, other)]
        assert count_parameters(models[0]) == count_parameters(models[1])


class FlashAttention(torch.autograd.Function):
    """Stands in for the fused attention kernels, which keep q, k, v and the output, but not the attention weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def test_the_computed_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """For instructblip_qa in bfloat16: what autograd keeps of adapter and Q-Former, and a hidden state a layer."""
    cfg = load_config(CONFIGS / "train" / "instructblip_qa.yaml")
    model: Any = copy.deepcopy(full_size(cfg))
    model.to(torch.bfloat16).train()
    batch, frames = cfg.run.per_device_train_batch_size, cfg.datasets.vqa_webvid_qa.num_frames
    tokens = 1 + model.vision_encoder.backbone.patch_embed.num_patches
    width = model.config.vision_config["embed_dim"]
    meta: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    features = torch.empty(batch * frames, tokens, width, **meta)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: FlashAttention.apply(q, k, v))
    adapter = model.vision_encoder.adapter
    assert adapter is not None
    kept = kept_bytes(adapter, lambda: adapter([features] * adapter.depth, features[:1], frames))
    assert f"the temporal adapter keeps {kept / 2**30:.1f} GiB" in TEXT
    queries = model.config.num_query_tokens
    read = torch.empty(batch * frames, queries + 32, model.config.qformer_config.hidden_size, **meta)
    layers: Any = model.qformer.bert.encoder
    cross: dict[str, Any] = {"encoder_hidden_states": features.requires_grad_(), "query_length": queries}
    kept = kept_bytes(layers, lambda: layers(read, **cross).last_hidden_state)
    assert f"The Q-Former keeps {kept / 2**30:.1f} GiB," in TEXT

    text = model.config.get_text_config()
    positions = frames * model.config.tokens_per_frame + cfg.model.max_txt_len
    kept = text.num_hidden_layers * batch * positions * text.hidden_size * 2
    product = f"{text.num_hidden_layers} x {batch} x {positions} x {text.hidden_size} x 2 bytes"
    assert f"{product} = {kept / 2**30:.1f} GiB" in TEXT


def kept_bytes(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the module's parameters."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage()._cdata, tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    return sum(kept[key].untyped_storage().nbytes() for key in kept.keys() - parameters)
