"""A language model's weights under the names that they have in memory, whatever the names on disk.

transformers renames and merges the weights of many architectures while it loads them (the experts of mixtures,
GPT-NeoX's head, GPT-2's missing prefix), and undoes that when it saves, in our own format too. The same conversions are
applied here, one weight at a time, so that such models are streamed like any other. Source:
`transformers.core_model_loading`.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from stllm.common.errors import UserError
from stllm.models.checkpoints.shards import MemoryWeights, Spec, Weights
from stllm.models.configuration import CONFIG_ERRORS, reason

LORA = re.compile(r"\.(?:base_layer|lora_[AB]\.default)(?=\.)")  # what peft puts between a layer and its weight


def convert_language_model(folder: Path, weights: Weights, config: PretrainedConfig, *, prefix: str) -> Weights:
    """The folder's weights, those of the language model under their names in memory.

    prefix: of the language model's keys; empty for a language model's own folder.
    Raises UserError when transformers can't build the language model or can't convert these weights.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise UserError(
            f"{folder}/config.json: transformers can't build this {config.model_type} language model "
            f"({reason(error)}): correct it, or name another folder"
        ) from error
    if not prefix and getattr(config, "quantization_config", None) is not None:
        specs = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in model.state_dict().items()}
        return QuantizedWeights(folder, specs)
    try:
        return ConvertedWeights(weights, model, prefix)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{folder}: the language model's weights do not have the form that transformers expects of "
            f"{config.model_type} ({reason(error)}): copy or download them again"
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """The language model's configuration. Raises UserError when transformers does not know it as a causal LM."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (*CONFIG_ERRORS, OSError) as error:
        raise UserError(
            f"{folder} is no language model that transformers can read ({reason(error)}): name another folder"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{folder} holds a {config.model_type} model, expected a causal language model or ST-LLM weights: "
            "name another folder"
        )
    return config


class ConvertedWeights(Weights):
    """Weights whose language model has the names of `model`, which may be on the meta device.

    prefix: of the language model's keys; others stay as they are. Keys that fit no weight of the model keep their
        names, without those that transformers ignores as well (buffers of old versions, heads that only training uses).
    """

    def __init__(self, weights: Weights, model: PreTrainedModel, prefix: str) -> None:
        self._weights, self._model, self._prefix = weights, model, prefix
        self._sources: dict[str, list[tuple[str, str]]] = {}  # first key made -> (pattern, key on disk)
        self._converters: dict[str, WeightConverter] = {}  # first key made -> what makes it
        self._first: dict[str, str] = {}  # key -> first key of those that are made together
        conversions = get_model_conversion_mapping(model)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in conversions if isinstance(one, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted, base = model.state_dict(), model.base_model_prefix
        ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$.")
        for key in sorted((key for key in weights.specs if key.startswith(prefix)), key=dot_natural_key):
            plain = key[len(prefix) :]
            name, pattern = rename_source_key(plain, renamings, converters, base, wanted)
            if LORA.sub("", name) not in wanted:  # it has the name in memory already, or is not the model's
                name, pattern = rename_source_key(plain, [], [], base, wanted)
            if LORA.sub("", name) not in wanted and ignored.search(name):
                continue
            self._sources.setdefault(prefix + name, []).append((pattern or plain, key))
            if pattern is not None:
                self._converters[prefix + name] = by_pattern[pattern]
        specs = {key: spec for key, spec in weights.specs.items() if not key.startswith(prefix)}
        for first, sources in self._sources.items():
            if first in self._converters:
                tensors = self._convert(first, self._without_memory)
                made = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
            else:
                made = {first: weights.specs[sources[0][1]]}
            specs |= made
            self._first |= dict.fromkeys(made, first)
        place = {key: number for number, key in enumerate(weights.specs)}  # files are read through once, in order
        self.specs = dict(sorted(specs.items(), key=lambda item: place[self._first_source(item[0])]))

    def copy_to(self, key: str, destination: Tensor) -> None:
        if self._first.get(key) in self._converters:
            destination.copy_(self._convert(self._first[key], self._weights.read)[key])
        else:
            self._weights.copy_to(self._first_source(key), destination)

    def _first_source(self, key: str) -> str:
        return self._sources[self._first[key]][0][1] if key in self._first else key

    def _without_memory(self, key: str) -> Tensor:
        spec = self._weights.specs[key]
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    def _convert(self, first: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors that are made together, by their keys."""
        converter: Any = deepcopy(self._converters[first])  # typed for futures only, but takes tensors as well
        name = first[len(self._prefix) :]
        for pattern, key in self._sources[first]:
            converter.add_tensor(name, key, pattern, read(key))
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {self._prefix + key: value[0] if isinstance(value, list) else value for key, value in made.items()}


class QuantizedWeights(Weights):
    """A quantized language model's weights, which transformers dequantizes; held in memory from the first use on."""

    def __init__(self, folder: Path, specs: dict[str, Spec]) -> None:
        self._folder = folder
        self._loaded: MemoryWeights | None = None
        self.specs = specs

    def copy_to(self, key: str, destination: Tensor) -> None:
        if self._loaded is None:
            self._loaded = MemoryWeights(_load(self._folder).state_dict())
        self._loaded.copy_to(key, destination)


def _load(folder: Path) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder}: transformers can't read this quantized language model here ({reason(error)}): use the "
            "model's own weights, which are not quantized"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        named = ", ".join(sorted(info["missing_keys"])[:6])
        raise UserError(f"{folder}: the language model's weights are not complete, missing are {named}")
    return model if getattr(model, "hf_quantizer", None) is None else model.dequantize()
