"""The known checkpoint formats: how to recognise them, and how their keys (the names of weights) map to ours.

Each format has a table of pairs (their prefix, our prefix), which is used in both directions. Our prefixes are
vision_encoder.{backbone,adapter,ln_vision}, qformer.{query_tokens,bert}, projection, video_input, mvm_decoder and
language_model. A key that the table does not cover is an error, so no weight is dropped silently. Source: the key lists
of the published checkpoints.

`open_source` returns a `Source`: the format, its table, the shapes, and the tensors on demand. A name such as
`org/name`, if there is no such file here, is downloaded from the hub. Only this and URLs use the network.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from stllm.common.errors import UserError, reason
from stllm.common.files import check_regular, user_path
from stllm.common.jsonl import loads
from stllm.models.checkpoints.weights import (
    WeightFiles,
    Weights,
    convert_language_model,
    dequantize,
    read_config,
    split_biases,
)
from stllm.models.configuration import CONFIG_ERRORS, language_model_config

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")
HUB_FILES = ("*.json", "*.model", "*.txt", "*.safetensors", "*.bin", "*.jinja", "qformer_tokenizer/*")
LANGUAGE_MODEL = "language_model."  # prefix of its keys, in our format and in transformers' InstructBLIP
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
SHARD = re.compile(r".+-\d{5}-of-(?P<total>\d{5})\.(?:bin|safetensors)$")
Pairs = tuple[tuple[str, str], ...]


class Format(Enum):
    """The known formats; the values are their names in messages."""

    STLLM = "stllm"
    RELEASED = "released ST-LLM"
    EVA = "EVA-ViT-g"
    INSTRUCTBLIP = "InstructBLIP (LAVIS)"
    BLIP2 = "BLIP-2 (LAVIS)"
    MINIGPT4 = "MiniGPT-4"
    TRANSFORMERS_BLIP = "InstructBLIP or BLIP-2 (transformers)"
    CAUSAL_LM = "causal language model"


class UnknownKeyError(KeyError):
    """A key that a `KeyTable` neither renames nor ignores."""


@dataclass(frozen=True)
class KeyTable:
    """Translates the keys of one format ("theirs") into ours, and back.

    prefixes: pairs (theirs, ours). The first prefix that fits is replaced, so longer prefixes come first.
    inner: their prefix -> pairs (theirs, ours) that are replaced anywhere in the rest of the key.
    ignored: patterns of keys that our model does not need, matched from the start of the key.
    """

    prefixes: Pairs
    inner: Mapping[str, Pairs] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def ignores(self, key: str) -> bool:
        """Check whether our model does not need a key of this format."""
        return any(re.match(pattern, key) for pattern in self.ignored)

    def ignoring(self, *patterns: str) -> "KeyTable":
        """Return a copy of this table that ignores keys of these patterns, too."""
        return replace(self, ignored=(*patterns, *self.ignored))

    def to_ours(self, key: str) -> str | None:
        """Return our key for a key of this format, or None if it is ignored. Raises UnknownKeyError."""
        if self.ignores(key):
            return None
        for theirs, ours in self.prefixes:
            if key.startswith(theirs):
                rest = key[len(theirs) :]
                for their_part, our_part in self.inner.get(theirs, ()):
                    rest = rest.replace(their_part, our_part)
                return ours + rest
        raise UnknownKeyError(key)

    def to_theirs(self, key: str) -> str:
        """Return this format's key for our key. Raises UnknownKeyError if the format has no place for it."""
        for theirs, ours in sorted(self.prefixes, key=lambda pair: -len(pair[1])):
            if key.startswith(ours):
                rest = key[len(ours) :]
                for their_part, our_part in self.inner.get(theirs, ()):
                    rest = rest.replace(our_part, their_part)
                return theirs + rest
        raise UnknownKeyError(key)


QFORMER_INNER: Pairs = (
    ("crossattention.self.", "crossattention.attention."),
    (".attention.self.", ".attention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
)
QFORMER_IGNORED = (r".*Qformer\.cls\.", r".*\.position_ids$")
OLD_BUFFERS = (r".*rotary_emb\.inv_freq$",)  # saved by old libraries


def _lavis_parts(prefix: str) -> Pairs:
    """Return (their prefix, our prefix) of each model part that all LAVIS-based checkpoints contain.

    prefix: the text before the part's name in their keys.
    """
    return (
        (f"{prefix}ln_vision.", "vision_encoder.ln_vision."),
        (f"{prefix}Qformer.bert.", "qformer.bert."),
        (f"{prefix}query_tokens", "qformer.query_tokens"),
    )


OURS = KeyTable(prefixes=(("", ""),))

RELEASED = KeyTable(
    prefixes=(
        ("model.stllm_model.visual_encoder.BTAdapter_cls", "vision_encoder.adapter.class_token"),
        ("model.stllm_model.visual_encoder.BTAdapter_position.", "vision_encoder.adapter.time_embed."),
        ("model.stllm_model.visual_encoder.BTAdapter_T.", "vision_encoder.adapter.temporal."),
        ("model.stllm_model.visual_encoder.BTAdapter_S.", "vision_encoder.adapter.spatial."),
        ("model.stllm_model.visual_encoder.", "vision_encoder.backbone."),
        *_lavis_parts("model.stllm_model."),
        ("model.stllm_model.llama_proj.", "projection."),
        ("model.stllm_model.down_proj.", "video_input.down_proj."),
        ("model.stllm_model.up_proj.", "video_input.up_proj."),
        ("model.stllm_model.mvm_decoder.", "mvm_decoder."),
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    inner={"model.stllm_model.Qformer.bert.": QFORMER_INNER},
    ignored=(
        *QFORMER_IGNORED,
        r"model\.stllm_model\.embed_tokens\.weight$",  # repeats model.embed_tokens.weight
        r"model\.stllm_model\.residual_index$",  # cached from the first clip; ours is computed from T
        *OLD_BUFFERS,
    ),
)

# `eva_vit_g.pth` has one block more than BLIP-2 uses; `open_source` adds that block to the ignored keys
EVA = KeyTable(
    prefixes=tuple(
        (key, f"vision_encoder.backbone.{key}") for key in ("cls_token", "pos_embed", "patch_embed.", "blocks.")
    ),
    ignored=(r"(?:norm|fc_norm|head)\.", r"mask_token$", r"rel_pos_bias\."),  # only used in pre-training
)


INSTRUCTBLIP_LAVIS = KeyTable(
    prefixes=(*_lavis_parts(""), ("llm_proj.", "projection."), ("visual_encoder.", "vision_encoder.backbone.")),
    inner={"Qformer.bert.": QFORMER_INNER},
    ignored=QFORMER_IGNORED,
)

BLIP2_LAVIS = KeyTable(
    prefixes=(*_lavis_parts(""), ("visual_encoder.", "vision_encoder.backbone.")),
    inner={"Qformer.bert.": QFORMER_INNER},
    # projections into other language models, and the heads of BLIP-2's first stage
    ignored=(*QFORMER_IGNORED, r"(?:t5|opt)_proj\.", r"(?:vision_proj|text_proj|itm_head)\.", r"temp$"),
)

MINIGPT4 = KeyTable(prefixes=(("llama_proj.", "projection."),))

TRANSFORMERS_BLIP = KeyTable(
    prefixes=(
        ("vision_model.embeddings.class_embedding", "vision_encoder.backbone.cls_token"),
        ("vision_model.embeddings.position_embedding", "vision_encoder.backbone.pos_embed"),
        ("vision_model.embeddings.patch_embedding.", "vision_encoder.backbone.patch_embed.proj."),
        ("vision_model.encoder.layers.", "vision_encoder.backbone.blocks."),
        ("vision_model.post_layernorm.", "vision_encoder.ln_vision."),
        ("qformer.layernorm.", "qformer.bert.embeddings.layernorm."),  # BLIP-2's
        ("qformer.", "qformer.bert."),
        ("query_tokens", "qformer.query_tokens"),
        ("language_projection.", "projection."),
        ("language_model.", "language_model."),
    ),
    inner={
        "vision_model.encoder.layers.": (
            (".self_attn.projection.", ".attn.proj."),
            (".self_attn.", ".attn."),
            (".layer_norm1.", ".norm1."),
            (".layer_norm2.", ".norm2."),
        )
    },
    ignored=(r".*\.position_ids$", *OLD_BUFFERS),
)

# an encoder-decoder language model (T5) and the projection into it are of no use here
FOREIGN_LANGUAGE_MODEL = (r"language_model\.", r"language_projection\.")

CAUSAL_LM = KeyTable(prefixes=(("", "language_model."),), ignored=OLD_BUFFERS)


class SourceTensor(NamedTuple):
    """One of our weights in a source. key: its name in the source. shape: its shape."""

    key: str
    shape: tuple[int, ...]


@dataclass
class Source:
    """A file or folder of weights in one format.

    config, meta: the contents of its config.json and meta.json, {} without such a file. entries: our key -> its key and
    shape in this source. ignored_keys: keys of the source that our model does not need. unknown_keys: keys that the
    table does not cover.
    """

    path: Path
    format: Format
    table: KeyTable
    weights: Weights
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, SourceTensor] = field(init=False, default_factory=dict)
    ignored_keys: list[str] = field(init=False, default_factory=list)
    unknown_keys: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for key, spec in self.weights.specs.items():
            try:
                ours = self.table.to_ours(key)
            except UnknownKeyError:
                self.unknown_keys.append(key)
                continue
            if ours is None:
                self.ignored_keys.append(key)
            else:
                self.entries[ours] = SourceTensor(key, tuple(spec.shape))

    @property
    def is_whole_model(self) -> bool:
        """True if this source holds all parts of a model, so that no other weights are needed."""
        if self.format is Format.TRANSFORMERS_BLIP:
            return not self.table.ignores(LANGUAGE_MODEL)
        return self.format in (Format.STLLM, Format.RELEASED)


def open_source(path: str | Path, *, depth: int | None = None) -> Source:
    """Open weights of any known format. Only names and shapes are read.

    path: a file, a folder, a hub name or a URL. depth: the number of encoder blocks to use, if configured.
    Raises UserError if nothing is at the path, if it is no checkpoint, if a shard is missing, or if a file is damaged.
    """
    place = locate(path)
    check_regular(place, "weights")
    if not place.is_dir():
        shard = SHARD.match(place.name)
        if shard and int(shard["total"]) > 1:
            raise UserError(f"{place} is one of {int(shard['total'])} shards: name their folder, {place.parent}")
        return _without_config(place, WeightFiles([place]), depth)
    config, meta = read_json(place / "config.json"), read_json(place / "meta.json")
    weights: Weights = WeightFiles(weight_files(place))
    if config.get("quantization_config"):
        weights = dequantize(place, weights, config)
    kind = config.get("model_type")
    is_blip = kind in ("instructblip", "instructblipvideo", "blip-2")
    text, table = config.get("text_config") or {}, TRANSFORMERS_BLIP
    if is_blip and (text.get("model_type", "opt") in ("t5", "mt5", "bart") or text.get("is_encoder_decoder", False)):
        table = table.ignoring(*FOREIGN_LANGUAGE_MODEL)
    elif (is_blip or kind == "stllm") and any(key.startswith(LANGUAGE_MODEL) for key in weights.specs):
        try:
            text_config = language_model_config(config.get("text_config"))
        except CONFIG_ERRORS as error:
            cause = reason(error)
            raise UserError(f"{place}/config.json: its text_config can't be used ({cause}): correct it") from error
        weights = convert_language_model(place, weights, text_config, prefix=LANGUAGE_MODEL)
    if kind == "stllm":
        return Source(place, Format.STLLM, OURS, weights, config, meta)
    if kind == "st_llm_hf" or any(key.startswith("model.stllm_model.") for key in weights.specs):
        return Source(place, Format.RELEASED, RELEASED, weights, config, meta)
    if is_blip:
        return Source(place, Format.TRANSFORMERS_BLIP, table, split_biases(place, weights), config, meta)
    if kind is None:
        return _without_config(place, weights, depth)
    weights = convert_language_model(place, weights, read_config(place), prefix="")
    return Source(place, Format.CAUSAL_LM, CAUSAL_LM, weights, config, meta)


def _without_config(path: Path, weights: Weights, depth: int | None) -> Source:
    """Recognise the format of a file, or of a folder without a config.json, by the names of its weights."""
    keys = weights.specs
    if any(key.startswith("model.stllm_model.") for key in keys):
        return Source(path, Format.RELEASED, RELEASED, weights)
    if "patch_embed.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys:
        last = max(int(key.split(".")[1]) for key in keys if key.startswith("blocks."))
        return Source(path, Format.EVA, EVA.ignoring(rf"blocks\.{depth or last}\."), weights)
    if any(key.startswith("Qformer.") for key in keys):
        if "llm_proj.weight" in keys:
            return Source(path, Format.INSTRUCTBLIP, INSTRUCTBLIP_LAVIS, weights)
        return Source(path, Format.BLIP2, BLIP2_LAVIS, weights)
    if "llama_proj.weight" in keys:
        return Source(path, Format.MINIGPT4, MINIGPT4, weights)
    if any(key.startswith(("vision_encoder.", "language_model.", "model.layers.")) for key in keys):
        raise UserError(f"{path} has no config.json beside it: name the folder that holds both")
    if any(".lora_A." in key for key in keys):
        raise UserError(
            f"{path} holds a LoRA adapter without the model under it: name that model, with the adapter on top of it "
            "by `stllm convert MODEL --adapter DIR --to NEW`"
        )
    first = ", ".join(list(keys)[:3])
    raise UserError(
        f"{path} is no known checkpoint (its first weights are {first}): expected one of "
        f"{', '.join(known.value for known in Format)}"
    )


def locate(path: str | Path) -> Path:
    """Return the file or folder of a path, a URL or a hub name, downloading it if needed.

    Raises UserError if it cannot be found or downloaded.
    """
    place = user_path(path)
    if place.exists():
        return place
    name = str(path)
    if name.startswith(("https://", "http://")):
        import torch

        target = Path(torch.hub.get_dir()) / "checkpoints" / name.rsplit("/", 1)[-1]  # torch's own cache
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(name, str(target))
            except OSError as error:
                raise UserError(
                    f"{name} could not be downloaded ({error}): fetch it and name the file instead"
                ) from error
        return target
    if not HUB_NAME.match(name) or name.startswith("."):
        raise UserError(f"{path}: no such file or folder, expected weights or a hub name (organisation/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub raises many types: a missing repository, no network, no permission
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: there is no such file or folder, and the hub did not give a checkpoint of this name ({cause}): "
            "check the path, or download the checkpoint to a folder and name that"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a folder, in order. Raises UserError when there are none or one is missing."""
    for path in folder.iterdir():
        if path.suffix in WEIGHT_ENDINGS and path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {path.readlink()}, which does not exist: copy or download it again")
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = folder / f"{stem}.{ending}.index.json", folder / f"{stem}.{ending}"
        shards = [SHARD.match(path.name) for path in folder.glob(f"{stem}-*-of-*.{ending}")]
        total = max((int(shard["total"]) for shard in shards if shard), default=0)
        if index.is_file():
            found = read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
                raise UserError(f"{index} holds no weight_map, expected each tensor's file: copy or download it again")
            names = sorted(set(found.values()))
            for name in names:
                inside = os.path.normpath(name)  # links stay: the hub's cache has links to files outside the folder
                if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
                    raise UserError(
                        f"{index}: its weight_map names {name!r}, a file outside this folder, and only files in it are "
                        "read: copy or download the checkpoint again"
                    )
        elif total:
            names = [f"{stem}-{number:05d}-of-{total:05d}.{ending}" for number in range(1, total + 1)]
        elif whole.is_file():
            names = [whole.name]
        else:
            continue
        for number, name in enumerate(names, start=1):
            if not (folder / name).is_file():
                which = f"shard {number} of {len(names)}, {name}"
                raise UserError(f"{which}, is missing in {folder}: copy or download it again")
        return [folder / name for name in names]
    others = sorted(
        path for path in folder.iterdir() if path.suffix in WEIGHT_ENDINGS and path.name != "training_args.bin"
    )
    if len(others) == 1:
        return others
    if others:
        raise UserError(f"{folder} holds several weight files ({', '.join(p.name for p in others)}): name one of them")
    raise UserError(
        f"{folder} holds no weights: expected model*.safetensors or pytorch_model*.bin beside a config.json"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Returns {} if the file does not exist. Raises UserError if it is damaged.

    transformers writes infinity as {"__float__": "Infinity"}, which is read as a float.
    """
    if not path.is_file():
        return {}
    try:
        content = loads(
            path.read_text(encoding="utf-8"),
            object_hook=lambda found: float(found["__float__"]) if found.keys() == {"__float__"} else found,
        )
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object, expected the keys of a configuration: copy or download it again")
    return content
