"""From a configuration to a model: the weights that its `model` section names are loaded, later ones override earlier
ones. Weights that no file has start fresh only in the parts that training may start fresh.
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
    """Infer the configuration from the section and the weights that it names. Raises UserError."""
    return decide_config(open_sources(settings), settings)


def build_model(cfg: DictConfig | Mapping[str, Any], *, device: str = "auto", dtype: str = "auto") -> STLLM:
    """Build the model of a configuration, with weights from the files that it names, in evaluation mode.

    cfg: what `load_config` returns, or its `model` section.
    These parts may start fresh: the temporal adapter, the global-local module, the MVM decoder, LoRA; the projection
    when no named file is of a kind that has one; what `model.fresh` names; everything when no file is named. Raises
    UserError for anything else.
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
    """Build as `build_model` does, and return the audit too; the attention is not chosen yet.

    trained_dtype and those after it: as in `assemble`.
    """
    settings = model_section(cfg)
    sources = open_sources(settings)
    config = decide_config(sources, settings)
    quantization = quantization_of(settings) if language_model == "whole" else None
    if quantization == "8bit" and device == "auto" and torch.cuda.is_available() and "LOCAL_RANK" not in os.environ:
        device = f"cuda:{settings.get('device_8bit', 0)}"  # published; a launcher's processes each have their own
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
        # newer releases of transformers have renamed it, and warn at the old name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, report


def build_encoder(cfg: DictConfig | Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> STLLM:
    """Build as `build_model` does, without the language model: enough to encode clips."""
    model, report = build_audited(cfg, device=device, dtype=dtype, language_model="none")
    encoder = ("vision encoder", "ln_vision", "qformer")
    if fresh := [part for part, audit in report.parts.items() if audit["fresh"] and part in encoder]:
        log.warning("from random weights, as no file gives them: %s", ", ".join(fresh))
    return model
