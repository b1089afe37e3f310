"""Loading a checkpoint of any known format as a model and its prompt processor.

    model, processor = load_pretrained("path/to/checkpoint")

The model is built on the meta device. A plan then assigns a tensor of a file to each weight, by name and shape. Weights
that no file has are initialised randomly, if they may be. The other weights are read one by one, directly to their
device and dtype, so memory never holds two copies. Under FSDP 2 and ZeRO-3, reading also divides the weights among the
processes (`Division`). With a device map, transformers' `from_pretrained` places the weights.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from tqdm import tqdm

from stllm.common.device import resolve_device, resolve_dtype
from stllm.common.errors import UserError, out_of_memory, reason
from stllm.common.registry import models
from stllm.models.checkpoints.audit import OTHER, PART_NAMES, AuditReport, named, part_of, part_of_theirs
from stllm.models.checkpoints.formats import Format, Source, SourceTensor, locate, open_source
from stllm.models.checkpoints.infer_config import (
    ADAPTER,
    BACKBONE,
    Opened,
    check_adapter,
    check_vocabulary,
    family_tokens,
    names_of,
    open_model,
)
from stllm.models.checkpoints.weights import QuantizedWeights
from stllm.models.configuration import CONFIG_ERRORS, STLLMConfig
from stllm.models.language_model import set_attention
from stllm.models.settings import quantization_of
from stllm.models.st_llm import STLLM, config_of
from stllm.processors.prompts import DEFAULT_QFORMER_TOKENIZER, QFORMER_FOLDER, PromptProcessor

log = logging.getLogger(__name__)

CopyRows = Callable[..., None]  # (tensor, first=0): copies a weight's rows, starting at row `first`, into a tensor


class Division(Protocol):
    """A method to divide a model's weights among processes while they are read; see runners/sharding.py."""

    def begin(self, model: nn.Module) -> None:
        """Divide the model before reading. Weights of files are on the meta device; the others are in main memory."""

    def read(self, old: Tensor, copy: CopyRows) -> Tensor:
        """Read the part of a weight that this process keeps, and return it.

        copy: function that reads rows of the weight. old: the weight in the divided model.
        """


LAYER = re.compile(r"[a-z_.]+\.\d+(?=\.)")  # the outermost numbered module of a key
POS_EMBED = f"{BACKBONE}pos_embed"
FRESH_PARTS = ("temporal adapter", "video input", "mvm decoder")  # training may always initialise these randomly
# name in model.fresh -> parts that training then may initialise randomly
ASKED_FRESH = {
    "vision_encoder": ("vision encoder", "ln_vision"),
    "qformer": ("qformer",),
    "projection": ("projection",),
    "language_model": ("language model",),
}


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
    """Load the model of a checkpoint of any known format, in evaluation mode.

    path: a folder, a file, or a hub name. cfg_path, options: a YAML and overrides; they override the checkpoint's
    settings. device, dtype: see common/device.py.
    quantization: "8bit" or "4bit", for the language model (models/quantization.py); None: as configured.
    device_map: accelerate's device map, e.g. "auto", to place the model on several devices.
    Raises UserError for weights or settings that are missing, damaged or contradictory.
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
    language_model: str = "whole",
) -> tuple[STLLM, PromptProcessor]:
    """Load the model and its prompt processor; arguments and errors as for `load_model` and `assemble`."""
    opened = open_model(path, cfg_path, options=options)
    processor = processor_of(opened)  # first, so that a missing tokenizer is found before 16 GiB are loaded
    return load_opened(opened, device=device, dtype=dtype, language_model=language_model)[0], processor


def processor_of(opened: Opened, *, download: bool = False) -> PromptProcessor:
    """Build the prompt processor of an opened checkpoint. Raises UserError if a tokenizer is missing or unsuitable.

    download: if neither the settings nor the checkpoint have a tokenizer for the Q-Former, download the published one.
    """
    sources, settings = opened.sources, opened.settings
    # use the tokenizer of the last source that has one, as for the language model's weights
    with_tokenizer = [one.path for one in sources if one.path.is_dir() and any(one.path.glob("tokenizer*"))]
    if not with_tokenizer and not settings.get("llama_model"):
        raise UserError(f"{opened.path} has no tokenizer: name the language model's folder with model.llama_model")
    folder = with_tokenizer[-1] if with_tokenizer else locate(settings["llama_model"])
    qformer_tokenizer = settings.get("qformer_tokenizer")
    own = [one.path / QFORMER_FOLDER for one in sources if (one.path / QFORMER_FOLDER).is_dir()]
    if own and not qformer_tokenizer:
        qformer_tokenizer = str(own[-1])
    for source in sources if not qformer_tokenizer else ():
        # meta.json of a released folder names the Q-Former's vocabulary, relative to the folder's parent
        beside = ((source.meta.get("sizes") or {}).get("qformer") or {}).get("bert_vocab")
        if beside and (vocabulary := source.path.absolute().parent / beside).exists():
            qformer_tokenizer = str(vocabulary)
    if download and not qformer_tokenizer:
        qformer_tokenizer = DEFAULT_QFORMER_TOKENIZER
    processor = PromptProcessor.from_pretrained(folder, config=opened.config, qformer_tokenizer=qformer_tokenizer)
    check_vocabulary(str(opened.path), None, opened.config, processor.vocab_size)
    return processor


def load_opened(
    opened: Opened,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    device_map: Any = None,
    language_model: str = "whole",
) -> tuple[STLLM, AuditReport]:
    """Load the model of an opened checkpoint, and return it with its audit.

    Arguments and errors as for `load_model` and `assemble`.
    """
    quantization = quantization or quantization_of(opened.settings)
    model, report = assemble(
        opened.config,
        opened.sources,
        device=device,
        dtype=dtype,
        language_model=language_model,
        quantization=quantization if language_model == "whole" else None,
        device_map=device_map,
    )
    if language_model == "whole":
        set_attention(model.language_model, opened.settings.get("attn_implementation"))
    for line in report.details():
        log.debug(line)
    if unexpected := report.keys("unexpected"):
        log.info("%s: %d weights are not used: %s", report.source, len(unexpected), named(unexpected))
    return model, report


def assemble(
    config: STLLMConfig,
    sources: Sequence[Source],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    training: bool = False,
    fresh: Sequence[str] = (),
    trained_dtype: torch.dtype | None = None,
    language_model: str = "whole",
    quantization: str | None = None,
    device_map: Any = None,
    division: Division | None = None,
) -> tuple[STLLM, AuditReport]:
    """Build the model, load its weights, and return it in evaluation mode with its audit.

    sources: the opened files; later ones override earlier ones.
    training: allow randomly initialised parts, see `build_model`. fresh: names in `ASKED_FRESH` of further such parts.
    trained_dtype: dtype of the trained weights, such as float32, if it differs from that of the frozen weights.
    language_model: part of the language model to load: "whole", "embedding" (its token embedding) or "none". The audit
        covers all of it.
    quantization, device_map: as in `load_model`. With a device map, weights of other formats are first loaded to main
        memory.
    division: divides the weights among processes while they are read.
    Raises UserError if weights are missing, have another size or contradict the configuration, or if memory runs out.
    """
    place = resolve_device(device) if isinstance(device, str) else device
    kind = resolve_dtype(dtype, place) if isinstance(dtype, str) else dtype
    own = sources[-1] if sources and sources[-1].format is Format.STLLM else None
    bits = None
    if quantization is not None:
        from stllm.models.quantization import quantization_config, quantize_layers, quantized_layers

        bits = quantization_config(quantization, kind, place)
    arguments: dict[str, Any] = {}  # arguments of transformers' `from_pretrained`, if it places the weights
    if device_map:
        arguments = {"config": config, "dtype": kind, "device_map": device_map}
        if bits is not None:
            arguments["quantization_config"] = bits
        # transformers ignores the scales of a folder that was saved in 8 bits
        if own and len(sources) == 1 and not training and not own.config.get("quantization_config"):
            loaded: Any = STLLM.from_pretrained(
                own.path, output_loading_info=True, local_files_only=True, trust_remote_code=False, **arguments
            )
            model, info = loaded
            report = AuditReport(source=str(own.path))
            for state in ("missing", "unexpected"):  # for a wrong shape, transformers raises an error
                for key in info[f"{state}_keys"]:
                    report.add(state, part_of(key), key)
            report.raise_for_problems()
            return model.eval(), report
        place = torch.device("cpu")
    model = meta_model(config, kind)
    if trained_dtype is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained_dtype)
    plan = make_plan(model, sources, training=training, fresh=fresh)
    plan.report.raise_for_problems()
    if bits is not None and any(isinstance(source.weights, QuantizedWeights) for source in sources):
        raise UserError(
            f"{plan.report.source} is stored quantized, and can't be quantized again to {quantization}: leave that out"
        )
    if bits is not None and not arguments:
        quantize_layers(model, bits, training=training)
        names = [f"{name}.weight" for name in quantized_layers(model)]
        model.precise_weights = {name: plan.origins[name] for name in names if name in plan.origins}
    if language_model != "whole":
        assert language_model in ("embedding", "none")
        model.keep_embedding() if language_model == "embedding" else setattr(model, "language_model", nn.Identity())
        model.all_tied_weights_keys = {}
        held = set(model.state_dict())
        plan.origins = {key: origin for key, origin in plan.origins.items() if key in held}
    try:
        fill(model, plan, place, division)
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        size = sum(tensor.nbytes for tensor in model.parameters()) / 2**30
        raise UserError(
            f"not enough memory on {place}: the weights need {size:.1f} GiB as {str(kind).removeprefix('torch.')}; "
            "use a smaller type (--dtype bfloat16), quantized loading, or another --device"
        ) from error
    if arguments:
        model = STLLM.from_pretrained(None, state_dict=model.state_dict(), trust_remote_code=False, **arguments)
    return model.eval(), plan.report


def meta_model(config: STLLMConfig, dtype: torch.dtype) -> STLLM:
    """Build the model on the meta device. Raises UserError for sizes that do not fit each other."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: STLLM = models.get(config.arch)(config)
    except (*CONFIG_ERRORS, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the configuration's sizes don't make a model ({reason(error)}): correct them") from error
    finally:
        torch.set_default_dtype(before)
    config.dtype = dtype
    return model


@dataclass
class WeightPlan:
    """A plan that assigns to each weight of the model a tensor of a file. report: the audit of all keys.

    The weights are in the order in which the files are read.
    """

    report: AuditReport
    origins: dict[str, tuple[Source, SourceTensor]] = field(default_factory=dict)


def make_plan(
    model: STLLM, sources: Sequence[Source], *, training: bool = False, fresh: Sequence[str] = ()
) -> WeightPlan:
    """Assign a tensor of the sources to each weight of the model, by name and shape. Tensors are not read.

    sources, training, fresh: as in `assemble`. Raises UserError if the temporal adapter or the vocabulary of the
    sources does not fit the configuration.
    """
    config = config_of(model)
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if model.precise_weights:
        from stllm.models.quantization import precise_state

        wanted = precise_state(model)
    plan = WeightPlan(AuditReport(source=names_of(sources) or "the model"))
    report, origins = plan.report, plan.origins
    check_adapter(report.source, sources, needed=any(key.startswith(ADAPTER) for key in wanted), may_be_fresh=training)
    plain = {key.replace(".base_layer.", "."): key for key in wanted}  # LoRA wraps the layers that it adapts
    for source in sources:
        for key, entry in source.entries.items():
            if (own := plain.get(key, key)) in wanted:
                origins.pop(own, None)  # remove an earlier source's tensor, so that the order is that of the later file
                origins[own] = (source, entry)
            elif key not in wanted:
                report.add("unexpected", part_of(key), entry.key)
        for key in source.ignored_keys:
            report.add("ignored", part_of_theirs(key), key)
        for key in source.unknown_keys:
            report.add("unexpected", part_of_theirs(key) if source.is_whole_model else OTHER, key)

    # layers of the sources beyond the model's last one, such as `language_model.model.layers.32`
    kept = {match[0] for key in wanted if (match := LAYER.match(key))}
    found = {match[0] for source in sources for key in source.entries if (match := LAYER.match(key))}
    stacks = {layer.rpartition(".")[0] for layer in kept}
    for layer in sorted(layer for layer in found - kept if layer.rpartition(".")[0] in stacks):
        report.add("wrong_shape", part_of(layer), f"{layer}: found, but the configuration has fewer layers")

    # of two tied weights, only one is filled: the one that transformers ties the other to; the file may have either
    tied = model.all_tied_weights_keys
    for target, origin in tied.items():
        if target in origins:
            origins.setdefault(origin, origins.pop(target))

    owners = {source.path: None for key, (source, _) in origins.items() if part_of(key) == "language model"}
    for source in sources:
        if source.format is Format.CAUSAL_LM and source.path not in owners:  # a whole checkpoint overrides them all
            taken = " + ".join(map(str, owners))
            report.notes.append(f"the language model's weights are those of {taken}: none is from {source.path}")

    embedding = model.get_input_embeddings().weight
    key = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    if key in origins and not _grows(key, origins[key][0]):  # `decide_config` checks embeddings that grow
        source, entry = origins[key]
        tokens = family_tokens(source.path, adds_pad=config.adds_pad, config=config.text_config)
        check_vocabulary(str(source.path), entry.shape[0], config, tokens)

    asked = {part for name in fresh for part in ASKED_FRESH[name]}
    for key in [key for key in origins if part_of(key) == "projection" and "projection" in asked]:
        source, entry = origins[key]
        if entry.shape != tuple(wanted[key].shape):
            report.notes.append(f"{entry.key} of {source.path} is for a language model of another width: left out")
            del origins[key]

    may_be_fresh = set(asked)  # names of parts
    is_whole = any(source.is_whole_model for source in sources)
    if not config.has_qformer and not is_whole:
        may_be_fresh.add("ln_vision")  # the Q-Former's file has it; without that, it starts as the identity (published)
    if training:
        may_be_fresh.update(FRESH_PARTS if sources else (*PART_NAMES, OTHER))
        if not is_whole and not any("projection.weight" in source.entries for source in sources):
            may_be_fresh.add("projection")
    copied = {key: block for key, block in model.copied_weights().items() if key not in origins and block in origins}
    for key, tensor in wanted.items():
        if key in origins:
            _check_shape(plan, key, tuple(tensor.shape), config)
        elif key not in tied:
            is_fresh = part_of(key) in may_be_fresh or (training and "lora_" in key)
            report.add("fresh" if is_fresh else "missing", part_of(key), key)
    origins.update((key, origins[block]) for key, block in copied.items())
    return plan


def _check_shape(plan: WeightPlan, key: str, expected: tuple[int, ...], config: STLLMConfig) -> None:
    """Record a weight in the audit as loaded, or as "wrong_shape" if `fill` cannot adapt it to the shape `expected`."""
    source, entry = plan.origins[key]
    found, notes = entry.shape, plan.report.notes
    if found == expected:
        pass
    elif (
        key == POS_EMBED
        and found[2] == expected[2]
        and all(math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1 for shape in (found, expected))  # square images
    ):
        size = config.vision_config["patch_size"] * math.isqrt(found[1] - 1)
        new_size = config.vision_config["image_size"]
        notes.append(f"position embeddings are interpolated from image size {size} to {new_size}")
    elif _grows(key, source) and found[1:] == expected[1:] and found[0] < expected[0]:
        notes.append(f"{key} grows from {found[0]} to {expected[0]} rows: the added [PAD] is their mean")
    else:
        plan.report.add("wrong_shape", part_of(key), f"{entry.key}: found {found}, expected {expected}")
        return
    plan.report.add("loaded", part_of(key), key)


def _grows(key: str, source: Source) -> bool:
    """Check whether rows for [PAD] may be added to a weight.

    They may be added to the token embeddings and the output head of an original language model.
    """
    is_plain = source.format in (Format.CAUSAL_LM, Format.TRANSFORMERS_BLIP)
    return is_plain and key.startswith("language_model.") and key.endswith((".weight", ".bias"))


def fill(model: STLLM, plan: WeightPlan, device: torch.device, division: Division | None = None) -> None:
    """Initialise the weights that no file has, read all others as planned, and tie weights.

    Weights of quantized layers are quantized. division: as in `assemble`; the initialised weights are whole, in main
    memory, until they are divided.
    """
    total = sum(model.get_parameter_or_buffer(key).nbytes for key in plan.origins)
    layers: dict[str, nn.Module] = {}
    if model.precise_weights:
        from stllm.models.quantization import quantized_layers, quantized_weight

        layers = {f"{name}.weight": layer for name, layer in quantized_layers(model).items()}
    kind = config_of(model).dtype
    tied = set(model.all_tied_weights_keys)
    for key, old in [*model.named_parameters(), *model.named_buffers()]:
        if key in plan.origins:
            old._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then does not initialise it
        elif old.is_meta and key not in tied:
            _set_tensor(model, key, torch.empty_like(old, device="cpu" if division else device), loaded=False)
    model.initialize_weights()  # all weights without that mark, and computed buffers
    if any("lora_" in key for key in plan.report.keys("fresh")):
        from peft.tuners.lora import LoraLayer

        for module in model.modules():  # peft's initialisation (no update at first) in place of transformers'
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    module.reset_lora_parameters(adapter, init_lora_weights=True)
    if division is not None:
        model.tie_weights()  # so that tied weights are divided as one
        division.begin(model)
    # no bar if the output is not a terminal (disable=None), or if loading takes less than a second (delay)
    with tqdm(
        desc="loading weights", total=total, unit="B", unit_scale=True, disable=None, delay=1, leave=False
    ) as bar:
        for key, (source, entry) in plan.origins.items():
            old = model.get_parameter_or_buffer(key)
            if key in layers:
                new: Tensor = quantized_weight(layers[key], source.weights.read(entry.key).to(kind), device)
            elif division is not None:
                new = division.read(old, partial(_copy, source, entry, key, tuple(old.shape)))
            else:
                new = torch.empty_like(old, device=device, requires_grad=False)
                _copy(source, entry, key, tuple(old.shape), new)
            _set_tensor(model, key, new, loaded=True)
            bar.update(old.nbytes)
    if tied:
        model.tie_weights()
    left = [key for key, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not left, f"weights without memory: {left[:5]}"


@torch.no_grad()
def restore(model: STLLM, folder: Path) -> None:
    """Load the weights of a checkpoint in our format into a model, in place.

    Raises UserError for weights that are missing or of another size.
    """
    plan = make_plan(model, [open_source(folder)])
    if lacking := [*plan.report.keys("missing"), *plan.report.keys("wrong_shape")]:
        raise UserError(
            f"{folder} does not hold all of the model's weights: {named(lacking)} are missing or of another size; "
            "remove this folder to continue from the checkpoint before it, or name another one with "
            "run.resume_from_checkpoint"
        )
    for key, (source, entry) in plan.origins.items():
        tensor = model.get_parameter_or_buffer(key)
        _copy(source, entry, key, tuple(tensor.shape), tensor)


def _copy(source: Source, entry: SourceTensor, key: str, shape: tuple[int, ...], new: Tensor, first: int = 0) -> None:
    """Copy rows of a weight, starting at row `first`, into the tensor `new`, which determines their number.

    shape: shape of the whole weight in the model, which may differ from the file's; see `_check_shape`.
    """
    if entry.shape == shape:
        source.weights.copy_to(entry.key, new, first)
        return
    tensor = source.weights.read(entry.key)
    if key == POS_EMBED:  # (1, 1+P, C): the class token is copied; no antialiasing, as published
        side = math.isqrt(shape[1] - 1)
        new.copy_(resample_abs_pos_embed(tensor.float(), [side, side], num_prefix_tokens=1, antialias=False))
    else:  # the vocabulary grew: the added rows are the mean of the others
        present = tensor[first : first + len(new)]
        new[: len(present)].copy_(present)
        new[len(present) :] = tensor.float().mean(dim=0).to(new.dtype)


def _set_tensor(model: STLLM, key: str, tensor: Tensor, *, loaded: bool) -> None:
    parent_name, _, name = key.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, name)
    is_new = isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter)  # quantized weights are parameters
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_new else tensor
    new._is_hf_initialized = loaded  # type: ignore[attr-defined]  # transformers' own mark: leave it as it is
    setattr(parent, name, new)
