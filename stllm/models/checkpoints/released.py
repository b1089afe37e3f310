"""Writes the released ST-LLM layout: sharded .bin files with an index, config.json, and a meta.json for the rest.

meta.json holds what the weights don't tell (head counts, mean or all frames, ...), in the golden folders' form, so that
the folder loads again with nothing else named.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from stllm.common.errors import UserError
from stllm.models.checkpoints.keys import UnknownKeyError
from stllm.models.checkpoints.tables import RELEASED
from stllm.models.configuration import QFORMER_DEFAULTS, VISION_DEFAULTS, STLLMConfig
from stllm.models.factory import VISION_RENAMED, published_settings
from stllm.models.lora import merge_lora
from stllm.models.st_llm import STLLM, config_of

SHARD_BYTES = 5 << 30
INDEX = "pytorch_model.bin.index.json"


def save_released(model: STLLM, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes everything but the tokenizers. LoRA, for which there are no keys, is merged into the weights, in place.

    Raises UserError for a language model that the layout has no place for.
    """
    state = released_state(model)
    shards = _sharded(state, shard_bytes)
    names = [f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin" for number in range(1, len(shards) + 1)]
    files = list(zip(names, shards, strict=True))
    for name, keys in tqdm(files, desc="writing weights", unit="file", disable=None, delay=1, leave=False):
        torch.save({key: state[key] for key in keys}, folder / name)
    index = {
        "metadata": {"total_size": sum(_size(tensor) for tensor in state.values())},
        "weight_map": {key: name for name, keys in files for key in keys},
    }
    _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", _config(model))
    _write_json(folder / "meta.json", meta_of(config_of(model)))


def released_state(model: STLLM) -> dict[str, Tensor]:
    """The model's weights under the released names. Raises UserError."""
    kind = model.config.text_config.model_type
    if kind != "llama":
        raise UserError(
            f"the released layout has a place for LLaMA models alone, but this one's is {kind}: use --format stllm"
        )
    merge_lora(model)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if "lora_" in key:
            continue
        try:
            state[RELEASED.to_theirs(key)] = tensor.detach().cpu()
        except UnknownKeyError as error:
            raise UserError(f"the released layout has no place for {key}: use --format stllm") from error
    state["model.stllm_model.embed_tokens.weight"] = state["model.embed_tokens.weight"]  # as published
    return state


def meta_of(config: STLLMConfig) -> dict[str, Any]:
    """What the weights alone do not tell: the configuration by its published names, and the sizes."""
    vision = {key: config.vision_config[key] for key in VISION_DEFAULTS if key not in VISION_RENAMED.values()}
    sizes: dict[str, Any] = {
        "vision": {"img_size": config.vision_config["image_size"], **vision},
        "llm": "config.json",
        "bottleneck": config.residual_bottleneck,
    }
    if config.has_qformer:
        names = [*QFORMER_DEFAULTS, "encoder_hidden_size"]
        sizes["qformer"] = {name: getattr(config.qformer_config, name) for name in names}
        if not config.qformer_text_input:
            sizes["qformer"]["vocab_size"] = None
    return {"config": published_settings(config), "sizes": sizes}


def _config(model: STLLM) -> dict[str, Any]:
    """The language model's config.json as old libraries read it: LLaMA's own fields, not transformers' generic ones."""
    generic = set(PretrainedConfig().to_dict()) - {
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
    text = {key: value for key, value in model.config.text_config.to_dict().items() if key not in generic}
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        text.setdefault("rope_theta", rope["rope_theta"])
    dtype = str(model.projection.weight.dtype).removeprefix("torch.")
    return {**text, "model_type": "st_llm_hf", "architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}


def _sharded(state: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Keys in order, cut where a shard would grow beyond the limit."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for key, tensor in state.items():
        size = _size(tensor)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= size
    return shards


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=False, default=str) + "\n", encoding="utf-8")
