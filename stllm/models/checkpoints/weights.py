"""Weights read one by one with bounded memory, from weight files and from language models of any architecture.

Pages of a mapping that were touched count as memory of the process until the mapping is closed. So a file is mapped
again after every `MAPPED_BYTES` or thirty-second part of it. Readers get copies, so the file may be replaced
afterwards.

transformers renames and merges the weights of many architectures while it loads them (the experts of mixtures,
GPT-NeoX's head, GPT-2's missing prefix), and undoes that when it saves. `convert_language_model` applies the same
conversions to one weight at a time, so that such models are streamed like any other. Source:
`transformers.core_model_loading`.
"""

import math
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
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

from stllm.common.errors import UserError, out_of_memory, reason
from stllm.models.configuration import CONFIG_ERRORS

MAPPED_BYTES = 64 << 20
CONTAINERS = ("model", "state_dict", "module")  # where training scripts put the weights
LORA = re.compile(r"\.(?:base_layer|lora_[AB]\.default)(?=\.)")  # what peft puts between a layer and its weight


class Weights(ABC):
    """Named tensors that can be copied out one by one. specs: their shapes and types, as tensors on the meta device."""

    specs: dict[str, Tensor]

    @abstractmethod
    def copy_to(self, key: str, destination: Tensor) -> None:
        """Copy a tensor into one of the same shape, on any device and of any type."""

    def read(self, key: str) -> Tensor:
        """Return a copy of the tensor, in its own type, in main memory."""
        tensor = torch.empty_like(self.specs[key], device="cpu")
        self.copy_to(key, tensor)
        return tensor


class WeightFiles(Weights):
    """Files as one set of weights, in reading order. At most one of them is open at a time.

    Raises UserError for a file that is damaged or holds no weights.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.specs = {}
        self._home: dict[str, Path] = {}
        self._budget: dict[Path, float] = {}  # bytes to touch before the file is mapped anew
        self._open: Path | None = None
        self._views: Mapping[str, Any] = {}
        self._touched = 0
        for path in paths:
            try:
                views = open_views(path)
                for key, view in views.items():
                    shape = view.shape if isinstance(view, Tensor) else view.get_shape()
                    dtype = (view[:0] if shape else view[...]).dtype
                    self.specs[key] = torch.empty(shape, dtype=dtype, device="meta")
            except UserError:
                raise
            except Exception as error:  # torch and safetensors raise many kinds; the sentence keeps the cause
                if out_of_memory(error):
                    raise
                raise UserError(_unreadable(path, error)) from error
            self._home |= dict.fromkeys(views, path)
            self._budget[path] = max(MAPPED_BYTES, path.stat().st_size // 32) if _mappable(path) else math.inf

    def copy_to(self, key: str, destination: Tensor) -> None:
        """Copy in slices that fit the budget, so that the largest tensor costs no more than the smallest."""
        spec, budget = self.specs[key], self._budget[self._home[key]]
        if not spec.dim() or spec.nbytes <= budget:
            destination.copy_(self._view(key, spec.nbytes)[...])
            return
        rows = max(1, int(budget) * len(spec) // spec.nbytes)
        for start in range(0, len(spec), rows):
            part = slice(start, start + rows)
            destination[part].copy_(self._view(key, spec[part].nbytes)[part])

    def _view(self, key: str, size: int) -> Any:
        """The tensor to be sliced, `size` bytes of which will be touched."""
        path = self._home[key]
        if path != self._open or self._touched + size > self._budget[path]:
            self._views = {}  # the old mapping goes before the new one comes
            self._views = open_views(path)
            self._open, self._touched = path, 0
        self._touched += size
        return self._views[key]


def _mappable(path: Path) -> bool:
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def open_views(path: Path) -> Mapping[str, Any]:
    """Map a weight file. Its tensors are read when they are sliced. A file older than torch 1.6 is read whole."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        handle: Any = safe_open(path, framework="pt")
        return {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  # no mapping
    if not (mappable := _mappable(path)):
        with path.open("rb") as stream:
            if stream.read(1) != b"\x80":  # the pickle protocol mark that every torch.save begins with
                raise ValueError("it is neither a file of torch.save nor of safetensors")
    content = torch.load(path, map_location="cpu", mmap=mappable, weights_only=True)
    if isinstance(content, Mapping):
        for container in (content, *(content.get(name) for name in CONTAINERS)):
            named = container.items() if isinstance(container, Mapping) else ()
            if tensors := {str(key): value for key, value in named if isinstance(value, Tensor)}:
                return tensors
    raise UserError(f"{path} holds no weights: expected a state dict, at the top or under 'model'")


def _unreadable(path: Path, error: Exception) -> str:
    """Describe the fault of a file that torch or safetensors can't read."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{path} holds Python objects beside its tensors, which are never loaded because they could run code: save "
            "its state dict alone (torch.save(model.state_dict(), ...)) where the file comes from"
        )
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(64)
    if size == 0:
        return f"{path} is empty, expected weights: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a git-lfs pointer, not the weights: fetch them with `git lfs pull`"
    if start.startswith(b"PK"):
        cause = "the directory at its end is missing"
    else:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{path} can't be read as weights ({size} bytes; {cause}): it is damaged, was cut off, or is still being "
        "written; copy or download it again"
    )


def read_config(folder: Path) -> PretrainedConfig:
    """Read a language model's config.json. Raises UserError when transformers does not know it as a causal LM."""
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


def convert_language_model(folder: Path, weights: Weights, config: PretrainedConfig, *, prefix: str) -> Weights:
    """Return the folder's weights. Those of the language model get their names in memory.

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
        return QuantizedWeights(folder, model.state_dict())
    try:
        return ConvertedWeights(weights, model, prefix)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{folder}: the language model's weights do not have the form that transformers expects of "
            f"{config.model_type} ({reason(error)}): copy or download them again"
        ) from error


@dataclass
class _Group:
    """Weights that are made together. first: the first of their keys; sources: (pattern, key on disk)."""

    first: str
    converter: WeightConverter | None = None  # None: a single weight, which is only renamed
    sources: list[tuple[str, str]] = field(default_factory=list)


class ConvertedWeights(Weights):
    """Weights whose language model has the names of `model`, which may be on the meta device.

    prefix: of the language model's keys; others stay as they are. Keys that fit no weight of the model keep their
        names, without those that transformers ignores as well (buffers of old versions, heads that only training uses).
    """

    def __init__(self, weights: Weights, model: PreTrainedModel, prefix: str) -> None:
        self._weights, self._model, self._prefix = weights, model, prefix
        conversions = get_model_conversion_mapping(model)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in conversions if isinstance(one, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted, base = model.state_dict(), model.base_model_prefix
        ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$.")
        groups = {key: _Group(key, sources=[(key, key)]) for key in weights.specs if not key.startswith(prefix)}
        for key in sorted((key for key in weights.specs if key.startswith(prefix)), key=dot_natural_key):
            plain = key[len(prefix) :]
            name, pattern = rename_source_key(plain, renamings, converters, base, wanted)
            if LORA.sub("", name) not in wanted:  # it has the name in memory already, or is not the model's
                name, pattern = rename_source_key(plain, [], [], base, wanted)
            if LORA.sub("", name) not in wanted and ignored.search(name):
                continue
            group = groups.setdefault(prefix + name, _Group(prefix + name))
            group.sources.append((pattern or plain, key))
            if pattern is not None:
                group.converter = by_pattern[pattern]
        place = {key: number for number, key in enumerate(weights.specs)}  # files are read through once, in order
        self.specs, self._groups = {}, {}
        for group in sorted(groups.values(), key=lambda group: place[group.sources[0][1]]):
            made = self._convert(group, weights.specs.__getitem__)
            self.specs |= made
            self._groups |= dict.fromkeys(made, group)

    def copy_to(self, key: str, destination: Tensor) -> None:
        group = self._groups[key]
        if group.converter is None:
            self._weights.copy_to(group.sources[0][1], destination)
        else:
            destination.copy_(self._convert(group, self._weights.read)[key])

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors that are made together, by their keys."""
        if group.converter is None:
            return {group.first: read(group.sources[0][1])}
        converter: Any = deepcopy(group.converter)  # typed for futures only, but takes tensors as well
        name = group.first[len(self._prefix) :]
        for pattern, key in group.sources:
            converter.add_tensor(name, key, pattern, read(key))
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {self._prefix + key: value[0] if isinstance(value, list) else value for key, value in made.items()}


class UnfusedBiases(Weights):
    """Weights of transformers' BLIP models with the names of EVA-ViT: `qkv.bias` becomes `q_bias` and `v_bias`.

    EVA-ViT's keys have no bias: reading raises UserError when this one's is not zero.
    """

    def __init__(self, folder: Path, weights: Weights) -> None:
        self.specs = {}
        self._folder, self._weights = folder, weights
        self._fused: dict[str, tuple[str, int]] = {}  # the fused bias, and which third of it
        for key, spec in weights.specs.items():
            stem = key.removesuffix("qkv.bias")
            thirds = {stem + "q_bias": 0, stem + "v_bias": 2} if stem != key else {}
            self._fused |= {name: (key, third) for name, third in thirds.items()}
            self.specs |= {name: spec.tensor_split(3)[third] for name, third in thirds.items()} or {key: spec}

    def copy_to(self, key: str, destination: Tensor) -> None:
        if key not in self._fused:
            self._weights.copy_to(key, destination)
            return
        fused, third = self._fused[key]
        parts = self._weights.read(fused).tensor_split(3)
        if parts[1].count_nonzero():
            raise UserError(
                f"{self._folder}: {fused}: the encoder has no key bias, but this checkpoint's is not zero (largest "
                f"{parts[1].abs().max().item():.3g}): it is not an EVA-ViT of the BLIP-2 line"
            )
        destination.copy_(parts[third])


class QuantizedWeights(Weights):
    """A quantized language model's weights. transformers dequantizes them at the first use. Each can be copied once."""

    def __init__(self, folder: Path, specs: dict[str, Tensor]) -> None:
        self.specs = specs
        self._folder = folder
        self._state: dict[str, Tensor] | None = None

    def copy_to(self, key: str, destination: Tensor) -> None:
        if self._state is None:
            self._state = self._load()
        destination.copy_(self._state.pop(key))  # its memory goes when it was copied

    def _load(self) -> dict[str, Tensor]:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype="auto", local_files_only=True, output_loading_info=True, trust_remote_code=False
            )
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{self._folder}: transformers can't read this quantized language model here ({reason(error)}): use "
                "the model's own weights, which are not quantized"
            ) from error
        model, info = loaded
        if info["missing_keys"]:
            named = ", ".join(sorted(info["missing_keys"])[:6])
            raise UserError(f"{self._folder}: the language model's weights are not complete, missing are {named}")
        model = model if getattr(model, "hf_quantizer", None) is None else model.dequantize()
        return dict(model.state_dict())
