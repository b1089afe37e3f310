"""Conversion of the section `run` to transformers' TrainingArguments, before any weight is loaded.

Values that transformers would reject later are found here.
"""

import copy
import inspect
import multiprocessing
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from torch import distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode, trainer_log_levels
from transformers.utils import is_liger_kernel_available

from stllm.common.device import DTYPE_ALIASES, resolve_device
from stllm.common.errors import UserError, unknown_name
from stllm.common.files import check_regular
from stllm.common.jsonl import loads
from stllm.common.run_section import REFUSED
from stllm.common.schema import RunSettings

# arguments that users cannot change; run_section.py gives the reasons
FIXED = {"remove_unused_columns": False, "logging_nan_inf_filter": False, "average_tokens_across_devices": True}
# These optimizers need one parameter group per layer; ours are grouped by learning rate and weight decay.
OTHER_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")


def training_arguments(
    run: Mapping[str, Any], *, device: str = "auto", dtype: str = "auto", seed: int | None = None
) -> TrainingArguments:
    """Convert the checked `run` section to TrainingArguments.

    device, dtype, seed: options of the command line, which override the section.
    Raises UserError for a device that does not exist, for values that transformers or our training rejects, and for
    packages that are not installed.
    """
    ours = {f.name for f in fields(RunSettings)}
    values = {key: value for key, value in run.items() if key not in ours and value is not None}
    if not values.get("output_dir"):
        raise UserError("run.output_dir is not set: name the folder that the run writes to")
    if (span := run.get("profile_steps")) is not None and not (len(span) == 2 and 1 <= span[0] <= span[1]):
        raise UserError(f"run.profile_steps must be the first and the last step, such as [10, 12], found {list(span)}")
    _check_values(values)
    values |= FIXED
    if (name := DTYPE_ALIASES.get(dtype, dtype)) != "auto":  # --dtype overrides bf16 and fp16 of the section
        values |= {"bf16": name == "bfloat16", "fp16": name == "float16"}
    if seed is not None:
        values["seed"] = seed
    place = torch.device("cpu") if device == "auto" and values.get("use_cpu") else resolve_device(device)
    if ":" in device and ("LOCAL_RANK" in os.environ or values.get("deepspeed")):
        raise UserError(
            f"found device {device!r}, but torchrun and DeepSpeed give each process its own GPU: leave out --device "
            "and --gpu-id, and choose GPUs with the environment variable CUDA_VISIBLE_DEVICES"
        )
    values["use_cpu"] = place.type == "cpu"
    for key in {"adam_beta1", "adam_beta2"} & values.keys():
        values[key] = float(values[key])  # torch refuses 0 beside 0.999
    if "LOCAL_RANK" not in os.environ:
        values.pop("ddp_backend", None)  # otherwise accelerate would wait for other processes
    values.setdefault("report_to", "none")
    values.setdefault("disable_tqdm", False)
    if size := values.get("per_device_train_batch_size"):
        values.setdefault("per_device_eval_batch_size", size)
    values.setdefault("dataloader_persistent_workers", bool(values.get("dataloader_num_workers")))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", os.path.join(values["output_dir"], "tensorboard"))
    try:
        args = TrainingArguments(**values)
        _try_optimizer(args)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise UserError(f"the run section can't be used: {' '.join(str(error).split())}") from error
    args._n_gpu = min(args.n_gpu, 1)  # torchrun starts a process for each GPU; torch.nn.DataParallel is never used
    if place.type == "cuda" and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(place)  # transformers itself takes the first GPU
        args._setup_devices = place  # a cached property
    if args.use_liger_kernel and place.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("run.use_liger_kernel needs a GPU, and this run is on the CPU: leave it out")
    if args.fp16 and place.type == "cpu":
        raise UserError("run.fp16 needs a GPU, and this run is on the CPU: use run.bf16=True, or neither")
    # unset until the model is built: otherwise transformers would divide the model itself; see sharding.py
    unset_hf_deepspeed_config()
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if args.deepspeed and args.hf_deepspeed_config.is_zero3() and not args.hf_deepspeed_config.is_true(gather):
        raise UserError(f"run.deepspeed: under ZeRO-3 {gather} must be true: else the trained model cannot be written")
    if args.fsdp and args.deepspeed:
        raise UserError("run.fsdp and run.deepspeed are both set: keep one of them")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError("run.fsdp divides a model among processes: start several with torchrun, or leave run.fsdp out")
    return args


def half_precision(args: TrainingArguments) -> torch.dtype | None:
    """Return the dtype of the computation if it is bfloat16 or float16, else None (float32)."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _check_values(values: Mapping[str, Any]) -> None:
    """Raise UserError for values that training rejects, and for missing files and packages."""
    for key, (accepted, reason) in REFUSED.items():
        if key in values and values[key] != accepted and not (accepted is None and values[key] == ""):
            raise UserError(
                f"run.{key} must be {'unset' if accepted is None else accepted}, found {values[key]!r}: {reason}"
            )
    if values.get("save_strategy") == "best":
        raise UserError(
            "run.save_strategy must be steps, epoch or no, found 'best': run.load_best_model_at_end=True keeps the "
            "best checkpoint and ends with it"
        )
    if str(values.get("optim")).startswith(OTHER_OPTIMIZERS):
        raise UserError(
            f"run.optim {values['optim']!r} is not supported, as it needs its own parameter groups: use "
            "adamw_torch, adafactor or a bitsandbytes optimizer such as adamw_bnb_8bit"
        )
    choices: dict[str, Iterable[str]] = {
        "dataloader_multiprocessing_context": multiprocessing.get_all_start_methods(),
        "ddp_backend": [name for name in dist.Backend.backend_list if name != dist.Backend.UNDEFINED],
        "log_level": trainer_log_levels,
        "log_level_replica": trainer_log_levels,
        "torch_compile_backend": [backend.value.lower() for backend in DynamoBackend],
        "torch_compile_mode": torch._inductor.list_mode_options(),
    }
    for key, known in choices.items():
        if key in values and values[key] not in known:
            raise UserError(unknown_name(f"run.{key}", str(values[key]), known))
    named = values.get("report_to") or []
    for tracker in [named] if isinstance(named, str) else named:
        if tracker not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            raise UserError(unknown_name("run.report_to", str(tracker), (*INTEGRATION_TO_CALLBACK, "all", "none")))
        # transformers never lists flyte as available
        if tracker not in (*get_available_reporting_integrations(), "all", "none", "flyte"):
            raise UserError(f"run.report_to names {tracker}, which is not installed: `pip install {tracker}`")
    if values.get("use_liger_kernel") and not is_liger_kernel_available():
        raise UserError(
            "run.use_liger_kernel is True, but Liger is not installed: `pip install 'stllm[liger]'`, or leave it out"
        )
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        raise UserError(
            "run.deepspeed is set, but DeepSpeed is not installed: `pip install 'stllm[deepspeed]'`, or train without "
            "it (--options run.deepspeed=null)"
        )
    for key in ("deepspeed", "fsdp_config"):
        if isinstance(path := values.get(key), str):
            check_regular(path, f"a JSON file for run.{key}")
            try:
                found = loads(Path(path).read_text(encoding="utf-8"))
            except OSError as error:
                raise UserError(f"run.{key}: {path} cannot be read ({error.strerror}): name a JSON file") from error
            except ValueError as error:
                raise UserError(f"run.{key}: {path} is not valid JSON ({error})") from error
            if not isinstance(found, dict):
                raise UserError(f"run.{key}: {path} must hold a JSON object, found {type(found).__name__}")


def _try_optimizer(args: TrainingArguments) -> None:
    """Build the optimizer and the schedule for one parameter, so that errors appear before training."""
    if args.optim_args and not all(part.count("=") == 1 for part in args.optim_args.split(",")):
        raise UserError(f"run.optim_args must be key=value pairs with commas between them, found {args.optim_args!r}")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    if args.optim_args:
        plain = copy.copy(args)
        plain.optim_args = None
        if Trainer.get_optimizer_cls_and_kwargs(plain) == (kind, options):
            name = OptimizerNames(args.optim).value
            raise ValueError(f"run.optim_args {args.optim_args!r} has no effect on run.optim {name}")
    optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
    schedule, given = SchedulerType(args.lr_scheduler_type), cast("dict[str, Any]", args.lr_scheduler_kwargs or {})
    parameters = inspect.signature(cast(Any, TYPE_TO_SCHEDULER_FUNCTION[schedule])).parameters
    known = parameters.keys() - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name in given if "kwargs" not in known else ():
        if not known:
            raise UserError(f"run.lr_scheduler_type {schedule.value} takes no lr_scheduler_kwargs")
        if name not in known:
            raise UserError(unknown_name("key of run.lr_scheduler_kwargs", str(name), known))
    get_scheduler(schedule, optimizer, args.get_warmup_steps(100), 100, scheduler_specific_kwargs=given or None)
