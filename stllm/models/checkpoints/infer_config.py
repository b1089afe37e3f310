"""Infers a model's configuration from its files and the settings. Only the headers of weight files are read.

Each of these sources overrides those before it: the published defaults, the shapes and keys of the weights, config.json
and meta.json beside the weights, and the user's settings. If two sources contradict each other, an error says what was
found, what was expected and what to do. The audit (audit.py) reports weights that are missing or have another shape.
All keys in this file are our names, not those of the format.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig

from stllm.common.errors import UserError, reason
from stllm.common.registry import templates
from stllm.models.checkpoints.formats import Format, Source, locate, open_source, read_json
from stllm.models.configuration import CONFIG_ERRORS, QFORMER_DEFAULTS, VISION_DEFAULTS, STLLMConfig
from stllm.models.settings import PUBLISHED, Fields, explicit_settings, piece_paths, settings_to_fields

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

EVA_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
BACKBONE, ADAPTER, BERT = "vision_encoder.backbone.", "vision_encoder.adapter.", "qformer.bert."
LN_VISION = "vision_encoder.ln_vision.weight"
TEXT_KEY = f"{BERT}embeddings.word_embeddings.weight"
LAYERS = f"{BERT}encoder.layer."
CROSS_ATTENTION = re.compile(rf"{re.escape(LAYERS)}(\d+)\.crossattention")
RESIDUAL_INDEX = "model.stllm_model.residual_index"  # (R,): not used, but its length is `residual_size`
NESTED = ("vision_config", "qformer_config", "mask_rate")  # fields that are merged key by key
# field group, size, our key, axis. The first key that exists determines a size: embed_dim is also known from ln_vision,
# which a Q-Former's file holds.
SIZES = (
    ("vision_config", "embed_dim", f"{BACKBONE}patch_embed.proj.weight", 0),
    ("vision_config", "embed_dim", LN_VISION, 0),
    ("vision_config", "patch_size", f"{BACKBONE}patch_embed.proj.weight", 2),
    ("vision_config", "max_frames", f"{ADAPTER}time_embed.weight", 0),
    ("qformer_config", "hidden_size", f"{LAYERS}0.attention.attention.query.weight", 0),
    ("qformer_config", "intermediate_size", f"{LAYERS}0.intermediate_query.dense.weight", 0),
    ("qformer_config", "encoder_hidden_size", f"{LAYERS}0.crossattention.attention.key.weight", 1),
    ("qformer_config", "vocab_size", TEXT_KEY, 0),
    ("qformer_config", "max_position_embeddings", f"{BERT}embeddings.position_embeddings.weight", 0),
    ("", "num_query_tokens", "qformer.query_tokens", 1),
    ("", "residual_bottleneck", "video_input.down_proj.weight", 0),
)
# field group, number of layers, prefix of a layer's number
DEPTHS = (
    ("vision_config", "depth", f"{BACKBONE}blocks."),
    ("vision_config", "adapter_depth", f"{ADAPTER}spatial."),
    ("qformer_config", "num_hidden_layers", LAYERS),
)
# field group, width, number of heads, default width, width of one head as published (EVA-ViT-g: 1408 / 16), part
HEADS = (
    ("vision_config", "embed_dim", "num_heads", VISION_DEFAULTS["embed_dim"], 88, "vision encoder"),
    ("qformer_config", "hidden_size", "num_attention_heads", QFORMER_DEFAULTS["hidden_size"], 64, "Q-Former"),
)
# sizes in which settings and weights must agree; image_size is not among them: position embeddings are interpolated
COMPARED = (
    *((group, name) for group, name, *_ in (*SIZES, *DEPTHS)),
    ("qformer_config", "cross_attention_frequency"),
    ("", "has_qformer"),
)
GROUP_KEYS = {"vision_config": "vision.", "qformer_config": "qformer.", "": ""}  # prefixes of the keys in a YAML
LLM_SIZES = {4096: " (7B)", 5120: " (13B)"}
FAMILIES = {True: "InstructBLIP", False: "MiniGPT-4"}  # the Q-Former reads text -> family
NOT_THE_MODELS = (
    *("architectures", "_name_or_path", "torch_dtype", "dtype", "transformers_version"),
    "quantization_config",  # a quantized language model is dequantized when it is read
)


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose weights are not read yet: its sources, the user's settings, and the inferred configuration.

    path: the last of the paths that were opened.
    """

    path: Path
    sources: list[Source]
    settings: Mapping[str, Any]
    config: STLLMConfig


def open_model(
    paths: str | Path | Sequence[str | Path], cfg_path: str | Path | None = None, *, options: Sequence[str] = ()
) -> Opened:
    """Open a checkpoint, or files that together make one, and infer its configuration. Raises UserError."""
    settings = explicit_settings(cfg_path, options)
    places = [locate(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    sources = open_sources(settings, *places)
    return Opened(places[-1], sources, settings, decide_config(sources, settings))


def open_sources(settings: Mapping[str, Any], *paths: str | Path) -> list[Source]:
    """Open weights. If none of them is a whole model, the files named in the settings are opened as well, before them.

    The vision encoder need not be named if torch's cache holds the published one. Raises UserError.
    """
    depth = (settings.get("vision") or {}).get("depth")
    sources = [open_source(path, depth=depth) for path in paths]
    if any(source.is_whole_model for source in sources):
        return sources
    sources = [*(open_source(path, depth=depth) for path in piece_paths(settings)), *sources]
    shapes = merged_shapes(sources)
    if shapes.get(LN_VISION) == (VISION_DEFAULTS["embed_dim"],) and f"{BACKBONE}pos_embed" not in shapes:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(EVA_URL).name
        if not cached.is_file():
            raise UserError(
                f"the vision encoder's weights are not named: set model.vit_ckpt to {cached.name}, or to {EVA_URL} to "
                "download it once"
            )
        log.info("model.vit_ckpt is not set: the vision encoder is the published one, %s", cached)
        sources.insert(0, open_source(cached, depth=depth))
    return sources


def decide_config(sources: Sequence[Source], settings: Mapping[str, Any], *, default_llm: bool = False) -> STLLMConfig:
    """Infer the configuration for these weights (later sources override earlier ones) and settings.

    default_llm: if no language model is named, assume the published 7B sizes instead of raising an error.
    Raises UserError if a field cannot be determined, and for contradictions.
    """
    name = names_of(sources) or "the configuration"
    asked = settings_to_fields(settings)
    asked_llm = asked.pop("text_config", None)
    inferred = _inferred(sources)
    check_language_models(sources, settings, asked_llm)
    for group, key in COMPARED:
        theirs, ours = (inferred.get(group) or {}, asked.get(group) or {}) if group else (inferred, asked)
        if key in theirs and key in ours and theirs[key] != ours[key]:
            published = GROUP_KEYS[group] + PUBLISHED.get(key, key)
            raise UserError(
                f"{name}: model.{published} is {ours[key]} in the configuration, but {theirs[key]} in the weights: "
                "leave the setting out, or use other weights"
            )
    if inferred.get("lora") and "lora" in asked and not asked["lora"]:
        raise UserError(
            f"{name} has LoRA weights (rank {inferred['lora']['r']}), but the configuration has none: set "
            "model.lora_r, or merge them first with `stllm convert --merge-lora`"
        )
    fields = with_head_counts(merge_fields(inferred, asked), name)
    if "text_config" not in fields:
        if asked_llm is None and not default_llm:
            raise UserError(
                f"{name}: no language model is named: set model.llama_model to its folder or hub name, model.ckpt to a "
                "whole checkpoint, or model.llm to its sizes"
            )
        fields["text_config"] = asked_llm or {"model_type": "llama"}
    takes_text = fields.get("qformer_text_input", True) and fields.get("has_qformer", True)
    fields.setdefault("template", "instructblip" if takes_text else "minigpt4")
    if templates.get(fields["template"]).bos_is_eos:  # the InstructBLIP family adds [PAD] to the vocabulary
        text = fields["text_config"] = dict(fields["text_config"])
        owners = [source for source in sources if "text_config" in _own_fields(source)]
        if not sources and asked_llm is None:  # the published Vicuna's sizes, without a file
            text["vocab_size"] = text.get("vocab_size", 32000) + 1
        elif owners and owners[-1].format in (Format.CAUSAL_LM, Format.TRANSFORMERS_BLIP):
            contained = int(text.get("vocab_size", 32000))
            text["vocab_size"] = max(contained, family_tokens(owners[-1].path, adds_pad=True) or contained + 1)
    try:
        config = STLLMConfig(**fields)
    except CONFIG_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: its configuration can't be used ({reason(error)}): correct it") from error
    check_family(name, merged_shapes(sources), config, whole=any(source.is_whole_model for source in sources))
    return config


def merge_fields(below: Fields, above: Fields) -> Fields:
    """Return the fields of `below`, overridden by those of `above`. The groups in `NESTED` are merged key by key."""
    merged = {**below, **above}
    for group in NESTED:
        if below.get(group) and above.get(group):
            merged[group] = {**below[group], **above[group]}
    return merged


def merged_shapes(sources: Sequence[Source]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of our keys in all sources. Later sources override earlier ones."""
    return {key: entry.shape for source in sources for key, entry in source.entries.items()}


def names_of(sources: Sequence[Source]) -> str:
    """Return the sources' paths as one text for error messages."""
    return " + ".join(str(source.path) for source in sources)


def assumptions(sources: Sequence[Source], settings: Mapping[str, Any], config: STLLMConfig) -> list[str]:
    """List the published defaults that were assumed because neither weights nor settings determine the value."""
    if not sources or any(source.format is Format.STLLM for source in sources):
        return []
    known = merge_fields(_inferred(sources), settings_to_fields(settings))
    values = {"video_input": config.video_input, "max_txt_len": config.max_txt_len, "end_sym": config.end_sym}
    if config.video_input == "residual":
        values["residual_size"] = config.residual_size
    return [f"{key} = {value!r} (the weights don't tell)" for key, value in values.items() if key not in known]


def _inferred(sources: Sequence[Source]) -> Fields:
    fields = sizes_from_weights(merged_shapes(sources))
    for source in sources:
        fields = merge_fields(fields, _own_fields(source))
    return fields


def _own_fields(source: Source) -> Fields:
    """Return the fields of `STLLMConfig` that a source's config.json and meta.json determine."""
    config, fields = source.config, Fields()
    if source.format is Format.STLLM:
        fields = {key: value for key, value in config.items() if key in STLLMConfig.__annotations__}
        vision = fields.get("vision_config") or {}
        if vision.get("encoder", VISION_DEFAULTS["encoder"]) == VISION_DEFAULTS["encoder"]:
            # without an adapter, the saved adapter sizes are only defaults
            absent = ("adapter_depth", "max_frames")
            fields["vision_config"] = {key: value for key, value in vision.items() if key not in absent}
    elif source.format is Format.RELEASED:
        sizes = source.meta.get("sizes") or {}
        vision = {key.replace("img_size", "image_size"): value for key, value in (sizes.get("vision") or {}).items()}
        settings = {
            "vision": {key: value for key, value in vision.items() if key in VISION_DEFAULTS},
            "qformer": {key: value for key, value in (sizes.get("qformer") or {}).items() if key != "bert_vocab"},
            "residual_bottleneck": sizes.get("bottleneck") or None,
            **(source.meta.get("config") or {}),
        }
        if config:
            fields["text_config"] = _text_config(config)
        if RESIDUAL_INDEX in source.weights.specs:
            fields["residual_size"] = source.weights.specs[RESIDUAL_INDEX].shape[0]
        fields |= settings_to_fields(settings)
    elif source.format is Format.TRANSFORMERS_BLIP:
        vision, qformer = config.get("vision_config") or {}, config.get("qformer_config") or {}
        # transformers does not save values that equal its defaults
        heads = {"num_heads": vision.get("num_attention_heads", 16), "ln_eps": vision.get("layer_norm_eps", 1e-6)}
        every = {key: qformer[key] for key in ("cross_attention_frequency",) if key in qformer}
        own_qformer = {"num_attention_heads": qformer.get("num_attention_heads", 12), **every}
        fields = {"vision_config": heads, "qformer_config": own_qformer}
        if source.is_whole_model:
            fields["text_config"] = _text_config(config.get("text_config") or {})
    elif source.format is Format.CAUSAL_LM:
        fields["text_config"] = _text_config(config)
    return fields


def _text_config(config: Mapping[str, Any]) -> Fields:
    kind = config.get("model_type")
    kept = {key: value for key, value in config.items() if key not in NOT_THE_MODELS}
    return {**kept, "model_type": "llama" if kind in (None, "st_llm_hf") else kind}


def sizes_from_weights(shapes: Shapes) -> Fields:
    """Infer fields of `STLLMConfig` from weights: sizes from shapes, and the parts of the model from keys."""
    fields: Fields = {"vision_config": {}, "qformer_config": {}}
    for group, name, key, axis in SIZES:
        if key in shapes:
            (fields[group] if group else fields).setdefault(name, shapes[key][axis])
    for group, name, prefix in DEPTHS:
        if numbers := {int(key[len(prefix) :].split(".")[0]) for key in shapes if key.startswith(prefix)}:
            fields[group][name] = max(numbers) + 1
    vision, qformer = fields["vision_config"], fields["qformer_config"]
    if "patch_size" in vision:
        vision["encoder"] = "eva_clip_g"
        if f"{BACKBONE}pos_embed" in shapes:
            vision["image_size"] = math.isqrt(shapes[f"{BACKBONE}pos_embed"][1] - 1) * vision["patch_size"]
        if f"{BACKBONE}blocks.0.mlp.fc1.weight" in shapes:
            hidden, width = shapes[f"{BACKBONE}blocks.0.mlp.fc1.weight"]
            usual = float(VISION_DEFAULTS["mlp_ratio"])
            # many ratios give this width, because int() cuts off the product
            vision["mlp_ratio"] = usual if int(width * usual) == hidden else (hidden + 0.5) / width
    if f"{ADAPTER}class_token" in shapes:
        vision["encoder"] = "eva_btadapter_g"
    if any(key.startswith(BERT) for key in shapes):
        fields |= {"has_qformer": True, "qformer_text_input": TEXT_KEY in shapes}
        crossing = sorted({int(match[1]) for key in shapes if (match := CROSS_ATTENTION.match(key))})
        if crossing:
            every = crossing[1] - crossing[0] if len(crossing) > 1 else max(qformer["num_hidden_layers"], 1)
            qformer["cross_attention_frequency"] = every
    elif "patch_size" in vision and shapes.get("projection.weight", (0, 0))[1] == 4 * vision["embed_dim"]:
        # a projection of four merged patches: a model without a Q-Former
        fields |= {"has_qformer": False, "qformer_text_input": False}
    if "residual_bottleneck" in fields:
        fields["video_input"] = "residual"
    if "mvm_decoder.head.weight" in shapes:
        fields["mvm_decode"] = True
    return {name: value for name, value in fields.items() if value != {}}


def with_head_counts(fields: Fields, source: str) -> Fields:
    """Add missing numbers of attention heads, which are known for published widths only.

    source: the weights' name in error messages. Raises UserError for any other width, and if heads do not divide the
    width.
    """
    filled = dict(fields)
    for group, width_key, heads_key, default_width, head_width, part in HEADS:
        published = GROUP_KEYS[group] + heads_key
        sizes = filled[group] = dict(fields.get(group) or {})
        if heads_key not in sizes and (part == "vision encoder" or fields.get("has_qformer", True)):
            width = sizes.get(width_key, default_width)
            if width % head_width:
                raise UserError(
                    f"{source}: the weights don't tell how many attention heads the {part} has (its width {width} is "
                    f"not a published one): name it in --cfg-path or with --options model.{published}=..."
                )
            sizes[heads_key] = width // head_width
        if width_key in sizes and heads_key in sizes and sizes[width_key] % sizes[heads_key]:
            width, heads = sizes[width_key], sizes[heads_key]
            raise UserError(
                f"model.{published} is {heads}, which does not divide the width {width}: name another number"
            )
    return filled


def check_language_models(sources: Sequence[Source], settings: Mapping[str, Any], asked: Fields | None) -> None:
    """Raise UserError if weights, config.json, `llama_model` and `llm` disagree on the language model's size."""
    facts: list[tuple[str, Any]] = []
    for source in sources:
        text = source.config.get("text_config") or source.config
        if "word_embed_proj_dim" not in text:  # OPT's embeddings may be narrower than the model
            for key, entry in source.entries.items():
                if key.startswith("language_model.") and key.endswith((".embed_tokens.weight", ".wte.weight")):
                    facts.append((f"the weights in {source.path}", entry.shape[1]))
                    break
        projection = None if "projection" in (settings.get("fresh") or ()) else source.entries.get("projection.weight")
        facts.append((f"the projection in {source.path}", projection and projection.shape[0]))
        if source.is_whole_model or source.format is Format.CAUSAL_LM:
            facts.append((f"{source.path}/config.json", text.get("hidden_size")))
    named = settings.get("llama_model")
    beside = read_json(Path(named) / "config.json") if named and Path(named).is_dir() else {}
    facts.append((f"model.llama_model ({named})", beside.get("hidden_size")))
    facts.append(("model.llm", (asked or {}).get("hidden_size")))
    known = [(words, size) for words, size in facts if size is not None]
    for words, size in known[1:]:
        reference, expected = known[0]
        if size != expected:
            advice = "use weights and configuration of the same size"
            if "projection" in reference + words:
                advice += "; or train a new projection: model.fresh=[projection]"
            raise UserError(
                f"the language model has hidden size {expected}{LLM_SIZES.get(expected, '')} by {reference}, but "
                f"{size}{LLM_SIZES.get(size, '')} by {words}: {advice}"
            )
    whole = next((source for source in reversed(sources) if source.is_whole_model), None)
    if whole is not None:  # its own language model is the one that is used
        own = whole.config.get("text_config") or whole.config
        for key in ("num_hidden_layers", "intermediate_size"):
            if own.get(key) is not None and beside.get(key) is not None and own[key] != beside[key]:
                raise UserError(
                    f"model.llama_model ({named}) has {key} {beside[key]}, but the whole checkpoint {whole.path} "
                    f"{own[key]}, and its own language model is the one that is used: set model.llama_model=null, or "
                    "name a checkpoint of that size"
                )


def check_family(name: str, shapes: Shapes, config: STLLMConfig, *, whole: bool) -> None:
    """Raise UserError if weights and configuration are of different families, InstructBLIP and MiniGPT-4.

    The family is recognised by whether the Q-Former reads text. whole: the weights include a whole model.
    """
    has_qformer = any(key.startswith(f"{BERT}encoder.") for key in shapes)
    reads, asked = TEXT_KEY in shapes, config.qformer_text_input
    if has_qformer and config.has_qformer and reads != asked and (asked or whole):
        raise UserError(
            f"{name} is of the {FAMILIES[reads]} family (its Q-Former {'has' if reads else 'has no'} text embeddings), "
            f"but the configuration {'takes' if asked else 'takes no'} text (the {FAMILIES[asked]} family): set "
            f"model.qformer_text_input={reads}, or use {FAMILIES[asked]} weights"
        )


def check_adapter(name: str, sources: Sequence[Source], *, needed: bool, may_be_fresh: bool) -> None:
    """Raise UserError if only one of weights and configuration has the temporal adapter, which QA models have.

    needed: the configuration has an adapter. may_be_fresh: the adapter may be initialized instead of loaded.
    """
    keys = [key for source in sources for key in source.entries]
    saved = any(key.startswith(ADAPTER) for key in keys)
    if saved and not needed:
        raise UserError(
            f"{name} is a QA checkpoint (it has the temporal adapter), but the configuration is for conversation "
            "(model.vit_model: eva_clip_g, without one): set model.vit_model=eva_btadapter_g, or use conversation "
            "weights"
        )
    if needed and not saved and not may_be_fresh and any(key.startswith(BACKBONE) for key in keys):
        raise UserError(
            f"{name} is a conversation checkpoint (it has no temporal adapter), but the configuration is for QA "
            "(model.vit_model: eva_btadapter_g): set model.vit_model=eva_clip_g, or use QA weights"
        )


def check_vocabulary(name: str, rows: int | None, config: STLLMConfig, tokens: int | None) -> None:
    """Raise UserError if the size of the vocabulary is not that of the family (32000, or 32001 with `[PAD]`).

    rows: the number of token embeddings in the weights. tokens: the size of the tokenizer beside the weights, with the
    `[PAD]` that the family adds. None: unknown.
    """
    adds_pad = config.adds_pad
    expected = config.text_config.vocab_size
    found = expected if rows is None else rows
    # more embeddings than tokens are fine (padding), but exactly one more means InstructBLIP's vocabulary
    if tokens is not None and (found < tokens or (not adds_pad and found == tokens + 1)):
        expected = tokens
    if found == expected:
        return
    guesses = {
        (-1, True): " (as many as in the MiniGPT-4 family and in a plain language model)",
        (1, False): " (as many as in the InstructBLIP family)",
    }
    guess = guesses.get((found - expected, adds_pad), "")
    raise UserError(
        f"{name} has a vocabulary of {found} tokens{guess}, but its configuration and tokenizer, of the "
        f"{FAMILIES[adds_pad]} family, expect {expected} ({'with the' if adds_pad else 'without an'} added [PAD]): use "
        "weights, tokenizer and configuration of one family"
    )


def family_tokens(folder: Path, *, adds_pad: bool, config: PretrainedConfig | None = None) -> int | None:
    """Return the size of the tokenizer in a folder, or None if there is none.

    adds_pad: add one for `[PAD]` if the tokenizer lacks it. config: the language model's configuration, needed if
    config.json in the folder is not that of a language model.
    """
    if not folder.is_dir() or not any(folder.glob("tokenizer*")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError):
        return None
    return len(tokenizer) + int(adds_pad and "[PAD]" not in tokenizer.get_vocab())
