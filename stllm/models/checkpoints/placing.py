"""Quantised loading and device maps: transformers' `from_pretrained` puts the weights where they belong, audited.

8 and 4 bit are bitsandbytes', for the linear layers of the language model alone; the head and every other part stay
as precise as asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from stllm.common.device import resolve_device, resolve_dtype
from stllm.common.errors import UserError, unknown_name
from stllm.models.checkpoints.assembly import fill, meta_model
from stllm.models.checkpoints.audit import AuditReport, part_of
from stllm.models.checkpoints.formats import Format, Source
from stllm.models.checkpoints.planning import make_plan
from stllm.models.configuration import STLLMConfig
from stllm.models.st_llm import STLLM

QUANTIZATIONS = ("8bit", "4bit")
KEPT_PRECISE = ("vision_encoder", "qformer", "projection", "video_input", "mvm_decoder", "lm_head", "embed_out")


def place(
    config: STLLMConfig,
    sources: Sequence[Source],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    device_map: Any = None,
    training: bool = False,
) -> tuple[STLLM, AuditReport]:
    """The model in evaluation mode, quantised or spread over devices, and the audit. Raises UserError.

    Our own format is read by transformers directly; a foreign one passes through main memory.
    """
    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    arguments: dict[str, Any] = {"dtype": kind, "device_map": device_map or {"": target}}
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, kind)
    if [source.format for source in sources] == [Format.STLLM] and not training:
        loaded: Any = STLLM.from_pretrained(
            sources[0].path,
            config=config,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **arguments,
        )
        report = _audit_of(sources[0], loaded[1])
        return loaded[0].eval(), report
    model = meta_model(config, kind)
    plan = make_plan(model, sources, training=training)
    plan.report.raise_for_problems()
    fill(model, plan, torch.device("cpu"))
    placed = STLLM.from_pretrained(
        None, config=config, state_dict=model.state_dict(), trust_remote_code=False, **arguments
    )
    return placed.eval(), plan.report


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """8bit or 4bit for the language model's linear layers. Raises UserError where that can't work."""
    if name not in QUANTIZATIONS:
        raise UserError(unknown_name("quantization", name, QUANTIZATIONS))
    if not torch.cuda.is_available():
        raise UserError(
            f"{name} loading needs a CUDA GPU, and none is here: load in bfloat16 (--dtype bfloat16) instead"
        )
    try:
        import bitsandbytes  # noqa: F401  # only whether it is there
    except ImportError as error:
        raise UserError(
            f"{name} loading needs bitsandbytes: `pip install bitsandbytes`, or load in bfloat16"
        ) from error
    return BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(KEPT_PRECISE),
    )


def _audit_of(source: Source, info: Mapping[str, Any]) -> AuditReport:
    """transformers' loading report as ours. Raises UserError for anything missing or of another size."""
    report = AuditReport(source=str(source.path))
    for key in info["missing_keys"]:
        report.add("missing", part_of(key), key)
    for key in info["unexpected_keys"]:
        report.add("unexpected", part_of(key), key)
    for key, found, expected in info["mismatched_keys"]:
        report.add("wrong_shape", part_of(key), f"{key}: found {tuple(found)}, expected {tuple(expected)}")
    missing = set(info["missing_keys"])
    for key in source.entries:
        if key not in missing:
            report.add("loaded", part_of(key), key)
    report.raise_for_problems()
    return report
