"""From a checkpoint of any known format to a model and its prompts, audited.

    model, processor = load_pretrained("path/to/checkpoint")

Without a device map or quantisation every format is streamed (assembly.py), ours included: one audited way, bounded memory.
With one, transformers' `from_pretrained` places the weights, and its own report is audited.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from stllm.common.device import resolve_device, resolve_dtype
from stllm.common.errors import UserError, unknown_name
from stllm.models.checkpoints.assembly import Plan, assemble, make_plan, meta_model
from stllm.models.checkpoints.audit import AuditReport
from stllm.models.checkpoints.deciding import decide_config, open_checkpoint
from stllm.models.checkpoints.formats import Format, Source, locate
from stllm.models.configuration import STLLMConfig
from stllm.models.factory import explicit_settings
from stllm.models.st_llm import STLLM
from stllm.processors.prompts import PromptProcessor

log = logging.getLogger(__name__)

QUANTIZATIONS = ("8bit", "4bit")
KEPT_PRECISE = ("vision_encoder", "qformer", "projection", "video_input", "mvm_decoder", "lm_head", "embed_out")


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was looked into, nothing read: its sources, the user's settings, the configuration decided on."""

    path: Path
    sources: list[Source]
    settings: Mapping[str, Any]
    config: STLLMConfig


def open_model(
    path: str | Path, cfg_path: str | Path | None = None, *, options: Sequence[str] = ()
) -> Opened:
    """Looks into a checkpoint and decides its configuration. Raises UserError."""
    settings = explicit_settings(cfg_path, options)
    place = locate(path)
    sources = open_checkpoint(place, settings)
    return Opened(place, sources, settings, decide_config(sources, settings))


def load_model(
    path: str | Path,
    cfg_path: str | Path | None = None,
    *,
    options: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    device_map: Any = None,
) -> STLLM:
    """The model of a checkpoint of any known format, in evaluation mode.

    path: a folder, a file, or a hub name. cfg_path, options: what the checkpoint itself does not say, or other choices.
    dtype: auto is what suits the device. quantization: 8bit or 4bit, of the language model (bitsandbytes, CUDA).
    device_map: accelerate's, e.g. "auto", to spread the model over several devices.
    Raises UserError for anything missing, damaged or contradictory.
    """
    opened = open_model(path, cfg_path, options=options)
    return load_opened(opened, device=device, dtype=dtype, quantization=quantization, device_map=device_map)[0]


def load_pretrained(
    path: str | Path,
    cfg_path: str | Path | None = None,
    *,
    options: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    device_map: Any = None,
) -> tuple[STLLM, PromptProcessor]:
    """The model and the processor that writes its prompts; arguments as for `load_model`."""
    opened = open_model(path, cfg_path, options=options)
    processor = processor_of(opened)  # first: a missing tokenizer should not cost the loading of 16 GiB
    model, _ = load_opened(opened, device=device, dtype=dtype, quantization=quantization, device_map=device_map)
    return model, processor


def load_processor(
    path: str | Path, cfg_path: str | Path | None = None, *, options: Sequence[str] = ()
) -> PromptProcessor:
    """The processor alone; arguments as for `load_model`."""
    return processor_of(open_model(path, cfg_path, options=options))


def processor_of(opened: Opened) -> PromptProcessor:
    """Tokenizers and template of an opened checkpoint. Raises UserError."""
    folder = tokenizer_folder(opened.sources, opened.settings)
    if folder is None:
        raise UserError(f"{opened.path} has no tokenizer: name the language model's folder with model.llama_model")
    named = opened.settings.get("qformer_tokenizer") or _tokenizer_in_meta(opened.sources)
    processor = PromptProcessor.from_pretrained(folder, config=opened.config, qformer_tokenizer=named)
    rows = opened.config.text_config.vocab_size
    if processor.vocab_size > rows:
        raise UserError(
            f"the tokenizer in {folder} has {processor.vocab_size} tokens (with those that the prompts add), but the "
            f"language model's vocabulary has {rows}: use the tokenizer that these weights were trained with"
        )
    return processor


def tokenizer_folder(sources: Sequence[Source], settings: Mapping[str, Any]) -> Path | None:
    """The folder whose tokenizer goes with the language model: that of the last source that has one."""
    for source in reversed(sources):
        if source.path.is_dir() and any(source.path.glob("tokenizer*")):
            return source.path
    named = settings.get("llama_model")
    return locate(named) if named else None


def load_opened(
    opened: Opened, *, device: str = "auto", dtype: str = "auto", quantization: str | None = None, device_map: Any = None
) -> tuple[STLLM, AuditReport]:
    """The model of an opened checkpoint, and the audit."""
    if quantization is None and opened.settings.get("low_resource"):
        quantization = "8bit"
    stored = opened.sources[-1].config.get("quantization_config") if opened.sources[-1].format is Format.STLLM else None
    if quantization is None and device_map is None and stored is None:
        model, report = assemble(opened.config, opened.sources, device=device, dtype=dtype)
    else:
        model, report = _place(opened, device, dtype, quantization, device_map)
    for line in report.details():
        log.debug(line)
    if unexpected := report.keys("unexpected"):
        log.info("%s: %d weights are not used, among them %s", report.source, len(unexpected), ", ".join(unexpected[:3]))
    return model, report


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """8bit or 4bit for the language model's linear layers. Raises UserError where that can't work."""
    if name not in QUANTIZATIONS:
        raise UserError(unknown_name("quantization", name, QUANTIZATIONS))
    if not torch.cuda.is_available():
        raise UserError(f"{name} loading needs a CUDA GPU, and none is here: load in bfloat16 instead (--dtype bfloat16)")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"{name} loading needs bitsandbytes: `pip install bitsandbytes`, or load in bfloat16") from error
    return BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(KEPT_PRECISE),
    )


def _place(
    opened: Opened, device: str, dtype: str, quantization: str | None, device_map: Any
) -> tuple[STLLM, AuditReport]:
    """Through transformers' `from_pretrained`, which quantises and spreads over devices."""
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    arguments: dict[str, Any] = {"dtype": kind, "device_map": device_map or {"": place}}
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, kind)
    source = opened.sources[-1]
    if len(opened.sources) == 1 and source.format is Format.STLLM:
        model, info = STLLM.from_pretrained(
            source.path, config=opened.config, output_loading_info=True, local_files_only=True, **arguments
        )
        return model.eval(), _audit_of(source, info)
    plan = make_plan(meta_model(opened.config, kind), opened.sources)
    plan.report.raise_for_problems()
    model = STLLM.from_pretrained(None, config=opened.config, state_dict=_state_dict(plan, opened.config, kind), **arguments)
    return model.eval(), plan.report


def _state_dict(plan: Plan, config: STLLMConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The planned weights in main memory: transformers takes them from there to where they belong."""
    from stllm.models.checkpoints.assembly import fill

    model = meta_model(config, dtype)
    fill(model, plan, torch.device("cpu"))
    return model.state_dict()


def _audit_of(source: Source, info: Mapping[str, Any]) -> AuditReport:
    from stllm.models.checkpoints.audit import part_of

    report = AuditReport(source=str(source.path))
    for key in info["missing_keys"]:
        report.add("missing", part_of(key), key)
    for key in info["unexpected_keys"]:
        report.add("unexpected", part_of(key), key)
    for key, found, expected in info["mismatched_keys"]:
        report.add("wrong_shape", part_of(key), f"{key}: found {tuple(found)}, expected {tuple(expected)}")
    missing = set(info["missing_keys"])
    for key in source.entries():
        if key not in missing:
            report.add("loaded", part_of(key), key)
    report.raise_for_problems()
    return report


def _tokenizer_in_meta(sources: Sequence[Source]) -> str | None:
    """The Q-Former's vocabulary that a released folder's meta.json names, relative to the folder's parent."""
    for source in reversed(sources):
        named = ((source.meta.get("sizes") or {}).get("qformer") or {}).get("bert_vocab")
        if named and (source.path.absolute().parent / named).exists():
            return str(source.path.absolute().parent / named)
    return None
