"""The YAML section `run`: its keys are transformers' TrainingArguments and stllm's own RunSettings.

The known names are read from the installed TrainingArguments, which is imported only if there is a section `run`.
Published recipes were written for transformers 4: arguments renamed since then are translated, and removed ones are
accepted with a note. An argument without its effect in stllm is in one of two tables: UNUSED (accepted with a note) or
REFUSED (only one value is accepted).
"""

import dataclasses
import logging
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError, did_you_mean, unknown_name
from stllm.common.logging import ONCE
from stllm.common.schema import RunSettings, Where, checked_values, keys_of, kinds_of, typed

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
# Old boolean argument -> the argument and value that replace it when it is true; when false it is dropped.
SWITCHES = {"adafactor": ("optim", "adafactor"), "group_by_length": ("train_sampling_strategy", "group_by_length")}
# LAVIS's name -> transformers' name, only for a hint in the error: the two may differ in meaning.
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
_EVALUATION = "validation has a fixed procedure (docs/training.md)"
_HUB = "nothing is uploaded"
_IN_ORDER = "batches are always full and in the order of the seed"
# Key -> why it has no effect here. Such a key is accepted with a note; ignoring it does not change what is learned.
UNUSED = {
    "model_max_length": "lengths come from model.max_txt_len",
    "logging_dir": "logs go under output_dir",
    "overwrite_output_dir": "a run continues or refuses, it never overwrites",
    "save_safetensors": "weights are always saved as safetensors",
    **dict.fromkeys(("fp16_backend", "fp16_opt_level", "half_precision_backend", "jit_mode_eval"), _DROPPED),
    **dict.fromkeys(("include_tokens_per_second", "mp_parameters", "past_index", "ray_scope"), _DROPPED),
    **dict.fromkeys(("torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_ipex", "use_mps_device"), _DROPPED),
    **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), _EVALUATION),
    "eval_accumulation_steps": _EVALUATION,
    **dict.fromkeys(("include_for_metrics", "include_inputs_for_metrics", "batch_eval_metrics"), _EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "do_eval", "do_predict", "label_names"), _EVALUATION),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision", "push_to_hub_organization"), _HUB),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_in_order", "length_column_name"), _IN_ORDER),
    "do_train": "`stllm train` always trains",
    "remove_unused_columns": "a batch always keeps all of its fields",
    "use_cache": "training never uses a key-value cache",
    "auto_find_batch_size": "the batch size stays as given",
    "logging_nan_inf_filter": "a loss that is NaN or infinite stops the run",
    "include_num_input_tokens_seen": "tokens are not counted; log.jsonl has the visual tokens a clip",
    "skip_memory_metrics": "log.jsonl has the peak memory",
    "save_on_each_node": "only the main process saves",
    "enable_jit_checkpoint": "a run that is asked to stop always writes a checkpoint",
    "restore_callback_states_from_checkpoint": "no callback has a state",
    "local_rank": "the launcher (torchrun) decides",
    **{f.name: f.metadata["unused"] for f in dataclasses.fields(RunSettings) if "unused" in f.metadata},
}
# Key -> the only accepted value, and why. Other values would change what is learned, or need an unsupported feature.
REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0, "the loss is computed without label smoothing"),
    "neftune_noise_alpha": (None, "noise on the embeddings is not supported: it would enter the MVM teacher, too"),
    "average_tokens_across_devices": (True, "the loss does not depend on the number of processes"),
    "train_sampling_strategy": ("random", "all processes take each batch from one data set, in the order of the seed"),
    "debug": (None, "transformers' check for overflow can't read a batch's masks; a loss that is NaN stops the run"),
    "push_to_hub": (False, "training uploads nothing; upload the finished folder with `hf upload NAME DIR`"),
    "optim_target_modules": (None, "optimizers that choose among the layers (GaLore, APOLLO) are not supported"),
    "accelerator_config": (None, "batches are divided here; use run.gradient_accumulation_steps to accumulate"),
    "parallelism_config": (None, "tensor and context parallelism are not supported; use run.fsdp or run.deepspeed"),
}
# Limits of values, as in schema's `_key`; besides, above: an exclusive lower limit; steps: a whole number of steps, or
# a share of all steps if below 1.
RUN_VALUES: dict[str, dict[str, Any]] = {
    key: about
    for about, keys in (
        ({"low": 1}, ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")),
        ({"low": 1}, ("dataloader_prefetch_factor",)),
        ({"low": 0}, ("eval_delay",)),
        ({"low": 1}, ("ddp_bucket_cap_mb", "torch_empty_cache_steps", "every_n_layers")),
        ({"low": 0}, ("dataloader_num_workers", "save_total_limit", "learning_rate", "weight_decay")),
        ({"low": 0}, ("max_grad_norm", "adam_epsilon")),
        ({"low": 0, "high": 1}, ("adam_beta1", "adam_beta2")),
        ({"low": 0, "high": 2**32 - 1}, ("seed", "data_seed")),
        ({"low": 1, "high": 10**9}, ("ddp_timeout",)),  # seconds
        ({"above": 0}, ("num_train_epochs",)),
        ({"above": 0, "steps": True}, ("save_steps", "logging_steps", "eval_steps")),
        ({"low": 0, "steps": True}, ("warmup_steps",)),
    )
    for key in keys
}
# Key of `run` that holds a mapping -> the types of that mapping's keys, which transformers does not check. The keys of
# `fsdp_config` may begin with `fsdp_`.
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
    "liger_kernel_config": dict.fromkeys(
        (
            *("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared"),
            *("cross_entropy", "fused_linear_cross_entropy"),
        ),
        bool,
    ),
}
# Key of `run` -> other keys, of which at least one must be set for it to have an effect.
SWITCHED_BY = {
    "fsdp_config": ("fsdp",),
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "gradient_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "liger_kernel_config": ("use_liger_kernel",),
}
DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"  # configurations in this repository


def translate_run(given: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a layer's `run` section with current names, and without keys that have no effect.

    given: the keys and values. source: the YAML or option that sets them. Raises UserError for an unknown key, and if
    an argument is given by its old and its new name.
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


def run_keys() -> dict[str, Any]:
    """Return the keys that `run` may have with their types: installed TrainingArguments' and RunSettings'."""
    from transformers import TrainingArguments  # only when there is a `run`

    trainer = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    return {**trainer, **typing.get_type_hints(RunSettings)}


def check_run(run: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """Convert and check the values of the merged and resolved `run`, and add the defaults of RunSettings.

    A null value is left out, so that its default applies. where: function that returns the name of the YAML or option
    that sets a dotted key.
    Raises UserError for a value of a wrong type, out of range or not among the allowed ones.
    """
    kinds, values = run_keys(), dict(run)
    if isinstance(values.get("fsdp"), bool):  # transformers annotates it as text, but documents it as true or false
        if values["fsdp"] and len(kinds_of(kinds["fsdp"])) > 1:
            values["fsdp"] = "full_shard auto_wrap"  # in these versions, true would not wrap each layer
        else:
            kinds["fsdp"] = bool
    _, about = keys_of(RunSettings)
    result = {name: ours["default"] for name, ours in about.items() if "unused" not in ours}
    checked = checked_values(values, kinds, {**RUN_VALUES, **about}, "run", where, finite=True)
    result |= {key: value for key, value in checked.items() if value is not None}
    for key, switches in SWITCHED_BY.items():
        given: Any = result.get(key)
        if isinstance(given, dict):
            plain = {str(name): str(name).removeprefix("fsdp_") for name in given}
            for name in plain:
                if plain[name] not in SUBKEYS[key]:
                    unknown = unknown_name(f"key of run.{key}", name, SUBKEYS[key])
                    raise UserError(f"{where(f'run.{key}.{name}')}: {unknown}")
            kinds = {name: SUBKEYS[key][short] for name, short in plain.items()}
            result[key] = checked_values(given, kinds, RUN_VALUES, f"run.{key}", where, finite=True)
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
