"""Building the model of a configuration, with the weights of the files in its `model` section.

Later files override earlier ones. Only some parts may be initialised randomly if no file has their weights.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from stllm.models.checkpoints.audit import AuditReport
from stllm.models.checkpoints.infer_config import decide_config, open_sources
from stllm.models.checkpoints.load import Division, assemble
from stllm.models.configuration import STLLMConfig
from stllm.models.language_model import set_attention
from stllm.models.settings import model_section, quantization_of
from stllm.models.st_llm import STLLM

log = logging.getLogger(__name__)


def config_from_settings(settings: Mapping[str, Any]) -> STLLMConfig:
    """Infer the model's configuration from the section `model` and its files. Raises UserError for contradictions."""
    return decide_config(open_sources(settings), settings)


def build_model(cfg: DictConfig | Mapping[str, Any], *, device: str = "auto", dtype: str = "auto") -> STLLM:
    """Build the configured model, load the weights that the configuration names, and return it in evaluation mode.

    cfg: the result of `load_config`, or its `model` section.
    Some parts are initialised randomly if no file has their weights: the temporal adapter, the global-local module, the
    MVM decoder, LoRA, the parts in `model.fresh`, and the projection if every file holds only part of a model. If no
    file is named, all parts are. Raises UserError for any other missing weights, and for an invalid configuration.
    """
    model, report = build_audited(cfg, device=device, dtype=dtype)
    for line in report.details():
        log.info(line)
    set_attention(model.language_model, model_section(cfg).get("attn_implementation"))
    return model


def build_audited(
    cfg: DictConfig | Mapping[str, Any],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trained_dtype: torch.dtype | None = None,
    language_model: str = "whole",
    division: Division | None = None,
) -> tuple[STLLM, AuditReport]:
    """Build the model as `build_model` does, and return it with its audit. The attention kernels are not set.

    trained_dtype, language_model, division: as in `assemble`.
    """
    settings = model_section(cfg)
    sources = open_sources(settings)
    config = decide_config(sources, settings)
    quantization = quantization_of(settings) if language_model == "whole" else None
    if quantization == "8bit" and device == "auto" and torch.cuda.is_available() and "LOCAL_RANK" not in os.environ:
        device = f"cuda:{settings.get('device_8bit', 0)}"  # as published; under torchrun each process has its own GPU
    model, report = assemble(
        config,
        sources,
        device=device,
        dtype=dtype,
        training=True,
        fresh=settings.get("fresh") or (),
        trained_dtype=trained_dtype,
        language_model=language_model,
        quantization=quantization,
        division=division,
    )
    if settings.get("use_grad_checkpoint") and language_model == "whole":
        # newer releases of transformers renamed this method, and warn about the old name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, report


def build_encoder(cfg: DictConfig | Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> STLLM:
    """Build the model as `build_model` does, without its language model, to encode clips."""
    model, report = build_audited(cfg, device=device, dtype=dtype, language_model="none")
    encoder = ("vision encoder", "ln_vision", "qformer")
    if fresh := [part for part, audit in report.parts.items() if audit["fresh"] and part in encoder]:
        log.warning("from random weights, as no file gives them: %s", ", ".join(fresh))
    return model
