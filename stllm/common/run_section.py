"""The keys of `run`: transformers' TrainingArguments, whatever its version calls them, and ours (RunSettings).

Published recipes were written for transformers 4: arguments renamed since are translated, dropped ones accepted with
a note. Which names exist is read from the installed TrainingArguments, imported only when a `run` is there.
"""

import dataclasses
import logging
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode, ValidationError

from stllm.common.errors import UserError, did_you_mean, unknown_name
from stllm.common.logging import ONCE
from stllm.common.schema import RunSettings, field_fault

log = logging.getLogger(__name__)

# Old name -> new name. Applied only where the installed transformers lacks the old one.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "warmup_ratio": "warmup_steps",  # below 1, warmup_steps is a share of all steps
}
# Old switch -> what it says today when it is on; when it is off it says nothing.
SWITCHES = {"adafactor": ("optim", "adafactor"), "group_by_length": ("train_sampling_strategy", "group_by_length")}
# LAVIS's name -> today's, for the hint alone: what it meant there need not be what it means here.
LAVIS = {
    "accum_grad_iters": "gradient_accumulation_steps",
    "amp": "fp16",
    "batch_size_eval": "per_device_eval_batch_size",
    "batch_size_train": "per_device_train_batch_size",
    "init_lr": "learning_rate",
    "lr_sched": "lr_scheduler_type",
    "max_epoch": "num_train_epochs",
    "num_workers": "dataloader_num_workers",
    "resume_ckpt_path": "resume_from_checkpoint",
}
_DROPPED = "the installed transformers has no such argument"
# Accepted without an effect, and why.
UNUSED = {
    "model_max_length": "lengths come from model.max_txt_len",
    "logging_dir": "logs go under output_dir",
    "overwrite_output_dir": "a run continues or refuses, it never overwrites",
    "save_safetensors": "weights are always saved as safetensors",
    **dict.fromkeys(("fp16_backend", "fp16_opt_level", "half_precision_backend", "jit_mode_eval"), _DROPPED),
    **dict.fromkeys(("include_tokens_per_second", "mp_parameters", "past_index", "ray_scope"), _DROPPED),
    **dict.fromkeys(("torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_ipex", "use_mps_device"), _DROPPED),
    **{f.name: f.metadata["unused"] for f in dataclasses.fields(RunSettings) if "unused" in f.metadata},
}
# Of `fsdp_config`, which transformers does not check; each may begin with `fsdp_`.
FSDP_KEYS = (
    *("version", "reshard_after_forward", "cpu_offload", "activation_checkpointing", "cpu_ram_efficient_loading"),
    *("state_dict_type", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"),
    *("forward_prefetch", "backward_prefetch", "limit_all_gathers", "use_orig_params", "sync_module_states"),
    *("xla", "xla_fsdp_v2", "xla_fsdp_settings", "xla_fsdp_grad_ckpt"),
)
DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"  # of this repository
_NODES: dict[Any, tuple[Callable[..., Any], str]] = {
    bool: (BooleanNode, "true or false"),
    int: (IntegerNode, "a whole number"),
    float: (FloatNode, "a number"),
    str: (StringNode, "text"),
}


def translate_run(given: dict[str, Any], source: str) -> dict[str, Any]:
    """One layer's `run` in today's names: renamed keys renamed, keys without an effect left out with a note.

    source: the file the layer comes from, for messages.
    Raises UserError for an unknown key, and for an old and a new name of one argument side by side.
    """
    known = run_keys()
    result: dict[str, Any] = {}
    for key, value in given.items():
        new, new_value = key, value
        unused = UNUSED.get(key) if key in _OURS or key not in known else None
        if (key, value) == ("tf32", False):
            unused = "it is off unless it is asked for"
        if unused is not None:
            log.info("%s: run.%s has no effect: %s", source, key, unused, extra=ONCE)
            continue
        if key not in known and key in SWITCHES:
            if not value:
                continue
            new, new_value = SWITCHES[key]
        elif key not in known and key in RENAMED:
            new = RENAMED[key]
            if key == "warmup_ratio" and isinstance(value, (int, float)) and not 0 <= value < 1:
                raise UserError(f"{source}: 'run.warmup_ratio' must be at least 0 and below 1, found {value!r}")
        if new not in known:
            names = [*known, *RENAMED, *SWITCHES, *UNUSED]
            hint = f"; did you mean {LAVIS[key]!r}?" if key in LAVIS else did_you_mean(key, names)
            raise UserError(f"{source}: unknown key 'run.{key}'{hint}")
        if new != key and new in given:
            raise UserError(f"{source}: 'run.{key}' is the old name of 'run.{new}' and both are given: keep one")
        # unquoted `no` is false in YAML, and the strategies' "no" is often written so
        result[new] = "no" if new.endswith("_strategy") and new_value is False else new_value
    return result


def check_run(run: dict[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """The merged and resolved `run` with our defaults under it, its values checked and converted.

    where: tells which file a dotted key stands in. Text that stands for a number or a switch (as `${oc.env:NAME}`
    gives it) is converted. Raises UserError for a value of a wrong type or outside an enumeration.
    """
    known = run_keys()
    ours = [f for f in dataclasses.fields(RunSettings) if "unused" not in f.metadata]
    result = {f.name: f.default for f in ours}
    for key, value in run.items():
        result[key] = typed(value, known[key], f"run.{key}", where)
    for f in ours:
        fault = field_fault(f, result[f.name], f"run.{f.name}")
        if fault:
            raise UserError(f"{where('run.' + f.name)}: {fault}")
    _check_fsdp_config(result.get("fsdp_config"), where)
    deepspeed: Any = result.get("deepspeed")
    if isinstance(deepspeed, str):
        result["deepspeed"] = _deepspeed_file(deepspeed, where("run.deepspeed"))
    return result


def run_keys() -> dict[str, Any]:
    """The keys that `run` may have -> their types: the installed TrainingArguments' and ours."""
    from transformers import TrainingArguments

    trainer = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    return {**trainer, **_OURS}


_OURS = typing.get_type_hints(RunSettings)


def expected(annotation: Any) -> str | None:
    """In words, what a simple type takes ("a whole number"); None for any other type."""
    kind = _simple(annotation)
    return None if kind is None else _NODES[kind][1]


def _check_fsdp_config(given: Any, where: Callable[[str], str]) -> None:
    for name in given if isinstance(given, dict) else ():
        if str(name).removeprefix("fsdp_") not in FSDP_KEYS:
            key = f"run.fsdp_config.{name}"
            raise UserError(f"{where(key)}: {unknown_name('key of run.fsdp_config', str(name), FSDP_KEYS)}")


def _deepspeed_file(path: str, source: str) -> str:
    """The file itself, or ours of the same name: published recipes say stllm/train/zero2.json, which is not here."""
    ours = DEEPSPEED / Path(path).name
    if Path(path).is_absolute() or Path(path).exists() or not ours.is_file():
        return path
    log.info("%s: run.deepspeed: %s is not here, %s is taken", source, path, ours, extra=ONCE)
    return str(ours)


def typed(value: Any, annotation: Any, key: str, where: Callable[[str], str]) -> Any:
    """The value converted to the type, where that is a simple one; UserError, naming the key, when it cannot be."""
    if key == "run.fsdp" and isinstance(value, bool):  # text by its annotation, a switch by its documentation
        # where it is a list of words yet, the switch would not wrap layer by layer
        return value if _simple(annotation) or not value else "full_shard auto_wrap"
    kind = _simple(annotation)
    if kind is None or value is None:
        return value
    node, words = _NODES[kind]
    try:
        converted = node(value)._value()
    except ValidationError:
        raise UserError(f"{where(key)}: '{key}' must be {words}, found {value!r}") from None
    # a whole number stays one where a fraction is allowed: 100 warm-up steps are not 100.0
    return value if kind is float and isinstance(value, int) else converted


def _simple(annotation: Any) -> type | None:
    """bool, int, float or str when the annotation is that, or that or None."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] if union else [annotation]
    return kinds[0] if len(kinds) == 1 and kinds[0] in _NODES else None
