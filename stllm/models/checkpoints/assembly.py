"""A model built on the meta device and filled weight by weight: no copy of the whole is ever held twice.

First a plan from names and shapes alone (which tensor of which file goes where; the audit), then the copying, straight
to the device and type of the model; what no file gives and may start fresh is initialised last.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from tqdm import tqdm

from stllm.common.device import out_of_memory, resolve_device, resolve_dtype
from stllm.common.errors import UserError
from stllm.models.checkpoints import contradictions
from stllm.models.checkpoints.audit import OTHER, AuditReport, part_of, part_of_theirs
from stllm.models.checkpoints.deciding import family_tokens, merged_shapes, names_of
from stllm.models.checkpoints.formats import Entry, Format, Source
from stllm.models.checkpoints.keys import check_zero
from stllm.models.configuration import STLLMConfig
from stllm.models.st_llm import STLLM

LAYER = re.compile(r"[a-z_.]+\.\d+(?=\.)")  # the outermost numbered module of a key
POS_EMBED = "vision_encoder.backbone.pos_embed"
FRESH_PARTS = ("temporal adapter", "video input", "mvm decoder")  # what training may start without
# model.fresh: what training may start without when the user says so
ASKED_FRESH = {
    "vision_encoder": ("vision encoder", "ln_vision"),
    "qformer": ("qformer",),
    "projection": ("projection",),
    "language_model": ("language model",),
}
GIVES_PROJECTION = {Format.STLLM, Format.RELEASED, Format.INSTRUCTBLIP, Format.MINIGPT4}


@dataclass
class Plan:
    """Where each of the model's tensors comes from; `report` says what became of the rest."""

    report: AuditReport
    origins: dict[str, tuple[Source, Entry]] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)


def assemble(
    config: STLLMConfig,
    sources: Sequence[Source],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    training: bool = False,
    fresh: Sequence[str] = (),
    trained_dtype: torch.dtype | None = None,
    with_language_model: bool = True,
) -> tuple[STLLM, AuditReport]:
    """The filled model in evaluation mode, and its audit.

    training: allow fresh parts, see `factory.build_model`; fresh: further ones, names of `ASKED_FRESH`.
    trained_dtype: the type of what trains, where it is another than the rest's (float32 masters).
    with_language_model: False: it is audited, but neither read nor held; enough for all that comes before it.
    Raises UserError: what the configuration needs is missing or of another size, a contradiction, no memory.
    """
    place = resolve_device(device) if isinstance(device, str) else device
    kind = resolve_dtype(dtype, place) if isinstance(dtype, str) else dtype
    model = meta_model(config, kind)
    if trained_dtype is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained_dtype)
    plan = make_plan(model, sources, training=training, fresh=fresh)
    plan.report.raise_for_problems()
    if not with_language_model:
        _leave_out_language_model(model, plan)
    try:
        fill(model, plan, place)
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()) / 2**30
        raise UserError(
            f"not enough memory on {place}: the weights need {size:.1f} GiB as {str(kind).removeprefix('torch.')}; "
            "use a smaller type (--dtype bfloat16), quantized loading, or another --device"
        ) from error
    return model.eval(), plan.report


def meta_model(config: STLLMConfig, dtype: torch.dtype) -> STLLM:
    """The model without memory for its weights. Raises UserError for sizes that don't fit each other."""
    try:
        with _default_dtype(dtype), torch.device("meta"):
            model = STLLM(config)
    except (ValueError, AssertionError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the configuration's sizes don't make a model ({error}): correct them") from error
    config.dtype = dtype
    return model


def _leave_out_language_model(model: STLLM, plan: Plan) -> None:
    model.language_model = nn.Identity()
    model.all_tied_weights_keys = {}
    plan.origins = {key: origin for key, origin in plan.origins.items() if not key.startswith("language_model.")}
    plan.fresh = {key for key in plan.fresh if not key.startswith("language_model.")}


def config_of(model: STLLM) -> STLLMConfig:
    """The model's configuration under its own type, which transformers' annotations don't keep."""
    assert isinstance(model.config, STLLMConfig)
    return model.config


def make_plan(model: STLLM, sources: Sequence[Source], *, training: bool = False, fresh: Sequence[str] = ()) -> Plan:
    """Matches the sources' weights, later ones over earlier ones, with the model's; training, fresh: as in `assemble`.

    Raises UserError for what does not belong together, see contradictions.py.
    """
    config = config_of(model)
    name = names_of(sources) or "the model"
    contradictions.check_adapter(name, merged_shapes(sources), config, fresh_allowed=training)
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    plan = Plan(AuditReport(source=name))
    plain = {key.replace(".base_layer.", "."): key for key in wanted}  # LoRA wraps the layers that it adapts
    for source in sources:
        for key, entry in source.entries.items():
            if plain.get(key, key) in wanted:
                plan.origins[plain.get(key, key)] = (source, entry)
            elif key not in wanted:
                plan.report.add("unexpected", part_of(key), entry.key)
        for key in source.ignored_keys():
            plan.report.add("ignored", part_of_theirs(key), key)
        for key in source.unknown_keys():
            plan.report.add("unexpected", part_of_theirs(key) if source.is_whole_model else OTHER, key)
    for layer in _surplus_layers(wanted, sources):
        plan.report.add("wrong_shape", part_of(layer), f"{layer}: found, but the configuration has fewer layers")
    _swap_tied(model, plan)
    _check_vocabulary(model, plan)
    tied = set(model.all_tied_weights_keys)
    asked = {part for name in fresh for part in ASKED_FRESH[name]}
    for key, tensor in wanted.items():
        if key in plan.origins:
            _check_shape(plan, key, tensor, config)
        elif key not in tied:
            may = part_of(key) in asked or _may_be_fresh(key, sources, config, training)
            state = "fresh" if may else "missing"
            plan.report.add(state, part_of(key), key)
            if state == "fresh":
                plan.fresh.add(key)
    return plan


def fill(model: STLLM, plan: Plan, device: torch.device) -> None:
    """Copies every planned weight into place, then initialises the rest and ties what is tied."""
    total = sum(model.get_parameter_or_buffer(key).nbytes for key in plan.origins)
    # disable=None: no bar where nobody looks; delay: none for what is quick
    with tqdm(
        desc="loading weights", total=total, unit="B", unit_scale=True, disable=None, delay=1, leave=False
    ) as bar:
        for source, keys in _in_file_order(plan):
            for key in keys:
                entry = plan.origins[key][1]
                old = model.get_parameter_or_buffer(key)
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                _copy(source, entry, key, new)
                _set_tensor(model, key, new, loaded=True)
                bar.update(new.nbytes)
            _check_zero_parts(source, {plan.origins[key][1].key for key in keys})
    tied = set(model.all_tied_weights_keys)
    for key, old in [*model.named_parameters(), *model.named_buffers()]:
        if old.is_meta and key not in tied:
            _set_tensor(model, key, torch.empty_like(old, device=device), loaded=False)
    model.initialize_weights()  # of what is not marked as loaded: fresh parts and computed buffers
    _initialize_lora(model, plan)
    if tied:
        model.tie_weights()
    left = [key for key, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not left, f"weights without memory: {left[:5]}"


def _copy(source: Source, entry: Entry, key: str, new: Tensor) -> None:
    """One weight into its new home. new: of the model's shape, which may differ from the file's, see `_check_shape`."""
    if entry.target.num_parts == 1 and entry.shape == tuple(new.shape):
        source.weights.copy_to(entry.key, new)
        return
    tensor = entry.target.take(source.weights.read(entry.key))
    if tensor.shape == new.shape:
        new.copy_(tensor)
    elif key == POS_EMBED:
        new.copy_(_resample(tensor.float(), new.shape[1] - 1))
    else:  # the vocabulary grew: what is added is the mean of what was there
        rows = len(tensor)
        new[:rows].copy_(tensor)
        new[rows:] = tensor.float().mean(dim=0).to(new.dtype)


def _resample(pos_embed: Tensor, num_patches: int) -> Tensor:
    """(1, 1+P, C) to another square number of patches, the class token kept; without antialiasing, as published."""
    side = int(num_patches**0.5)
    return resample_abs_pos_embed(pos_embed, [side, side], num_prefix_tokens=1, antialias=False)


def _check_shape(plan: Plan, key: str, tensor: Tensor, config: STLLMConfig) -> None:
    source, entry = plan.origins[key]
    found, expected = entry.shape, tuple(tensor.shape)
    if found == expected:
        pass
    elif key == POS_EMBED and found[2] == expected[2] and _is_square(found[1] - 1) and _is_square(expected[1] - 1):
        size = config.vision_config["patch_size"] * int((found[1] - 1) ** 0.5)
        plan.report.notes.append(
            f"position embeddings are interpolated from image size {size} to {config.vision_config['image_size']}"
        )
    elif _grows(key, source) and found[1:] == expected[1:] and found[0] < expected[0]:
        plan.report.notes.append(f"{key} grows from {found[0]} to {expected[0]} rows: the added [PAD] is their mean")
    else:
        plan.report.add("wrong_shape", part_of(key), f"{entry.key}: found {found}, expected {expected}")
        return
    plan.report.add("loaded", part_of(key), key)


def _grows(key: str, source: Source) -> bool:
    """Whether [PAD] may be added: to the embeddings or the head of a language model that never was ST-LLM's."""
    return (
        source.format in (Format.CAUSAL_LM, Format.TRANSFORMERS_BLIP)
        and key.startswith("language_model.")
        and key.endswith((".weight", ".bias"))
    )


def _check_vocabulary(model: STLLM, plan: Plan) -> None:
    embedding = model.get_input_embeddings().weight
    key = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    if key not in plan.origins:
        return
    source, entry = plan.origins[key]
    if _grows(key, source):  # its rows are counted in `decide_config`
        return
    adds_pad = model.config.template == "instructblip"
    tokens = family_tokens(source.path, adds_pad=adds_pad, config=model.config.text_config)
    contradictions.check_vocabulary(str(source.path), entry.shape[0], config_of(model), tokens)


def _may_be_fresh(key: str, sources: Sequence[Source], config: STLLMConfig, training: bool) -> bool:
    if part_of(key) == "ln_vision" and not config.has_qformer and not any(source.is_whole_model for source in sources):
        return True  # it lies in the Q-Former's file: as published, it starts as the identity without one
    if not training:
        return False
    if not sources or part_of(key) in FRESH_PARTS or "lora_" in key:
        return True
    given = any(
        source.format in GIVES_PROJECTION or (source.format is Format.TRANSFORMERS_BLIP and source.is_whole_model)
        for source in sources
    )
    return part_of(key) == "projection" and not given


def _surplus_layers(wanted: Mapping[str, Tensor], sources: Sequence[Source]) -> list[str]:
    """Layers of the weights beyond the last one of the model, as `language_model.model.layers.32`."""
    kept = {match[0] for key in wanted if (match := LAYER.match(key))}
    found = {match[0] for source in sources for key in source.entries if (match := LAYER.match(key))}
    stacks = {layer.rpartition(".")[0] for layer in kept}
    return sorted(layer for layer in found - kept if layer.rpartition(".")[0] in stacks)


def _swap_tied(model: STLLM, plan: Plan) -> None:
    """Of two tied weights only the one that the other is tied to is filled, whichever the file has."""
    for target, origin in model.all_tied_weights_keys.items():
        if target in plan.origins:
            found = plan.origins.pop(target)
            plan.origins.setdefault(origin, found)


def _in_file_order(plan: Plan) -> Iterator[tuple[Source, list[str]]]:
    sources = {id(source): source for source, _ in plan.origins.values()}
    for source in sources.values():
        place = {key: number for number, key in enumerate(source.weights.specs)}
        keys = [key for key, (owner, _) in plan.origins.items() if owner is source]
        yield source, sorted(keys, key=lambda key: place[plan.origins[key][1].key])


def _check_zero_parts(source: Source, used: set[str]) -> None:
    for key in used:
        for target in source.table.targets(key):
            if target.key is None:
                try:
                    check_zero(key, target.take(source.weights.read(key)))
                except ValueError as error:
                    raise UserError(f"{source.path}: {error}") from error


def _set_tensor(model: STLLM, key: str, tensor: Tensor, *, loaded: bool) -> None:
    parent_name, _, name = key.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    new._is_hf_initialized = loaded  # type: ignore[attr-defined]  # transformers' own mark: leave it as it is
    setattr(parent, name, new)


def _initialize_lora(model: STLLM, plan: Plan) -> None:
    """peft's own start for fresh LoRA weights (no update at first); transformers would draw them like any other."""
    if not any("lora_" in key for key in plan.fresh):
        return
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                module.reset_lora_parameters(adapter, init_lora_weights=True)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_square(count: int) -> bool:
    return int(count**0.5) ** 2 == count
