"""`stllm inspect PATH`: what a checkpoint or a configuration is, from names and shapes alone; no weight is read.

Format, family, sizes, parameters of each part, the memory they need by type and, for a configuration with a `run`, to
train; and the audit against a configuration.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stllm.common.errors import UserError
from stllm.common.terminal import console
from stllm.models.checkpoints.assembly import meta_model
from stllm.models.checkpoints.audit import PART_NAMES, AuditReport, part_of
from stllm.models.checkpoints.contradictions import FAMILIES
from stllm.models.checkpoints.deciding import assumptions, decide_config, merged_shapes, open_checkpoint, open_pieces
from stllm.models.checkpoints.formats import Source, locate
from stllm.models.checkpoints.planning import make_plan
from stllm.models.checkpoints.sizes import sizes_from_weights
from stllm.models.checkpoints.training_memory import count_parameters, memory_table, training_memory
from stllm.models.configuration import STLLMConfig
from stllm.models.factory import explicit_settings, model_section, piece_paths
from stllm.models.st_llm import STLLM

SUMMARY = ("path", "format", "family", "tensors", "stored_bytes", "stored_types")
BYTES_4BIT = 0.5 + 4 / 64  # half a byte, and one float32 scale for each block of 64


def run(args: argparse.Namespace) -> int:
    """The command: prints what it found; 1 when a configuration does not fit the weights."""
    if args.path is None:
        found, report = inspect_config(args.cfg_path, args.options)
    else:
        found, report = inspect_path(args.path, args.cfg_path, args.options)
    if args.json:
        print(json.dumps(found, indent=1, default=str))
    else:
        _print(found, report)
    try:
        if report is not None:
            report.raise_for_problems()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def inspect_path(
    path: str | Path, cfg_path: str | Path | None = None, options: Sequence[str] = ()
) -> tuple[dict[str, Any], AuditReport | None]:
    """A checkpoint; where it is only a part of a model and no configuration is given, there is no audit."""
    settings = explicit_settings(cfg_path, options)
    place = locate(path)
    if not settings:
        source = open_pieces([place], settings)[0]
        if not source.is_whole_model:
            return {**_stored([source]), "sizes": sizes_from_weights(merged_shapes([source]))}, None
    sources = open_checkpoint(place, settings)
    config = decide_config(sources, settings)
    found, report = _describe(config, sources, training=False)
    return {**found, "assumed": assumptions(sources, settings, config)}, report


def inspect_config(
    cfg_path: str | Path | None, options: Sequence[str] = ()
) -> tuple[dict[str, Any], AuditReport | None]:
    """The model that a configuration asks for, with the weights that it names, as far as they are here."""
    from stllm.common.config import load_config

    cfg = load_config(cfg_path, options)
    settings = model_section(cfg)
    paths = piece_paths(settings)
    here = [path for path in paths if Path(path).exists()]
    sources = open_pieces(here, settings)
    config = decide_config(sources, settings, default_llm=True)
    found, report = _describe(config, sources, training=True, fresh=settings.get("fresh") or (), run=cfg.run)
    absent = [
        f"{path} is not here: its sizes are those of model.llm, or the published ones"
        for path in paths
        if path not in here
    ]
    return {**found, "assumed": absent}, report if sources and not absent else None


def parameters_by_part(model: STLLM) -> dict[str, dict[str, int]]:
    """Total and trainable parameters of each part; tied weights count once."""
    counts = {part: {"total": 0, "trainable": 0} for part in PART_NAMES}
    for name, parameter in model.named_parameters():
        part = counts[part_of(name)]
        part["total"] += parameter.numel()
        part["trainable"] += parameter.numel() * parameter.requires_grad
    return {part: count for part, count in counts.items() if count["total"]}


def memory_by_dtype(model: STLLM) -> dict[str, int]:
    """Bytes of the weights alone. 8bit, 4bit: the language model's linear layers, all else in 2 bytes."""
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.language_model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    sizes = {
        "float32": 4 * total,
        "bfloat16 or float16": 2 * total,
        "8bit": 2 * (total - linear) + linear,
        "4bit": 2 * (total - linear) + BYTES_4BIT * linear,
    }
    return {name: int(size) for name, size in sizes.items()}


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
    parts = parameters_by_part(model)
    return {
        **(_stored(sources) if sources else {}),
        "family": FAMILIES[config.qformer_text_input],
        "sizes": _sizes(config),
        "parameters": parts,
        "total": {name: sum(part[name] for part in parts.values()) for name in ("total", "trainable")},
        "memory_bytes": memory_by_dtype(model),
        **({"training_memory_bytes": _training(model, run)} if run else {}),
        **({"audit": report.to_dict()} if sources else {}),
    }, report


def _training(model: STLLM, run: Mapping[str, Any]) -> dict[str, Any]:
    precision = "bfloat16" if run.get("bf16") else "float16" if run.get("fp16") else "float32"
    return {
        "precision": precision,
        "strategies": training_memory(count_parameters(model), half=precision != "float32"),
    }


def _stored(sources: Sequence[Source]) -> dict[str, Any]:
    specs = [spec for source in sources for spec in source.weights.specs.values()]
    dtypes = Counter(str(spec.dtype).removeprefix("torch.") for spec in specs)
    return {
        "path": " + ".join(str(source.path) for source in sources),
        "format": " + ".join(source.format.value for source in sources),
        "tensors": len(specs),
        "stored_bytes": sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs),
        "stored_types": dict(dtypes.most_common()),
    }


def _sizes(config: STLLMConfig) -> dict[str, Any]:
    text = config.text_config
    sizes: dict[str, Any] = {
        "vision": config.vision_config,
        "language_model": {
            "model_type": text.model_type,
            **{name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")},
        },
        "tokens_per_frame": config.tokens_per_frame,
        "video_input": config.video_input,
        "use_mask": config.use_mask,
        "mvm_decode": config.mvm_decode,
        "lora": config.lora,
        "template": config.template,
    }
    if config.video_input == "residual":
        sizes |= {"residual_size": config.residual_size, "residual_bottleneck": config.residual_bottleneck}
    if config.has_qformer:
        qformer = config.qformer_config
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        sizes["qformer"] = {name: getattr(qformer, name) for name in names} | {"text_input": config.qformer_text_input}
    return sizes


def _print(found: Mapping[str, Any], report: AuditReport | None) -> None:
    from rich.table import Table

    out = console()
    lines = [f"{key.replace('_', ' ')}: {_shown(key, found[key])}" for key in SUMMARY if key in found]
    lines += [f"{key.replace('_', ' ')}: {_shown(key, value)}" for key, value in found["sizes"].items()]
    lines += [f"assumed: {line}" for line in found.get("assumed", ())]
    out.print("\n".join(lines), soft_wrap=True)
    if "parameters" in found:
        table = Table(title="parameters")
        for column in ("part", "total", "trainable"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for part, counts in [*found["parameters"].items(), ("all", found["total"])]:
            table.add_row(part, f"{counts['total']:,}", f"{counts['trainable']:,}")
        out.print(table)
        memory = ", ".join(f"{_readable(size)} as {name}" for name, size in found["memory_bytes"].items())
        out.print(f"memory of the weights: {memory}", soft_wrap=True)
    if "training_memory_bytes" in found:
        training = found["training_memory_bytes"]
        out.print(memory_table(training["strategies"], training["precision"]))
    if report is not None:
        out.print(report.table())
        for line in report.details():
            out.print(line, soft_wrap=True)


def _shown(key: str, value: Any) -> str:
    if key == "stored_bytes":
        return _readable(value)
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, Mapping) else str(value)


def _readable(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
