"""A model built on the meta device and filled weight by weight: no copy of the whole is ever held twice.

First the plan (planning.py) and its audit, then the copying, straight to the device and type of the model; what no file
gives and may start fresh is initialised last.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from tqdm import tqdm

from stllm.common.device import out_of_memory, resolve_device, resolve_dtype
from stllm.common.errors import UserError
from stllm.common.registry import models
from stllm.models.checkpoints.audit import MAX_NAMED, AuditReport
from stllm.models.checkpoints.formats import Entry, Source, open_source
from stllm.models.checkpoints.keys import check_zero
from stllm.models.checkpoints.planning import POS_EMBED, Plan, make_plan
from stllm.models.configuration import CONFIG_ERRORS, STLLMConfig, reason
from stllm.models.st_llm import STLLM


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
            model: STLLM = models.get(config.arch)(config)
    except (*CONFIG_ERRORS, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the configuration's sizes don't make a model ({reason(error)}): correct them") from error
    config.dtype = dtype
    return model


def _leave_out_language_model(model: STLLM, plan: Plan) -> None:
    model.language_model = nn.Identity()
    model.all_tied_weights_keys = {}
    plan.origins = {key: origin for key, origin in plan.origins.items() if not key.startswith("language_model.")}
    plan.fresh = {key for key in plan.fresh if not key.startswith("language_model.")}


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


@torch.no_grad()
def restore(model: STLLM, folder: Path) -> None:
    """Copies a checkpoint in our format into the same model, in place. Raises UserError for weights that don't fit."""
    plan = make_plan(model, [open_source(folder)])
    if lacking := [*plan.report.keys("missing"), *plan.report.keys("wrong_shape")]:
        more = f" and {len(lacking) - MAX_NAMED} more" if len(lacking) > MAX_NAMED else ""
        raise UserError(
            f"{folder} does not hold all of the model's weights: {', '.join(lacking[:MAX_NAMED])}{more} are missing or "
            "of another size; remove this folder to continue from the checkpoint before it, or name another one with "
            "run.resume_from_checkpoint"
        )
    for source, keys in _in_file_order(plan):
        for key in keys:
            _copy(source, plan.origins[key][1], key, model.get_parameter_or_buffer(key))


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
