"""Reads weights one at a time, so that loading needs little memory besides the model.

A file is memory-mapped. Pages that were read count as memory of the process until the mapping is closed, so the file is
mapped anew after every `MAPPED_BYTES`, or after a thirty-second of the file if that is more. Weights are copied out, so
the file may be replaced afterwards.

transformers renames and merges the weights of many architectures while it loads them (the experts of mixtures,
GPT-NeoX's head, GPT-2's missing prefix), and undoes that when it saves. `convert_language_model` applies the same
conversions to one weight at a time. Source: `transformers.core_model_loading`.

In folders that transformers has saved in 4 or 8 bits (bitsandbytes), each weight is dequantized when it is read.
Source: `bitsandbytes.functional.QuantState`, and the sources of stllm/models/quantization.py.
"""

import math
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
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
from stllm.common.jsonl import loads
from stllm.models.configuration import CONFIG_ERRORS

MAPPED_BYTES = 64 << 20
CONTAINERS = ("model", "state_dict", "module")  # keys under which training scripts save the state dict
QUANT_STATE = re.compile(r"(?P<key>.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
BITSANDBYTES = "bitsandbytes"
REFUSED_METHODS = ("gptq", "awq")
LORA = re.compile(r"\.(?:base_layer|lora_[AB]\.default)(?=\.)")  # what peft puts between a layer and its weight


class Weights(ABC):
    """Named tensors that can be read one at a time. specs: their shapes and types, as tensors on the meta device."""

    specs: dict[str, Tensor]

    @property
    def stored(self) -> dict[str, Tensor]:
        """The tensors as stored in the files, before renaming and conversion, in the form of `specs`."""
        return self.specs

    @abstractmethod
    def copy_to(self, key: str, destination: Tensor, first: int = 0) -> None:
        """Copy rows of a tensor, starting at row `first`, into `destination`, which determines their number.

        destination: a tensor on any device and of any type.
        """

    def read(self, key: str) -> Tensor:
        """Return a copy of a tensor in main memory, in its stored type."""
        tensor = torch.empty_like(self.specs[key], device="cpu")
        self.copy_to(key, tensor)
        return tensor


class WeightFiles(Weights):
    """The weights of several files together. Later files override earlier ones; at most one is open at a time.

    Raises UserError for a file that is damaged or holds no weights.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.specs = {}
        self._home: dict[str, Path] = {}
        self._budget: dict[Path, float] = {}  # bytes to read before the file is mapped anew
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
            except Exception as error:  # torch and safetensors raise exceptions of many types
                if out_of_memory(error):
                    raise
                raise UserError(_unreadable(path, error)) from error
            self._home |= dict.fromkeys(views, path)
            self._budget[path] = max(MAPPED_BYTES, path.stat().st_size // 32) if _mappable(path) else math.inf

    def copy_to(self, key: str, destination: Tensor, first: int = 0) -> None:
        """See `Weights.copy_to`. A large tensor is copied in slices, so that its whole mapping is never in memory."""
        spec, budget = self.specs[key], self._budget[self._home[key]]
        if destination.shape == spec.shape and (not spec.dim() or spec.nbytes <= budget):
            destination.copy_(self._view(key, spec.nbytes)[...])
            return
        rows = max(1, int(budget) * len(spec) // spec.nbytes)
        for start in range(0, len(destination), rows):
            part = destination[start : start + rows]
            found = slice(first + start, first + start + len(part))
            part.copy_(self._view(key, spec[found].nbytes)[found])

    def _view(self, key: str, size: int) -> Any:
        """Return a view of a mapped tensor, to read `size` bytes of it."""
        path = self._home[key]
        if path != self._open or self._touched + size > self._budget[path]:
            self._views = {}  # close the old mapping first
            self._views = open_views(path)
            self._open, self._touched = path, 0
        self._touched += size
        return self._views[key]


def _copy_rows(tensor: Tensor, destination: Tensor, first: int) -> None:
    destination.copy_(tensor[first : first + len(destination)] if tensor.dim() else tensor)


def _mappable(path: Path) -> bool:
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def open_views(path: Path) -> Mapping[str, Any]:
    """Memory-map a weight file. A tensor is read when it is sliced. A file older than torch 1.6 is read whole.

    Raises UserError if it holds no weights, and what torch or safetensors raise if it is damaged.
    """
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
    """Return a message about a file that torch or safetensors can't read."""
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


Make = Callable[[Sequence[Tensor]], dict[str, Tensor]]


class DerivedWeights(Weights):
    """Weights derived from other weights: renamed, or computed from one or several of them.

    renamed: new key -> original key. made: pairs (original keys, function). The function gets
    their tensors, and returns a dictionary: new key -> new tensor.
    """

    def __init__(
        self, weights: Weights, renamed: Mapping[str, str], made: Iterable[tuple[Sequence[str], Make]]
    ) -> None:
        self._weights = weights
        self._origins: dict[str, tuple[Sequence[str], Make | None]] = {}
        specs = {ours: weights.specs[theirs] for ours, theirs in renamed.items()}
        self._origins |= {ours: ([theirs], None) for ours, theirs in renamed.items()}
        for sources, make in made:
            results = make([weights.specs[key] for key in sources])
            specs |= results
            self._origins |= dict.fromkeys(results, (sources, make))
        place = {key: number for number, key in enumerate(weights.specs)}  # in the order of the files
        self.specs = dict(sorted(specs.items(), key=lambda item: place[self._origins[item[0]][0][0]]))

    @property
    def stored(self) -> dict[str, Tensor]:
        """See `Weights.stored`."""
        return self._weights.stored

    def copy_to(self, key: str, destination: Tensor, first: int = 0) -> None:
        sources, make = self._origins[key]
        if make is None:
            self._weights.copy_to(sources[0], destination, first)
        else:
            _copy_rows(make([self._weights.read(source) for source in sources])[key], destination, first)


def split_biases(folder: Path, weights: Weights) -> Weights:
    """Split the encoder's `qkv.bias` in transformers' BLIP models into EVA-ViT's `q_bias` and `v_bias`.

    EVA-ViT has no bias for the attention keys, so reading raises UserError if that part of `qkv.bias` is not zero.
    """

    def split(fused: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        query, inner, value = tensors[0].tensor_split(3)
        if not inner.is_meta and inner.count_nonzero():
            raise UserError(
                f"{folder}: {fused}: the encoder has no key bias, but this checkpoint's is not zero (largest "
                f"{inner.abs().max().item():.3g}): it is not an EVA-ViT of the BLIP-2 line"
            )
        stem = fused.removesuffix("qkv.bias")
        return {f"{stem}q_bias": query, f"{stem}v_bias": value}

    biases = [key for key in weights.specs if key.endswith("qkv.bias")]
    others = {key: key for key in weights.specs if key not in biases}
    return DerivedWeights(weights, others, [([key], partial(split, key)) for key in biases])


def quantization_method(settings: Mapping[str, Any]) -> str:
    """Return the method of a quantization_config. Old versions of bitsandbytes did not save it."""
    return str(settings.get("quant_method", BITSANDBYTES))


def dequantize(folder: Path, weights: Weights, config: Mapping[str, Any]) -> Weights:
    """Return weights that bitsandbytes has quantized, dequantized to the type that they had before.

    Weights of other methods are returned unchanged; `convert_language_model` dequantizes them. config: the content of
    the folder's config.json. Raises UserError for GPTQ and AWQ, and for a folder that is not complete.
    """
    method = quantization_method(config["quantization_config"])
    if method in REFUSED_METHODS:
        raise UserError(
            f"{folder} is quantized with {method.upper()}, which can't be read here: name a folder with the model's "
            "own weights, and add --quantization 4bit to hold them in 4 bits"
        )
    if method != BITSANDBYTES:
        return weights
    made: list[tuple[Sequence[str], Make]] = []
    for key in weights.specs:
        if match := QUANT_STATE.fullmatch(key):
            try:
                stem, state = match["key"], loads(bytes(weights.read(key).tolist()))
            except ValueError:
                raise UserError(f"{folder} is quantized, but {key} is damaged: copy or download it again") from None
            parts = [stem, f"{stem}.absmax", f"{stem}.quant_map"]
            parts += [f"{stem}.{name}" for name in ("nested_absmax", "nested_quant_map") if "nested_offset" in state]
            made.append(([*parts, key], partial(_from_4bit, stem, state)))
        elif key.endswith(".SCB"):
            stem, dtype = key.removesuffix("SCB"), config.get("dtype") or config.get("torch_dtype") or "float16"
            parts = [f"{stem}weight", key, *({f"{stem}weight_format"} & weights.specs.keys())]
            made.append((parts, partial(_from_8bit, f"{stem}weight", getattr(torch, dtype))))
    used = {part for parts, _ in made for part in parts}
    if lacking := sorted(used - weights.specs.keys()):
        raise UserError(f"{folder} is quantized, but {lacking[0]} is missing: copy or download it again")
    return DerivedWeights(weights, {key: key for key in weights.specs if key not in used}, made)


def _from_4bit(key: str, state: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Dequantize: look up two weights for each byte, and multiply each block by its largest absolute value.

    tensors: the bytes; the blocks' largest absolute values; the 16 levels; and, if the largest absolute values are
    quantized, too, the tensors to dequantize these.
    """
    shape, dtype = state["shape"], getattr(torch, state["dtype"])
    if tensors[0].is_meta:
        return {key: torch.empty(shape, dtype=dtype, device="meta")}
    packed, absmax, levels, *nested = tensors[:-1]
    if nested:  # the largest values are quantized, too
        scales = nested[0].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = nested[1][absmax.int()] * scales + state["nested_offset"]
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): the upper half of a byte is the first weight
    weight = pairs[packed.view(torch.uint8).flatten().int()].flatten()[: math.prod(shape)]
    weight *= absmax.repeat_interleave(state["blocksize"])[: len(weight)]
    return {key: weight.view(shape).to(dtype)}


def _from_8bit(key: str, dtype: torch.dtype, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Dequantize: multiply each row of 8-bit weights by its largest absolute value / 127."""
    weight, largest = tensors[:2]
    return {key: (weight * largest[:, None] / 127).to(dtype)}


def read_config(folder: Path) -> PretrainedConfig:
    """Read a language model's config.json. Raises UserError unless it is a causal LM that transformers knows."""
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
    """Rename and merge the stored weights of a language model, as transformers does when it loads them.

    prefix: the beginning of the language model's keys; empty if the folder holds only a language model. Other keys are
        unchanged. Keys that fit no weight of the model are kept, except those that transformers ignores, too (buffers
        of old versions, heads used only in training).
    Raises UserError if transformers can't build the language model or can't convert these weights.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise UserError(
            f"{folder}/config.json: transformers can't build this {config.model_type} language model "
            f"({reason(error)}): correct it, or name another folder"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if not prefix and quantization and quantization_method(quantization) != BITSANDBYTES:
        return QuantizedWeights(folder, model.state_dict())
    try:
        return _converted(weights, model, prefix)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{folder}: the language model's weights do not have the form that transformers expects of "
            f"{config.model_type} ({reason(error)}): copy or download them again"
        ) from error


def _converted(weights: Weights, model: PreTrainedModel, prefix: str) -> Weights:
    """Apply transformers' conversions for this model, which may be on the meta device."""
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted, base = model.state_dict(), model.base_model_prefix
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$.")
    renamed = {key: key for key in weights.specs if not key.startswith(prefix)}
    merged: dict[str, list[tuple[str, str]]] = {}  # new name -> (pattern, stored key) of all that make it
    for key in sorted((key for key in weights.specs if key.startswith(prefix)), key=dot_natural_key):
        plain = key[len(prefix) :]
        name, pattern = rename_source_key(plain, renamings, converters, base, wanted)
        if LORA.sub("", name) not in wanted:  # already renamed, or not the model's
            name, pattern = rename_source_key(plain, [], [], base, wanted)
        if pattern is not None:
            merged.setdefault(name, []).append((pattern, key))
        elif LORA.sub("", name) in wanted or not ignored.search(name):
            renamed.setdefault(prefix + name, key)

    def convert(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        converter: Any = deepcopy(by_pattern[merged[name][0][0]])  # its annotations name futures only; tensors work
        for (pattern, key), tensor in zip(merged[name], tensors, strict=True):
            converter.add_tensor(name, key, pattern, tensor)
        made = converter.convert(name, model=model, config=model.config)
        return {prefix + key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    made = [([key for _, key in sources], partial(convert, name)) for name, sources in merged.items()]
    return DerivedWeights(weights, renamed, made)


class QuantizedWeights(Weights):
    """Weights of a quantized language model that transformers dequantizes at the first use. Each can be read once."""

    def __init__(self, folder: Path, specs: dict[str, Tensor]) -> None:
        self.specs = specs
        self._folder = folder
        self._state: dict[str, Tensor] | None = None

    def copy_to(self, key: str, destination: Tensor, first: int = 0) -> None:
        if self._state is None:
            self._state = self._load()
        _copy_rows(self._state.pop(key), destination, first)  # frees its memory

    def _load(self) -> dict[str, Tensor]:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype="auto", local_files_only=True, output_loading_info=True, trust_remote_code=False
            )
            model, info = loaded
            model = model if getattr(model, "hf_quantizer", None) is None else model.dequantize()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{self._folder}: transformers can't read this quantized language model here ({reason(error)}): use "
                "the model's own weights, which are not quantized"
            ) from error
        if info["missing_keys"]:
            named = ", ".join(sorted(info["missing_keys"])[:6])
            raise UserError(f"{self._folder}: the language model's weights are not complete, missing are {named}")
        return dict(model.state_dict())
