"""Loading: from a checkpoint of any known format to a model and its prompts, audited.

    model, processor = load_pretrained("path/to/checkpoint")

First, a plan is made from names and shapes: which tensor of which file goes where. Then the model is built on the meta
device, weights that no file has are initialised where they may start fresh, and the others are filled weight by weight,
straight to their device and type, so that memory never holds two copies. Under FSDP 2 and ZeRO-3 the weights are
divided among the processes meanwhile (`Division`). With a device map, transformers' `from_pretrained` puts the weights
in place.
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
from stllm.processors.prompts import PromptProcessor

log = logging.getLogger(__name__)

CopyRows = Callable[..., None]  # (tensor, first=0): fills a tensor with a weight's rows, from the row `first` on


class Division(Protocol):
    """Divides a model's weights among processes while they are read; see runners/sharding.py."""

    def begin(self, model: nn.Module) -> None:
        """Divide the model. Weights that a file has are on the meta device yet, the others are in main memory."""

    def read(self, old: Tensor, copy: CopyRows) -> Tensor:
        """Return this process's part of a weight that `copy` reads. old: its place in the model that was begun."""


LAYER = re.compile(r"[a-z_.]+\.\d+(?=\.)")  # the outermost numbered module of a key
POS_EMBED = f"{BACKBONE}pos_embed"
FRESH_PARTS = ("temporal adapter", "video input", "mvm decoder")  # what training may start without
# model.fresh: what training may start without when the user asks for it
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

    path: a folder, a file, or a hub name. cfg_path, options: settings that the checkpoint lacks, or replacements for
    its own.
    dtype: auto is the type that suits the device. quantization: 8bit or 4bit, for the language model, see
    models/quantization.py; None: as the settings say.
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
    language_model: str = "whole",
) -> tuple[STLLM, PromptProcessor]:
    """Load the model and the processor that writes its prompts; arguments as for `load_model` and `assemble`."""
    opened = open_model(path, cfg_path, options=options)
    processor = processor_of(opened)  # first: a missing tokenizer should not cost the loading of 16 GiB
    return load_opened(opened, device=device, dtype=dtype, language_model=language_model)[0], processor


def processor_of(opened: Opened) -> PromptProcessor:
    """Build the prompt processor of an opened checkpoint from its tokenizers and template. Raises UserError."""
    sources, settings = opened.sources, opened.settings
    # the tokenizer goes with the language model: that of the last source that has one
    with_tokenizer = [one.path for one in sources if one.path.is_dir() and any(one.path.glob("tokenizer*"))]
    if not with_tokenizer and not settings.get("llama_model"):
        raise UserError(f"{opened.path} has no tokenizer: name the language model's folder with model.llama_model")
    folder = with_tokenizer[-1] if with_tokenizer else locate(settings["llama_model"])
    qformer_tokenizer = settings.get("qformer_tokenizer")
    for source in sources if not qformer_tokenizer else ():
        # the Q-Former's vocabulary that a released folder's meta.json names, relative to the folder's parent
        beside = ((source.meta.get("sizes") or {}).get("qformer") or {}).get("bert_vocab")
        if beside and (vocabulary := source.path.absolute().parent / beside).exists():
            qformer_tokenizer = str(vocabulary)
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
    """Load the model of an opened checkpoint, and return its audit; arguments as for `load_model` and `assemble`."""
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
    """Build the model, fill it, and return it in evaluation mode with its audit.

    training: allow fresh parts, see `build_model`. fresh: further ones, names of `ASKED_FRESH`.
    trained_dtype: the type of the trained weights, where it differs from the others' (float32 masters).
    language_model: the part of it that is read and held, whole, embedding (its token embedding) or none; it is audited
        all the same.
    quantization: as in `load_model`. device_map: as there; a foreign format then passes through main memory.
    division: divides the weights among processes while they are read.
    Raises UserError: what the configuration needs is missing or of another size, a contradiction, no memory.
    """
    place = resolve_device(device) if isinstance(device, str) else device
    kind = resolve_dtype(dtype, place) if isinstance(dtype, str) else dtype
    own = sources[-1] if sources and sources[-1].format is Format.STLLM else None
    bits = None
    if quantization is not None:
        from stllm.models.quantization import quantization_config, quantize_layers, quantized_layers

        bits = quantization_config(quantization, kind, place)
    arguments: dict[str, Any] = {}  # of transformers' `from_pretrained`, where that puts the weights in place
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
            for state in ("missing", "unexpected"):  # a wrong shape is an error of transformers
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
    """Build the model without memory for its weights. Raises UserError for sizes that don't fit each other."""
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
class Plan:
    """The origin of each of the model's tensors, in the order of the files. `report` names the fate of all others."""

    report: AuditReport
    origins: dict[str, tuple[Source, SourceTensor]] = field(default_factory=dict)


def make_plan(model: STLLM, sources: Sequence[Source], *, training: bool = False, fresh: Sequence[str] = ()) -> Plan:
    """Match the model with the sources' weights, of which later ones override earlier ones.

    training, fresh: as in `assemble`. Nothing is read. Raises UserError for weights of another kind than the
    configuration's.
    """
    config = config_of(model)
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if model.precise_weights:
        from stllm.models.quantization import precise_state

        wanted = precise_state(model)
    plan = Plan(AuditReport(source=names_of(sources) or "the model"))
    report, origins = plan.report, plan.origins
    check_adapter(report.source, sources, needed=any(key.startswith(ADAPTER) for key in wanted), may_be_fresh=training)
    plain = {key.replace(".base_layer.", "."): key for key in wanted}  # LoRA wraps the layers that it adapts
    for source in sources:
        for key, entry in source.entries.items():
            if (own := plain.get(key, key)) in wanted:
                origins.pop(own, None)  # of a source below: the order is that of the file which counts
                origins[own] = (source, entry)
            elif key not in wanted:
                report.add("unexpected", part_of(key), entry.key)
        for key in source.ignored_keys:
            report.add("ignored", part_of_theirs(key), key)
        for key in source.unknown_keys:
            report.add("unexpected", part_of_theirs(key) if source.is_whole_model else OTHER, key)

    # layers beyond the last one of the model, as `language_model.model.layers.32`
    kept = {match[0] for key in wanted if (match := LAYER.match(key))}
    found = {match[0] for source in sources for key in source.entries if (match := LAYER.match(key))}
    stacks = {layer.rpartition(".")[0] for layer in kept}
    for layer in sorted(layer for layer in found - kept if layer.rpartition(".")[0] in stacks):
        report.add("wrong_shape", part_of(layer), f"{layer}: found, but the configuration has fewer layers")

    # of two tied weights only the one that the other is tied to is filled, whichever the file has
    tied = model.all_tied_weights_keys
    for target, origin in tied.items():
        if target in origins:
            origins.setdefault(origin, origins.pop(target))

    owners = {source.path: None for key, (source, _) in origins.items() if part_of(key) == "language model"}
    for source in sources:
        if source.format is Format.CAUSAL_LM and source.path not in owners:  # a whole checkpoint has them all
            taken = " + ".join(map(str, owners))
            report.notes.append(f"the language model's weights are those of {taken}: none is from {source.path}")

    embedding = model.get_input_embeddings().weight
    key = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    if key in origins and not _grows(key, origins[key][0]):  # rows that grow are counted in `decide_config`
        source, entry = origins[key]
        tokens = family_tokens(source.path, adds_pad=config.adds_pad, config=config.text_config)
        check_vocabulary(str(source.path), entry.shape[0], config, tokens)

    asked = {part for name in fresh for part in ASKED_FRESH[name]}
    for key in [key for key in origins if part_of(key) == "projection" and "projection" in asked]:
        source, entry = origins[key]
        if entry.shape != tuple(wanted[key].shape):
            report.notes.append(f"{entry.key} of {source.path} is for a language model of another width: left out")
            del origins[key]

    may_be_fresh = set(asked)  # parts
    is_whole = any(source.is_whole_model for source in sources)
    if not config.has_qformer and not is_whole:
        may_be_fresh.add("ln_vision")  # it lies in the Q-Former's file: as published, it starts as the identity
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


def _check_shape(plan: Plan, key: str, expected: tuple[int, ...], config: STLLMConfig) -> None:
    """Record a weight as loaded, or as one of a wrong shape where `fill` can't make it fit."""
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
    """Check whether [PAD] may be added: to embeddings and head of a language model that was never ST-LLM's."""
    is_plain = source.format in (Format.CAUSAL_LM, Format.TRANSFORMERS_BLIP)
    return is_plain and key.startswith("language_model.") and key.endswith((".weight", ".bias"))


def fill(model: STLLM, plan: Plan, device: torch.device, division: Division | None = None) -> None:
    """Initialise what no file has, copy every planned weight into place, quantized where its layer is, and tie weights.

    division: as in `assemble`. What no file has is whole, in main memory, until it is divided.
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
            old._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark: leave it as it is
        elif old.is_meta and key not in tied:
            _set_tensor(model, key, torch.empty_like(old, device="cpu" if division else device), loaded=False)
    model.initialize_weights()  # of what is not marked as loaded: fresh parts and computed buffers
    if any("lora_" in key for key in plan.report.keys("fresh")):
        from peft.tuners.lora import LoraLayer

        for module in model.modules():  # peft's own start, no update at first; transformers would draw them like others
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    module.reset_lora_parameters(adapter, init_lora_weights=True)
    if division is not None:
        model.tie_weights()  # so that tied weights are divided as one
        division.begin(model)
    # disable=None: no bar where nobody looks; delay: none for what is quick
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
    """Copy a checkpoint in our format into the same model, in place. Raises UserError for weights that don't fit."""
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
    """Copy the rows of one weight, from `first` on, into a tensor of so many rows.

    shape: of the whole weight in the model, which may differ from the file's; see `_check_shape`.
    """
    if entry.shape == shape:
        source.weights.copy_to(entry.key, new, first)
        return
    tensor = source.weights.read(entry.key)
    if key == POS_EMBED:  # (1, 1+P, C): the class token is kept; without antialiasing, as published
        side = math.isqrt(shape[1] - 1)
        new.copy_(resample_abs_pos_embed(tensor.float(), [side, side], num_prefix_tokens=1, antialias=False))
    else:  # the vocabulary grew: what is added is the mean of what was there
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
