"""Section `run` as transformers' TrainingArguments: what the user says, and the few things that must be so."""

import os
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments

from stllm.common.device import DTYPE_ALIASES, resolve_device
from stllm.common.errors import UserError
from stllm.common.schema import RunSettings

TRACKERS = ("tensorboard", "wandb")  # of report_to; others are checked by transformers
NEEDED: dict[str, Any] = {
    "disable_tqdm": True,  # our own bar shows the parts of the loss (progress.py)
    "remove_unused_columns": False,  # a batch has more than the model's arguments
    "logging_nan_inf_filter": False,  # a loss that is no number stops the run, it is not averaged away
    "average_tokens_across_devices": True,  # the loss does not depend on the number of processes
    "load_best_model_at_end": False,
    "auto_find_batch_size": False,
}


def training_arguments(
    run: Mapping[str, Any], *, device: str = "auto", dtype: str = "auto", seed: int | None = None
) -> TrainingArguments:
    """The checked `run` section as TrainingArguments; device, dtype, seed: the command line's, over the section's.

    Raises UserError for what transformers refuses, and for a package that is named and not installed.
    """
    ours = {f.name for f in fields(RunSettings)}
    values = {key: value for key, value in run.items() if key not in ours and value is not None}
    if not values.get("output_dir"):
        raise UserError("run.output_dir is not set: name the folder that the run writes to")
    _check_packages(values)
    values |= NEEDED
    values |= _precision(dtype)
    if seed is not None:
        values["seed"] = seed
    if device in ("auto", "cpu") and resolve_device(device).type == "cpu":
        values["use_cpu"] = True  # said where there is nothing else, too: FSDP and bf16 on CPUs ask for it
    elif device.startswith("cuda:"):  # before CUDA is initialised; under torchrun each process has its own
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", device.removeprefix("cuda:"))
    values.setdefault("report_to", "none")
    values.setdefault("dataloader_persistent_workers", bool(values.get("dataloader_num_workers")))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", os.path.join(values["output_dir"], "tensorboard"))
    try:
        args = TrainingArguments(**values)
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs are torchrun's business, never torch.nn.DataParallel's
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise UserError(f"the run section can't be used: {' '.join(str(error).split())}") from error
    return args


def _check_packages(values: Mapping[str, Any]) -> None:
    named = values.get("report_to") or []
    trackers = [named] if isinstance(named, str) else list(named)
    for tracker in trackers:
        if tracker in TRACKERS and find_spec(tracker) is None:
            raise UserError(f"run.report_to names {tracker}, which is not installed: `pip install {tracker}`")
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        raise UserError(
            "run.deepspeed is set, but DeepSpeed is not installed: `pip install deepspeed`, or train without it "
            "(--options run.deepspeed=null)"
        )


def _precision(dtype: str) -> dict[str, bool]:
    """--dtype over bf16 and fp16 of the section."""
    name = DTYPE_ALIASES.get(dtype, dtype)
    return {} if name == "auto" else {"bf16": name == "bfloat16", "fp16": name == "float16"}
