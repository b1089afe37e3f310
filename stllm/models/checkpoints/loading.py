"""From a checkpoint of any known format to a model and its prompts, audited.

    model, processor = load_pretrained("path/to/checkpoint")

Without a device map or quantisation every format is streamed (assembly.py), ours included: one audited way, bounded
memory. With one, transformers' `from_pretrained` puts the weights where they belong (placing.py).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.models.checkpoints import contradictions
from stllm.models.checkpoints.assembly import assemble
from stllm.models.checkpoints.audit import AuditReport
from stllm.models.checkpoints.deciding import decide_config, open_checkpoint
from stllm.models.checkpoints.formats import Format, Source, locate
from stllm.models.checkpoints.placing import place
from stllm.models.configuration import STLLMConfig
from stllm.models.factory import explicit_settings
from stllm.models.st_llm import STLLM
from stllm.processors.prompts import PromptProcessor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was looked into, nothing read: sources, the user's settings, the configuration decided on."""

    path: Path
    sources: list[Source]
    settings: Mapping[str, Any]
    config: STLLMConfig


def open_model(path: str | Path, cfg_path: str | Path | None = None, *, options: Sequence[str] = ()) -> Opened:
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
    contradictions.check_vocabulary(str(opened.path), None, opened.config, processor.vocab_size)
    return processor


def tokenizer_folder(sources: Sequence[Source], settings: Mapping[str, Any]) -> Path | None:
    """The folder whose tokenizer goes with the language model: that of the last source that has one."""
    for source in reversed(sources):
        if source.path.is_dir() and any(source.path.glob("tokenizer*")):
            return source.path
    named = settings.get("llama_model")
    return locate(named) if named else None


def load_opened(
    opened: Opened,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    device_map: Any = None,
) -> tuple[STLLM, AuditReport]:
    """The model of an opened checkpoint, and the audit."""
    if quantization is None and opened.settings.get("low_resource"):
        quantization = "8bit"
    last = opened.sources[-1]
    stored = last.config.get("quantization_config") if last.format is Format.STLLM else None
    if quantization is None and device_map is None and stored is None:
        model, report = assemble(opened.config, opened.sources, device=device, dtype=dtype)
    else:
        model, report = place(
            opened.config,
            opened.sources,
            device=device,
            dtype=dtype,
            quantization=quantization,
            device_map=device_map,
        )
    for line in report.details():
        log.debug(line)
    if unexpected := report.keys("unexpected"):
        log.info(
            "%s: %d weights are not used, among them %s", report.source, len(unexpected), ", ".join(unexpected[:3])
        )
    return model, report


def _tokenizer_in_meta(sources: Sequence[Source]) -> str | None:
    """The Q-Former's vocabulary that a released folder's meta.json names, relative to the folder's parent."""
    for source in reversed(sources):
        named = ((source.meta.get("sizes") or {}).get("qformer") or {}).get("bert_vocab")
        if named and (source.path.absolute().parent / named).exists():
            return str(source.path.absolute().parent / named)
    return None
