"""Which configuration weights are built with, decided from what the files tell and what the user says.

Weakest first: published defaults, what shapes and keys tell, the folder's own config.json and meta.json, the user's
settings. Where the user contradicts what the weights settle, that is an error with its own sentence.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig

from stllm.common.errors import UserError
from stllm.common.registry import templates
from stllm.models.checkpoints import contradictions
from stllm.models.checkpoints.formats import Format, Source, open_source
from stllm.models.checkpoints.sizes import BACKBONE, Fields, sizes_from_weights, with_head_counts
from stllm.models.configuration import CONFIG_ERRORS, VISION_DEFAULTS, STLLMConfig, reason
from stllm.models.factory import piece_paths, settings_to_fields

log = logging.getLogger(__name__)

EVA_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
LN_VISION = "vision_encoder.ln_vision.weight"
ADAPTER_SIZES = ("adapter_depth", "max_frames")
NESTED = ("vision_config", "qformer_config", "mask_rate")  # merged key by key
NOT_THE_MODELS = (
    "architectures",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "quantization_config",  # a quantized language model is dequantized when it is read
)
RESIDUAL_INDEX = "model.stllm_model.residual_index"  # (R,): not a weight of ours, but its length tells R


def open_pieces(paths: Sequence[str | Path], settings: Mapping[str, Any]) -> list[Source]:
    """Opens weight files and folders in that order. Raises UserError."""
    depth = (settings.get("vision") or {}).get("depth")
    return [open_source(path, depth=depth) for path in paths]


def open_named(settings: Mapping[str, Any], *further: str | Path) -> list[Source]:
    """Opens the pieces that the settings name, then the further ones.

    The published encoder need not be named where the published code has left it, in torch's cache. Raises UserError.
    """
    sources = open_pieces([*piece_paths(settings), *further], settings)
    shapes = merged_shapes(sources)
    if shapes.get(LN_VISION) == (VISION_DEFAULTS["embed_dim"],) and f"{BACKBONE}pos_embed" not in shapes:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(EVA_URL).name
        if not cached.is_file():
            raise UserError(
                f"the vision encoder's weights are not named: set model.vit_ckpt to {cached.name}, or to {EVA_URL} to "
                "download it once"
            )
        log.info("model.vit_ckpt is not set: the vision encoder is the published one, %s", cached)
        return [*open_pieces([cached], settings), *sources]
    return sources


def open_checkpoint(path: str | Path, settings: Mapping[str, Any]) -> list[Source]:
    """Opens a checkpoint to be used; where it is only a part, the pieces that the settings name come before it."""
    source = open_pieces([path], settings)[0]
    return [source] if source.is_whole_model else open_named(settings, path)


def decide_config(sources: Sequence[Source], settings: Mapping[str, Any], *, default_llm: bool = False) -> STLLMConfig:
    """The configuration for these weights (later sources over earlier ones) and settings.

    default_llm: without any word about the language model, take the published 7B shape instead of refusing.
    Raises UserError for what nothing settles, and for contradictions.
    """
    name = names_of(sources) or "the configuration"
    shapes = merged_shapes(sources)
    said = settings_to_fields(settings)
    asked_llm = said.pop("text_config", None)
    told = sizes_from_weights(shapes)
    for source in sources:
        told = merge_fields(told, _own_fields(source))
    contradictions.check_language_models(sources, settings, asked_llm)
    contradictions.check_sizes(name, told, said)
    fields = with_head_counts(merge_fields(told, said), name)
    if "text_config" not in fields:
        if asked_llm is None and not default_llm:
            raise UserError(
                f"{name}: no language model is named: set model.llama_model to its folder or hub name, model.ckpt to a "
                "whole checkpoint, or model.llm to its sizes"
            )
        fields["text_config"] = asked_llm or {"model_type": "llama"}
    takes_text = fields.get("qformer_text_input", True) and fields.get("has_qformer", True)
    fields.setdefault("template", "instructblip" if takes_text else "minigpt4")
    fields["text_config"] = _with_pad_token(fields, sources, named=asked_llm is not None)
    try:
        config = STLLMConfig(**fields)
    except CONFIG_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: its configuration can't be used ({reason(error)}): correct it") from error
    contradictions.check_family(name, shapes, config, any(source.is_whole_model for source in sources))
    return config


def merge_fields(below: Fields, above: Fields) -> Fields:
    """`above` over `below`; the nested groups are merged key by key."""
    merged = {**below, **above}
    for group in NESTED:
        if below.get(group) and above.get(group):
            merged[group] = {**below[group], **above[group]}
    return merged


def merged_shapes(sources: Sequence[Source]) -> dict[str, tuple[int, ...]]:
    """Our keys and their shapes over all sources, later ones over earlier ones."""
    return {key: entry.shape for source in sources for key, entry in source.entries.items()}


def names_of(sources: Sequence[Source]) -> str:
    """The sources' paths, for messages."""
    return " + ".join(str(source.path) for source in sources)


def assumptions(sources: Sequence[Source], settings: Mapping[str, Any], config: STLLMConfig) -> list[str]:
    """What neither weights nor settings told, so that a published default was taken."""
    if not sources or any(source.format is Format.STLLM for source in sources):
        return []
    told: Fields = {}
    for source in sources:
        told = merge_fields(told, _own_fields(source))
    told = merge_fields(merge_fields(sizes_from_weights(merged_shapes(sources)), told), settings_to_fields(settings))
    values = {"video_input": config.video_input, "max_txt_len": config.max_txt_len, "end_sym": config.end_sym}
    if config.video_input == "residual":
        values["residual_size"] = config.residual_size
    return [f"{key} = {value!r} (the weights don't tell)" for key, value in values.items() if key not in told]


def _own_fields(source: Source) -> Fields:
    """What a source's own config.json and meta.json say, as fields of `STLLMConfig`."""
    if source.format is Format.STLLM:
        known = inspect.signature(STLLMConfig.__init__).parameters
        own = {key: value for key, value in source.config.items() if key in known and key not in ("self", "kwargs")}
        vision = own.get("vision_config") or {}
        plain = VISION_DEFAULTS["encoder"]
        if vision.get("encoder", plain) == plain:  # it has no adapter, so its adapter sizes settle nothing
            own["vision_config"] = {key: value for key, value in vision.items() if key not in ADAPTER_SIZES}
        return own
    if source.format is Format.RELEASED:
        return _released_fields(source)
    if source.format is Format.TRANSFORMERS_BLIP:
        return _blip_fields(source)
    if source.format is Format.CAUSAL_LM:
        return {"text_config": _text_config(source.config)}
    return {}


def _released_fields(source: Source) -> Fields:
    fields: Fields = {}
    if source.config:
        fields["text_config"] = _text_config(source.config)
    if RESIDUAL_INDEX in source.weights.specs:
        fields["residual_size"] = source.weights.specs[RESIDUAL_INDEX].shape[0]
    sizes = source.meta.get("sizes") or {}
    vision = {("image_size" if key == "img_size" else key): value for key, value in (sizes.get("vision") or {}).items()}
    qformer = {
        key: value for key, value in (sizes.get("qformer") or {}).items() if key != "bert_vocab" and value is not None
    }
    if vision:
        fields["vision_config"] = {key: value for key, value in vision.items() if key in VISION_DEFAULTS}
    if qformer:
        fields["qformer_config"] = qformer
    if sizes.get("bottleneck"):
        fields["residual_bottleneck"] = sizes["bottleneck"]
    return merge_fields(fields, settings_to_fields(source.meta.get("config") or {}))


def _blip_fields(source: Source) -> Fields:
    vision, qformer = source.config.get("vision_config") or {}, source.config.get("qformer_config") or {}
    # transformers leaves out what equals its own defaults
    heads = {"num_heads": vision.get("num_attention_heads", 16), "ln_eps": vision.get("layer_norm_eps", 1e-6)}
    fields: Fields = {
        "vision_config": heads,
        "qformer_config": {"num_attention_heads": qformer.get("num_attention_heads", 12)},
    }
    if "cross_attention_frequency" in qformer:
        fields["qformer_config"]["cross_attention_frequency"] = qformer["cross_attention_frequency"]
    if source.is_whole_model:
        fields["text_config"] = _text_config(source.config.get("text_config") or {})
    return fields


def _text_config(config: Mapping[str, Any]) -> Fields:
    kind = config.get("model_type")
    kept = {key: value for key, value in config.items() if key not in NOT_THE_MODELS}
    return {**kept, "model_type": "llama" if kind in (None, "st_llm_hf") else kind}


def _with_pad_token(fields: Fields, sources: Sequence[Source], *, named: bool) -> Fields:
    """The language model's configuration with room for the `[PAD]` that the InstructBLIP family adds."""
    text = dict(fields["text_config"])
    if not templates.get(fields["template"]).bos_is_eos:
        return text
    if not sources and not named:  # the published Vicuna, nothing on disk
        return {**text, "vocab_size": text.get("vocab_size", 32000) + 1}
    owners = [source for source in sources if "text_config" in _own_fields(source)]
    if owners and owners[-1].format in (Format.CAUSAL_LM, Format.TRANSFORMERS_BLIP):
        contained = int(text.get("vocab_size", 32000))
        text["vocab_size"] = max(contained, family_tokens(owners[-1].path, adds_pad=True) or contained + 1)
    return text


def family_tokens(folder: Path, *, adds_pad: bool, config: PretrainedConfig | None = None) -> int | None:
    """The folder's tokenizer's count, `[PAD]` included where the family adds it; None when there is no tokenizer.

    config: of the language model, where the folder's own config.json does not name a known one.
    """
    if not folder.is_dir() or not any(folder.glob("tokenizer*")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError):
        return None
    return len(tokenizer) + int(adds_pad and "[PAD]" not in tokenizer.get_vocab())
