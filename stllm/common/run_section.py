"""The keys of `run`: transformers' TrainingArguments, whatever its version calls them, and ours (RunSettings).

Published recipes were written for transformers 4: arguments renamed since are translated, dropped ones accepted with
a note. Which names exist is read from the installed TrainingArguments, imported only when a `run` is there. Each of
them is in exactly one of three tables: HONOURED, UNUSED (accepted with a note) and REFUSED (one value is accepted).
"""

import dataclasses
import logging
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError, did_you_mean, unknown_name
from stllm.common.logging import ONCE
from stllm.common.schema import RunSettings, field_fault, kinds_of, typed

log = logging.getLogger(__name__)

# Old name -> new name. Applied only where the installed transformers lacks the old one.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "mm_projector_lr": "projection_lr",
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
# Arguments of TrainingArguments that our training follows.
HONOURED = {
    *("output_dir", "seed", "data_seed", "full_determinism", "use_cpu", "resume_from_checkpoint", "ignore_data_skip"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
    *("logging_strategy", "logging_steps", "logging_first_step", "disable_tqdm"),
    *("log_level", "log_level_replica", "log_on_each_node"),  # of transformers' own messages
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed"),
}
_DROPPED = "the installed transformers has no such argument"
_EVALUATION = "training does not evaluate; use `stllm evaluate`"
_HUB = "nothing is uploaded"
_IN_ORDER = "batches are always full and in the order of the seed"
# Accepted without an effect, and why. None of these changes what is learned.
UNUSED = {
    "model_max_length": "lengths come from model.max_txt_len",
    "logging_dir": "logs go under output_dir",
    "overwrite_output_dir": "a run continues or refuses, it never overwrites",
    "save_safetensors": "weights are always saved as safetensors",
    **dict.fromkeys(("fp16_backend", "fp16_opt_level", "half_precision_backend", "jit_mode_eval"), _DROPPED),
    **dict.fromkeys(("include_tokens_per_second", "mp_parameters", "past_index", "ray_scope"), _DROPPED),
    **dict.fromkeys(("torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_ipex", "use_mps_device"), _DROPPED),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_steps", "eval_delay", "prediction_loss_only"), _EVALUATION),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _EVALUATION),
    **dict.fromkeys(("include_for_metrics", "include_inputs_for_metrics", "batch_eval_metrics"), _EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "do_eval", "do_predict", "label_names"), _EVALUATION),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), _EVALUATION),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision", "push_to_hub_organization"), _HUB),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_in_order", "length_column_name"), _IN_ORDER),
    "do_train": "`stllm train` always trains",
    "remove_unused_columns": "a batch always keeps all of its fields",
    "use_cache": "training never uses a key-value cache",
    "auto_find_batch_size": "the batch size stays as given",
    "use_liger_kernel": "Liger kernels are not supported",
    "liger_kernel_config": "Liger kernels are not supported",
    "logging_nan_inf_filter": "a loss that is NaN or infinite stops the run",
    "include_num_input_tokens_seen": "tokens are not counted; log.jsonl has the visual tokens a clip",
    "skip_memory_metrics": "log.jsonl has the peak memory",
    "save_on_each_node": "only the main process saves",
    "enable_jit_checkpoint": "a run that is asked to stop always writes a checkpoint",
    "restore_callback_states_from_checkpoint": "no callback has a state",
    "local_rank": "the launcher (torchrun) decides",
    **{f.name: f.metadata["unused"] for f in dataclasses.fields(RunSettings) if "unused" in f.metadata},
}
# The one value that is accepted, and why. Any other would change what is learned, or asks for what training lacks.
REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0, "the loss is computed without label smoothing"),
    "neftune_noise_alpha": (None, "noise on the embeddings is not supported: it would enter the MVM teacher, too"),
    "average_tokens_across_devices": (True, "the loss does not depend on the number of processes"),
    "train_sampling_strategy": ("random", "all processes take each batch from one data set, in the order of the seed"),
    "load_best_model_at_end": (False, "training does not evaluate, so no checkpoint is known to be the best"),
    "eval_strategy": ("no", _EVALUATION),
    "eval_on_start": (False, _EVALUATION),
    "debug": (None, "transformers' check for overflow can't read a batch's masks; a loss that is NaN stops the run"),
    "push_to_hub": (False, "training uploads nothing; upload the finished folder with `hf upload NAME DIR`"),
    "optim_target_modules": (
        None,
        "optimizers that choose among the model's layers (GaLore, APOLLO) are not supported",
    ),
    "accelerator_config": (None, "batches are divided here; use run.gradient_accumulation_steps to accumulate"),
    "parallelism_config": (None, "tensor and context parallelism are not supported; use run.fsdp or run.deepspeed"),
}
# Lowest and highest value, both allowed; None: no bound.
BOUNDS: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "every_n_layers"), (1, None)),
    "ddp_timeout": (1, 10**9),  # seconds
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "torch_empty_cache_steps"), (1, None)),
    **dict.fromkeys(("dataloader_num_workers", "save_total_limit", "warmup_steps"), (0, None)),
    **dict.fromkeys(("learning_rate", "projection_lr", "weight_decay", "max_grad_norm", "adam_epsilon"), (0, None)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
}
POSITIVE = ("num_train_epochs", "save_steps", "logging_steps")
STEPS = ("warmup_steps", "save_steps", "logging_steps")  # a number of steps, or below 1 a share of all steps
# Mapping -> the types of its keys. transformers does not check these; those of `fsdp_config` may begin with `fsdp_`.
_CHECKPOINTING = {
    **dict.fromkeys(("use_reentrant", "preserve_rng_state", "debug", "early_stop", "offload"), bool),
    "determinism_check": str,
    "every_n_layers": int,
}
SUBKEYS: dict[str, dict[str, Any]] = {
    "fsdp_config": dict.fromkeys(
        (
            *("version", "reshard_after_forward", "cpu_offload", "activation_checkpointing"),
            *("cpu_ram_efficient_loading", "state_dict_type", "auto_wrap_policy", "transformer_layer_cls_to_wrap"),
            *("min_num_params", "forward_prefetch", "backward_prefetch", "limit_all_gathers", "use_orig_params"),
            *("sync_module_states", "xla", "xla_fsdp_v2", "xla_fsdp_settings", "xla_fsdp_grad_ckpt"),
        ),
        Any,
    ),
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
}
# Mapping -> the switches without any of which it has no effect.
SWITCHED_BY = {
    "fsdp_config": ("fsdp",),
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "gradient_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
}
DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"  # of this repository


def translate_run(given: dict[str, Any], source: str) -> dict[str, Any]:
    """One layer's `run` in today's names: renamed keys renamed, keys without an effect left out with a note.

    source: the file the layer comes from, for messages.
    Raises UserError for an unknown key, and for an old and a new name of one argument side by side.
    """
    known = run_keys()
    result: dict[str, Any] = {}
    for key, value in given.items():
        new, new_value = key, value
        if key not in known and key in SWITCHES:
            if not typed(value, bool, f"run.{key}", lambda _: source):
                continue
            new, new_value = SWITCHES[key]
        elif key not in known and key in RENAMED:
            new = RENAMED[key]
            is_open = isinstance(value, str) and "${" in value
            if key == "warmup_ratio" and value is not None and not is_open:
                new_value = typed(value, float, "run.warmup_ratio", lambda _: source)
                if not 0 <= new_value < 1:
                    raise UserError(f"{source}: 'run.warmup_ratio' must be at least 0 and below 1, found {value!r}")
        unused = "it is off unless it is asked for" if (key, value) == ("tf32", False) else UNUSED.get(new)
        if unused is not None:
            log.info("%s: run.%s has no effect: %s", source, key, unused, extra=ONCE)
            continue
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

    A key that is null is left out, so that its default holds. where: gives the file that a dotted key is in. Text that
    spells a number or a switch (as `${oc.env:NAME}` gives it) is converted. Raises UserError for a value of a wrong
    type, out of range or outside an enumeration.
    """
    known = run_keys()
    ours = [f for f in dataclasses.fields(RunSettings) if "unused" not in f.metadata]
    result = {f.name: f.default for f in ours}
    for key, value in run.items():
        if key == "fsdp" and isinstance(value, bool):  # text by its annotation, a switch by its documentation
            words = value and len(kinds_of(known[key])) > 1  # a list of words: the switch would not wrap each layer
            result[key] = "full_shard auto_wrap" if words else value
        elif (value := typed(value, known[key], f"run.{key}", where)) is not None:
            result[key] = value
    for f in ours:
        if fault := field_fault(f, result[f.name], f"run.{f.name}"):
            raise UserError(f"{where('run.' + f.name)}: {fault}")
    for key, value in result.items():
        if fault := _number_fault(key, value):
            raise UserError(f"{where('run.' + key)}: 'run.{key}' must be {fault}, found {value}")
    for key, switches in SWITCHED_BY.items():
        given: Any = result.get(key)
        for name, value in given.items() if isinstance(given, dict) else ():
            plain, dotted = str(name).removeprefix("fsdp_"), f"run.{key}.{name}"
            if plain not in SUBKEYS[key]:
                raise UserError(f"{where(dotted)}: {unknown_name(f'key of run.{key}', str(name), SUBKEYS[key])}")
            given[name] = typed(value, SUBKEYS[key][plain], dotted, where)
            if fault := _number_fault(plain, given[name]):
                raise UserError(f"{where(dotted)}: '{dotted}' must be {fault}, found {value}")
        if given and not any(result.get(switch) for switch in switches):
            log.info("%s: run.%s has no effect without run.%s", where(f"run.{key}"), key, switches[0], extra=ONCE)
    deepspeed: Any = result.get("deepspeed")
    if isinstance(deepspeed, str) and not Path(deepspeed).is_absolute() and not Path(deepspeed).exists():
        shipped = DEEPSPEED / Path(deepspeed).name  # published recipes say stllm/train/zero2.json
        if shipped.is_file():
            source = where("run.deepspeed")
            log.info("%s: run.deepspeed: %s is not here, %s is taken", source, deepspeed, shipped, extra=ONCE)
            result["deepspeed"] = str(shipped)
    return result


def run_keys() -> dict[str, Any]:
    """The keys that `run` may have -> their types: the installed TrainingArguments' and ours."""
    from transformers import TrainingArguments

    trainer = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    return {**trainer, **typing.get_type_hints(RunSettings)}


def _number_fault(key: str, value: Any) -> str | None:
    """Describe the range that a number is outside of; None for a number in its range and for any other value."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    low, high = BOUNDS.get(key, (-math.inf, None))
    if key == "max_steps":
        return None if value == -1 or value >= 1 else "at least 1, or -1 to train for run.num_train_epochs"
    if not math.isfinite(value):
        return "a finite number"
    if value < low or (high is not None and value > high):
        return f"at least {low}" if high is None else f"from {low} to {high}"
    if key in POSITIVE and value <= 0:
        return "above 0"
    if key in STEPS and value > 1 and value != int(value):
        return "a whole number of steps, or below 1 a share of all steps"
    return None
