"""`stllm convert SOURCE... --to DIR`: converts weights of any known format to ours, or to the released format.

Everything is written into a temporary folder beside the target, which is renamed at the end. So a target is either
complete or does not exist. It holds a record of the command, so that the same command does not convert again.

The released format consists of sharded .bin files with an index, config.json and meta.json. meta.json holds what cannot
be inferred from the weights (number of heads, video input, ...), so the folder can be loaded without other settings.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from stllm.common.errors import UserError
from stllm.common.files import check_new, new_folder, user_path
from stllm.common.jsonl import loads
from stllm.models.checkpoints.audit import AuditReport
from stllm.models.checkpoints.formats import RELEASED, Source, UnknownKeyError
from stllm.models.checkpoints.infer_config import open_model
from stllm.models.checkpoints.load import assemble, processor_of
from stllm.models.configuration import QFORMER_DEFAULTS, VISION_DEFAULTS, STLLMConfig
from stllm.models.lora import load_adapter, merge_lora
from stllm.models.settings import VISION_RENAMED, published_settings
from stllm.models.st_llm import STLLM, config_of
from stllm.processors.prompts import QFORMER_FOLDER

FORMATS = ("stllm", "released", "language-model")
RECORD = ".conversion"  # file in the target: a digest of the command, and the sizes of the files that it wrote
SHARD_BYTES = 5 << 30
# fields of any transformers configuration that LLaMA's config.json has, too
KEPT_GENERIC = {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}


def convert(
    sources: Sequence[str | Path],
    to: str | Path,
    *,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    format: str = "stllm",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    merge: bool = False,
) -> AuditReport | None:
    """Combine the sources (later ones override earlier ones) and write them to the new folder `to`.

    cfg_path, options: settings that the sources do not determine. format: one of `FORMATS`. dtype: the stored type;
    auto keeps the type of most weights. adapter: the folder of a LoRA adapter to add. merge: adds LoRA to the weights
    that it adapts. Returns the audit, or None if `to` already holds the result of the same conversion.
    Raises UserError for anything missing or contradictory, for a target that is not empty, and for a full disk. The
    target is then unchanged.
    """
    assert format in FORMATS
    target = user_path(to)
    try:
        record = loads((target / RECORD).read_text(encoding="utf-8"))
        done, written = str(record["command"]), dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):  # no conversion was written here
        done, written = "", {}
        check_new(target, "--to")
    opened = open_model(sources, cfg_path, options=options)
    files = [*(source.path for source in opened.sources), *([] if adapter is None else [Path(adapter)])]
    inputs = [{str(path.absolute()): [s.st_size, s.st_mtime_ns] for path, s in _files(one).items()} for one in files]
    words = json.dumps([inputs, opened.settings, format, dtype, merge], sort_keys=True, default=str)
    command = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
    if done:
        if done == command and written.items() <= _sizes(target).items():
            return None
        check_new(target, "--to")
    processor = processor_of(opened)
    kind: str | torch.dtype = stored_dtype(opened.sources) if dtype == "auto" else dtype
    model, report = assemble(opened.config, opened.sources, device="cpu", dtype=kind)
    if adapter is not None:
        load_adapter(model, adapter)
    if merge:
        if model.config.lora is None:
            raise UserError(f"{' + '.join(map(str, sources))} has no LoRA to merge: leave out --merge-lora")
        merge_lora(model)  # only needed for our format: the other formats always merge LoRA
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    with new_folder(target, needed) as folder:
        if format == "language-model":  # the layout that transformers' AutoModelForCausalLM and `vllm serve` load
            merge_lora(model)
            model.language_model.save_pretrained(folder)
            processor.tokenizer.save_pretrained(folder)
        else:
            save_released(model, folder) if format == "released" else model.save_pretrained(folder)
            processor.save_pretrained(folder)
        # the sentencepiece file as well, for libraries that read no tokenizer.json
        sentencepiece = [path for source in opened.sources if (path := source.path / "tokenizer.model").is_file()]
        if sentencepiece:
            shutil.copyfile(sentencepiece[-1], folder / "tokenizer.model")
        (folder / RECORD).write_text(json.dumps({"command": command, "files": _sizes(folder)}), encoding="utf-8")
    return report


def _files(place: Path) -> dict[Path, os.stat_result]:
    """Return the files of a checkpoint folder, or the file itself, with their sizes and times."""
    paths = [place, *place.glob("*"), *place.glob(f"{QFORMER_FOLDER}/*")]
    return {path: path.stat() for path in paths if path.is_file()}


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): status.st_size for path, status in _files(folder).items()}


def stored_dtype(sources: Sequence[Source]) -> torch.dtype:
    """Return the floating-point type that most of the weights are stored in."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in (spec for source in sources for spec in source.weights.specs.values()):
        if spec.dtype in (torch.float32, torch.float16, torch.bfloat16):
            sizes[spec.dtype] += spec.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def save_released(model: STLLM, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model in the released format, without the tokenizers. LoRA is merged into the model first, in place.

    shard_bytes: the largest size of a weight file. Raises UserError if the format has no place for the language model.
    """
    state = released_state(model)
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=shard_bytes
    )
    files = split.filename_to_tensors.items()
    for name, keys in tqdm(files, desc="writing weights", unit="file", disable=None, delay=1, leave=False):
        torch.save({key: state[key] for key in keys}, folder / name)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    # config.json as old libraries expect it: only LLaMA's fields, without those of any transformers configuration
    generic = set(PretrainedConfig().to_dict()) - KEPT_GENERIC
    text = {key: value for key, value in model.config.text_config.to_dict().items() if key not in generic}
    if "rope_theta" in (text.get("rope_parameters") or {}):
        text.setdefault("rope_theta", text["rope_parameters"]["rope_theta"])
    dtype = str(model.projection.weight.dtype).removeprefix("torch.")
    config = {**text, "model_type": "st_llm_hf", "architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}
    contents = {"pytorch_model.bin.index.json": index, "config.json": config, "meta.json": meta_of(config_of(model))}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def released_state(model: STLLM) -> dict[str, Tensor]:
    """Return the model's weights under their names in the released format. LoRA is first merged into `model`, in place.

    Raises UserError if the released format has no place for a weight.
    """
    kind = model.config.text_config.model_type
    if kind != "llama":
        raise UserError(f"the released layout takes LLaMA models only, but this one's is {kind}: use --format stllm")
    merge_lora(model)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if "lora_" in key:
            continue
        try:
            state[RELEASED.to_theirs(key)] = tensor.detach().cpu()
        except UnknownKeyError as error:
            raise UserError(f"the released layout has no place for {key}: use --format stllm") from error
    state["model.stllm_model.embed_tokens.weight"] = state["model.embed_tokens.weight"]  # published twice
    return state


def meta_of(config: STLLMConfig) -> dict[str, Any]:
    """Return the content of meta.json: the settings by their published names, and the sizes."""
    vision = {key: config.vision_config[key] for key in VISION_DEFAULTS if key not in VISION_RENAMED.values()}
    vision = {"img_size": config.vision_config["image_size"], **vision}
    sizes: dict[str, Any] = {"vision": vision, "llm": "config.json", "bottleneck": config.residual_bottleneck}
    if config.has_qformer:
        names = [*QFORMER_DEFAULTS, "encoder_hidden_size"]
        sizes["qformer"] = {name: getattr(config.qformer_config, name) for name in names}
        if not config.qformer_text_input:
            sizes["qformer"]["vocab_size"] = None
    return {"config": published_settings(config), "sizes": sizes}
