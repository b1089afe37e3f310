"""`stllm inspect PATH`: describes a checkpoint or a configuration, using only the names and shapes of weights.

It shows the format, the family, sizes, the number of parameters of each part, the memory that the weights need in each
type, and the audit against a configuration. For a configuration with a `run` section, it also computes the memory that
training needs for weights, gradients and AdamW's states. Activations, autocast's copies and fragmentation come on top.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from stllm.models.checkpoints.audit import PART_NAMES, AuditReport, part_of
from stllm.models.checkpoints.formats import Source, locate, open_source
from stllm.models.checkpoints.infer_config import (
    FAMILIES,
    assumptions,
    decide_config,
    merged_shapes,
    open_sources,
    sizes_from_weights,
)
from stllm.models.checkpoints.load import make_plan, meta_model
from stllm.models.configuration import STLLMConfig
from stllm.models.settings import explicit_settings, model_section, piece_paths
from stllm.models.st_llm import STLLM

BYTES_4BIT = 0.5 + 4 / 64  # half a byte, and one float32 scale for each block of 64
NUM_GPUS = (1, 8)  # numbers of GPUs of one machine to compute the training memory for


def inspect_path(
    path: str | Path, cfg_path: str | Path | None = None, options: Sequence[str] = ()
) -> tuple[dict[str, Any], AuditReport | None]:
    """Describe a checkpoint. Returns the description for JSON, and the audit.

    The audit is None for a part of a model without a configuration. Raises UserError for an unusable checkpoint.
    """
    settings = explicit_settings(cfg_path, options)
    place = locate(path)
    if not settings:
        source = open_source(place)
        if not source.is_whole_model:
            return {**_stored([source]), "sizes": sizes_from_weights(merged_shapes([source]))}, None
    sources = open_sources(settings, place)
    config = decide_config(sources, settings)
    found, report = _describe(config, sources, training=False)
    return {**found, "assumed": assumptions(sources, settings, config)}, report


def inspect_config(
    cfg_path: str | Path | None, options: Sequence[str] = ()
) -> tuple[dict[str, Any], AuditReport | None]:
    """Describe the model of a configuration. Returns the description for JSON, and the audit.

    Weights that the configuration names are used if they exist here; if one is absent, the audit is None.
    """
    from stllm.common.config import load_config

    cfg = load_config(cfg_path, options)
    settings = model_section(cfg)
    paths = piece_paths(settings)
    depth = (settings.get("vision") or {}).get("depth")
    sources = [open_source(path, depth=depth) for path in paths if Path(path).exists()]
    config = decide_config(sources, settings, default_llm=True)
    found, report = _describe(config, sources, training=True, fresh=settings.get("fresh") or (), run=cfg.run)
    absent = [
        f"{path} is not here: its sizes are those of model.llm, or the published ones"
        for path in paths
        if not Path(path).exists()
    ]
    return {**found, "assumed": absent}, report if sources and not absent else None


def _describe(
    config: STLLMConfig,
    sources: Sequence[Source],
    *,
    training: bool,
    fresh: Sequence[str] = (),
    run: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], AuditReport]:
    model = meta_model(config, torch.float32)
    report = make_plan(model, sources, training=training, fresh=fresh).report
    text = config.text_config
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    sizes: dict[str, Any] = {
        "vision": config.vision_config,
        "language_model": {name: getattr(text, name, None) for name in names},
        "tokens_per_frame": config.tokens_per_frame,
    }
    own = ["video_input", "use_mask", "mvm_decode", "lora", "template"]
    own += ["residual_size", "residual_bottleneck"] if config.video_input == "residual" else []
    sizes |= {name: getattr(config, name) for name in own}
    if config.has_qformer:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        qformer = {name: getattr(config.qformer_config, name) for name in names}
        sizes["qformer"] = {**qformer, "text_input": config.qformer_text_input}
    parts = parameters_by_part(model)
    found = {
        **(_stored(sources) if sources else {}),
        "family": FAMILIES[config.qformer_text_input],
        "sizes": sizes,
        "parameters": parts,
        "total": {name: sum(part[name] for part in parts.values()) for name in ("total", "trainable")},
        "memory_bytes": memory_by_dtype(model),
    }
    if run:
        precision = "bfloat16" if run.get("bf16") else "float16" if run.get("fp16") else "float32"
        strategies = training_memory(count_parameters(model), half=precision != "float32")
        found["training_memory_bytes"] = {"precision": precision, "strategies": strategies}
    if sources:
        found["audit"] = report.to_dict()
    return found, report


def _stored(sources: Sequence[Source]) -> dict[str, Any]:
    specs = [spec for source in sources for spec in source.weights.stored.values()]
    dtypes = Counter(str(spec.dtype).removeprefix("torch.") for spec in specs)
    return {
        "path": " + ".join(str(source.path) for source in sources),
        "format": " + ".join(source.format.value for source in sources),
        "tensors": len(specs),
        "stored_bytes": sum(spec.nbytes for spec in specs),
        "stored_types": dict(dtypes.most_common()),
    }


def parameters_by_part(model: STLLM) -> dict[str, dict[str, int]]:
    """Count the total and the trainable parameters of each part. Tied weights count once."""
    counts = {part: {"total": 0, "trainable": 0} for part in PART_NAMES}
    for name, parameter in model.named_parameters():
        part = counts[part_of(name)]
        part["total"] += parameter.numel()
        part["trainable"] += parameter.numel() * parameter.requires_grad
    return {part: count for part, count in counts.items() if count["total"]}


def memory_by_dtype(model: STLLM) -> dict[str, int]:
    """Compute the size of the weights in bytes, for each type.

    With 8bit and 4bit only the language model's linear layers are quantized; other weights take 2 bytes each.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    layers = [one for one in model.language_model.modules() if isinstance(one, nn.Linear) and one is not head]
    linear = sum(layer.weight.numel() for layer in layers)
    return {
        "float32": 4 * total,
        "bfloat16 or float16": 2 * total,
        "8bit": 2 * (total - linear) + linear,
        "4bit": int(2 * (total - linear) + BYTES_4BIT * linear),
    }


class ParameterCounts(NamedTuple):
    """Numbers of parameters of a model, to compute the memory of training.

    frozen, trained: all frozen and all trained parameters. largest: parameters of the module that directly holds the
    most, because ZeRO-3 gathers one module at a time. gathered: parameters of the largest layer plus all that belong to
    no layer, because FSDP gathers both at the same time.
    """

    frozen: int
    trained: int
    largest: int
    gathered: int

    @property
    def all(self) -> int:
        """The number of frozen and trained parameters together."""
        return self.frozen + self.trained


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a transformers model (its `_no_split_modules` names its layers). Tied ones count once."""
    layer_names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in layer_names]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ParameterCounts(
        frozen=sum(parameter.numel() for parameter in model.parameters()) - trained,
        trained=trained,
        largest=max(sum(one.numel() for one in module.parameters(recurse=False)) for module in model.modules()),
        gathered=max((sum(one.numel() for one in layer.parameters()) for layer in layers), default=0)
        + sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside),
    )


def training_memory(
    counts: ParameterCounts, *, half: bool, num_gpus: Sequence[int] = NUM_GPUS
) -> dict[str, dict[str, dict[int, int]]]:
    """Compute the memory of training in bytes, by strategy (DDP, ZeRO-2, ...).

    Each strategy has `gpu`: number of GPUs -> bytes of each GPU, and `host`: number of GPUs -> bytes of main memory.
    half: bf16 or fp16 with float32 master weights. Otherwise all is in float32, and DeepSpeed is left out.
    A GPU holds some parts whole, and its share of the sharded parts. Main memory holds what is offloaded, or what
    loading needs if that is more, because under ZeRO-2 every process loads a whole model. ZeRO: DeepSpeed's own
    estimates (`estimate_zero{2,3}_model_states_mem_needs`), separately for frozen weights. FSDP 2 gathers in half
    precision.
    """
    weight = 2 if half else 4
    states = 16 * counts.trained  # float32 weights, gradients and AdamW's two moments
    zero3, fsdp = 2 * counts.all + states, weight * counts.frozen + states
    module, layers = 2 * 2 * counts.largest, 2 * weight * counts.gathered  # weights and their gradients
    # bytes whole on each GPU, sharded over the GPUs, offloaded, and loaded by each process
    strategies = {
        "DDP": (weight * counts.frozen + states, 0, 0, 0),
        "ZeRO-2": (2 * counts.all, states + 2 * counts.trained, 0, 2 * counts.all),  # gradients in half precision, too
        "ZeRO-2 offload": (2 * counts.all, 0, states, 2 * counts.all),
        "ZeRO-3": (module, zero3, 0, 0),
        "ZeRO-3 offload": (module, 0, zero3, 0),
        "FSDP": (layers, fsdp, 0, 0),
        "FSDP offload": (layers, 0, fsdp, 0),
    }
    memory = {
        name: {
            "gpu": {gpus: int(whole + sharded / gpus) for gpus in num_gpus},
            "host": {gpus: max(offloaded, loaded * gpus) for gpus in num_gpus},
        }
        for name, (whole, sharded, offloaded, loaded) in strategies.items()
        if half or not name.startswith("ZeRO")
    }
    for gpus in num_gpus:  # DDP on several GPUs copies the gradients into buckets
        memory["DDP"]["gpu"][gpus] += 4 * counts.trained if gpus > 1 else 0
    return memory
