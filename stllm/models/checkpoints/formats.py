"""Detection of a checkpoint's format, from its config.json and the names of its weights.

`open_source` returns a `Source`: format, key table, shapes, and the tensors on demand. A path that does not exist here
and looks like `org/name` is fetched from the hub. Only that and a URL use the network.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from stllm.common.errors import UserError, reason
from stllm.common.files import check_regular, user_path
from stllm.common.jsonl import loads
from stllm.models.checkpoints import tables
from stllm.models.checkpoints.tables import KeyTable, Target, UnknownKeyError
from stllm.models.checkpoints.weights import WeightFiles, Weights, convert_language_model, read_config
from stllm.models.configuration import CONFIG_ERRORS, language_model_config

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")
HUB_FILES = ("*.json", "*.model", "*.txt", "*.safetensors", "*.bin", "*.jinja", "qformer_tokenizer/*")
LANGUAGE_MODEL = "language_model."  # prefix of its keys, in our format and in transformers' InstructBLIP
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
SHARD = re.compile(r".+-\d{5}-of-(?P<total>\d{5})\.(?:bin|safetensors)$")


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


class Entry(NamedTuple):
    """One of our tensors in a source: their key, which part of their tensor it is, and that part's shape."""

    key: str
    target: Target
    shape: tuple[int, ...]


@dataclass
class Source:
    """A file or folder of weights in one format.

    config, meta: its config.json and meta.json, {} if it has none. entries: our keys and where they are found.
    ignored_keys: their keys that are known and not ours. unknown_keys: those that the table does not cover.
    """

    path: Path
    format: Format
    table: KeyTable
    weights: Weights
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(init=False, default_factory=dict)
    ignored_keys: list[str] = field(init=False, default_factory=list)
    unknown_keys: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for key, spec in self.weights.specs.items():
            try:
                targets = self.table.targets(key)
            except UnknownKeyError:
                self.unknown_keys.append(key)
                continue
            if not targets:
                self.ignored_keys.append(key)
            for target in targets:
                if target.key is not None:
                    self.entries[target.key] = Entry(key, target, tuple(target.take(spec).shape))

    @property
    def is_whole_model(self) -> bool:
        """Check whether it holds every part, so that nothing else needs to be named."""
        if self.format is Format.TRANSFORMERS_BLIP:
            return not self.table.ignores(LANGUAGE_MODEL)
        return self.format in (Format.STLLM, Format.RELEASED)


def open_source(path: str | Path, *, depth: int | None = None) -> Source:
    """Open weights of any known format. Only names and shapes are read.

    depth: blocks of the vision encoder that are used, where the configuration specifies it.
    Raises UserError: nothing there, no checkpoint, a shard missing, a file damaged.
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
    kind = config.get("model_type")
    if kind == "stllm":
        weights = _with_language_model(place, weights, config)
        return Source(place, Format.STLLM, tables.OURS, weights, config, meta)
    if kind == "st_llm_hf" or any(key.startswith("model.stllm_model.") for key in weights.specs):
        return Source(place, Format.RELEASED, tables.RELEASED, weights, config, meta)
    if kind in ("instructblip", "instructblipvideo", "blip-2"):
        text = config.get("text_config") or {}
        if text.get("model_type", "opt") in ("t5", "mt5", "bart") or text.get("is_encoder_decoder", False):
            table = tables.TRANSFORMERS_BLIP.ignoring(*tables.FOREIGN_LANGUAGE_MODEL)
        else:
            table, weights = tables.TRANSFORMERS_BLIP, _with_language_model(place, weights, config)
        return Source(place, Format.TRANSFORMERS_BLIP, table, weights, config, meta)
    if kind is None:
        return _without_config(place, weights, depth)
    weights = convert_language_model(place, weights, read_config(place), prefix="")
    return Source(place, Format.CAUSAL_LM, tables.CAUSAL_LM, weights, config, meta)


def _without_config(path: Path, weights: Weights, depth: int | None) -> Source:
    """Recognise a file, or a folder without a config.json, by its key names."""
    keys = weights.specs
    if any(key.startswith("model.stllm_model.") for key in keys):
        return Source(path, Format.RELEASED, tables.RELEASED, weights)
    if "patch_embed.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys:
        last = max(int(key.split(".")[1]) for key in keys if key.startswith("blocks."))
        return Source(path, Format.EVA, tables.EVA.ignoring(rf"blocks\.{depth or last}\."), weights)
    if any(key.startswith("Qformer.") for key in keys):
        if "llm_proj.weight" in keys:
            return Source(path, Format.INSTRUCTBLIP, tables.INSTRUCTBLIP_LAVIS, weights)
        return Source(path, Format.BLIP2, tables.BLIP2_LAVIS, weights)
    if "llama_proj.weight" in keys:
        return Source(path, Format.MINIGPT4, tables.MINIGPT4, weights)
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


def _with_language_model(place: Path, weights: Weights, config: dict[str, Any]) -> Weights:
    """Convert the language model inside a whole model's folder, where there is one."""
    if not any(key.startswith(LANGUAGE_MODEL) for key in weights.specs):
        return weights
    try:
        text_config = language_model_config(config.get("text_config"))
    except CONFIG_ERRORS as error:
        raise UserError(f"{place}/config.json: its text_config can't be used ({reason(error)}): correct it") from error
    return convert_language_model(place, weights, text_config, prefix=LANGUAGE_MODEL)


def locate(path: str | Path) -> Path:
    """Find the file or folder of that name: here, at a URL, or on the hub. Raises UserError."""
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
    except Exception as error:  # a missing repository, no network, no permission: many kinds
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is neither a file or folder here nor could it be fetched from the hub ({cause}): check the path, "
            "or download it to a folder and name that"
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
        elif total:
            names = [f"{stem}-{number:05d}-of-{total:05d}.{ending}" for number in range(1, total + 1)]
        elif whole.is_file():
            names = [whole.name]
        else:
            continue
        for number, name in enumerate(names, start=1):
            if not (folder / name).is_file():
                raise UserError(
                    f"shard {number} of {len(names)}, {name}, is missing in {folder}: copy or download it again"
                )
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
    """Read a JSON object; {} when the file does not exist. Raises UserError when it is damaged.

    transformers writes infinity as {"__float__": "Infinity"}; it is read as the number.
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
