"""`stllm train`: a configuration to a trained model, alone or under torchrun; the same command continues a run.

configuration -> task (data sets, prompts, model) -> trainer -> checkpoints, log, the model in the output folder
Everything of section `run` that transformers would refuse later, after the weights are loaded, is tried first.
"""

import copy
import inspect
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate.utils import (
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    get_module_children_bottom_up,
    is_torch_version,
    send_to_device,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from omegaconf import DictConfig
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode, trainer_log_levels
from transformers.utils import is_liger_kernel_available
from transformers.utils.logging import disable_progress_bar

from stllm.common.device import DTYPE_ALIASES, resolve_device, seed_everything
from stllm.common.distributed import gathered, is_main, wait_for_all
from stllm.common.errors import UserError, unknown_name
from stllm.common.files import check_regular
from stllm.common.jsonl import loads
from stllm.common.registry import runners
from stllm.common.run_section import REFUSED
from stllm.common.schema import RunSettings
from stllm.datasets.collate import MEDIA_FIELDS
from stllm.datasets.samples import BadSampleLog, SampleKey
from stllm.models.language_model import set_attention, use_liger
from stllm.models.st_llm import STLLM
from stllm.runners.run_folder import RunFolder
from stllm.runners.throughput import Profiler
from stllm.runners.trainer import STLLMTrainer
from stllm.runners.validation import open_validation

log = logging.getLogger(__name__)


@contextmanager
def stopping_at_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM within the block, for the trainer to finish its step and write a checkpoint.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread nothing is changed.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            log.info("%s: finishing this step, then a checkpoint is written", signal.Signals(number).name)
        elif number == signal.SIGINT:  # a launcher may well send SIGTERM twice
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@runners.register("trainer", "runner_base")
def train(task: Any, args: TrainingArguments, cfg: DictConfig, stop: Sequence[int]) -> int:
    """Train the task's model on transformers' Trainer. Raises UserError; returns the exit code.

    stop: the signals received so far, see `stopping_at_signals`.
    """
    disable_progress_bar()  # of transformers, at every checkpoint
    validation = None if args.eval_strategy == "no" else open_validation(task, args, cfg)
    folder = RunFolder(str(args.output_dir))
    with folder.locked():
        checkpoint = _checkpoint(args, folder)
        folder.begin(cfg)
        if folder.is_finished():
            log.info("%s: this run is finished; name another run.output_dir to train again", folder.path)
            return 0
        sampler = task.sampler(
            batch_size=args.per_device_train_batch_size, rank=args.process_index, world_size=args.world_size
        )
        # What is frozen is in half precision; what trains stays in float32 and is computed on in half (autocast, or
        # FSDP casts). FSDP 1, and that of torch before 2.9, shards units of one type: everything there is float32 until
        # it computes. DeepSpeed keeps its own masters.
        divides = divides_while_loading(args)
        half = half_precision(args)
        if args.fsdp and not (divides and is_torch_version(">=", "2.9")):
            half = None
        model = task.build_model(
            # what is divided among several later begins in main memory
            device=torch.device("cpu") if (args.fsdp and not divides) or args.deepspeed else args.device,
            dtype=half or torch.float32,
            trained_dtype=torch.float32 if half and not args.deepspeed else None,
            divide=partial(divide, args=args) if divides else None,
        )
        if isinstance(model, STLLM):
            attention = cfg.model.get("attn_implementation")
            set_attention(
                model.language_model, attention, device=args.device, dtype=half_precision(args) or torch.float32
            )
        if args.use_liger_kernel:
            if not isinstance(model, STLLM):
                raise UserError(f"run.use_liger_kernel: run.task {cfg.run.task} trains no language model: leave it out")
            use_liger(model.language_model, args.liger_kernel_config, whole=not args.fsdp and not args.deepspeed)
            args.use_liger_kernel = False  # done: the Trainer looks for kernels of the outer model
        if args.torch_compile:
            compile_blocks(model, args)
        if args.ddp_find_unused_parameters is None and args.world_size > 1 and not args.fsdp and not args.deepspeed:
            args.ddp_find_unused_parameters = some_parts_idle(task, model, args)
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
        trainer = STLLMTrainer(
            model=model,
            args=args,
            dataset=task.mixture,
            sampler=sampler,
            collator=task.collator(),
            processor=task.processor,
            folder=folder,
            bad_samples=BadSampleLog(
                max_bad_fraction=cfg.run.max_bad_fraction, epoch_size=len(sampler) * sampler.global_batch
            ),
            stop=stop,
            validation=validation,
            projection_lr=cfg.run.projection_lr,
            resume_only_model=cfg.run.resume_only_model,
        )
        if cfg.run.profile_steps is not None:
            first, last = cfg.run.profile_steps
            trainer.add_callback(Profiler(first, last, folder.path / "profile"))
        if checkpoint is not None:
            trainer.resume(checkpoint)
            log.info("continuing from %s", checkpoint)
        if is_main():
            folder.rewind_log(trainer.meter.step)
        seed_everything((args.seed + args.process_index) % 2**32)  # processes must not draw the same dropout
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
            step = trainer.state.global_step
            again = "the same command" if _continues(args) else "the same command without run.resume_from_checkpoint"
            log.info("stopped at step %d; checkpoint-%d is written: %s continues from it", step, step, again)
            return 128 + (stop[0] if stop else signal.SIGINT)  # as shells have it; the signal may be another process's
        _finish(task, trainer, folder)
        return 0


def compile_blocks(model: nn.Module, args: TrainingArguments) -> None:
    """Compile each block of the vision encoder and of the language model, in place and under its own name.

    Blocks of one kind share their compiled code: one for passes with gradients and one for those without, again for
    lengths that vary. The code between them depends on the batch (masking, placeholders); compiling the whole model
    would begin anew at each kind of batch.
    """
    names = getattr(model, "_no_split_modules", STLLM._no_split_modules)
    parts = [getattr(model, name) for name in ("vision_encoder", "language_model") if hasattr(model, name)]
    for block in (block for part in parts or [model] for block in part.modules()):
        if type(block).__name__ in names:
            block.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    args.torch_compile_backend = None  # accelerate would compile the whole model


def half_precision(args: TrainingArguments) -> torch.dtype | None:
    """The type that is computed in, where it is not float32."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def divides_while_loading(args: TrainingArguments) -> bool:
    """Check whether each process reads its own share of the weights alone, which FSDP 2 allows.

    FSDP's own activation checkpointing has to be there before a model is divided, and renames its weights.
    """
    plugin: dict[str, Any] = args.fsdp_plugin_args or {}
    return plugin.get("fsdp_version") == 2 and not plugin.get("activation_checkpointing")


def divide(model: nn.Module, args: TrainingArguments) -> torch.device:
    """Divide a model's weights among the processes with FSDP 2, in the units that `run.fsdp_config` names.

    Returns the device for the shards.

    accelerate would divide a model that each process holds whole. It leaves a divided one alone.
    """
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    options = {
        "mesh": init_device_mesh(args.device.type, (dist.get_world_size(),)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": MixedPrecisionPolicy(param_dtype=half_precision(args), reduce_dtype=torch.float32),
    }
    for module in get_module_children_bottom_up(model)[:-1]:
        if is_unit is not None and is_unit(module):
            fully_shard(module, **options)
    fully_shard(model, **{**options, "reshard_after_forward": False})
    args.fsdp_plugin_args["auto_wrap_policy"] = "NO_WRAP"  # accelerate no longer finds the classes of the units
    return torch.device("cpu") if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else args.device


def some_parts_idle(task: Any, model: nn.Module, args: TrainingArguments) -> bool:
    """Check for batches that give some trained weights no gradient, so that DDP must look for such weights.

    Examples are images, which skip the residual's layers, and an MVM decoder where nothing is masked. One sample of
    each kind (a video of so many frames, an image, text alone) goes forward and backward. All processes must call this
    together.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    collate, kinds, idle = task.collator(), set(), False
    model.train()
    for number in range(len(task.mixture.corpora)):
        batch = collate([task.mixture[SampleKey(epoch=0, batch=0, corpus=number, index=0)]])
        kind = tuple((name, batch[name].shape) for name in MEDIA_FIELDS if name in batch)
        if kind in kinds:
            continue
        kinds.add(kind)
        inputs = {name: value for name, value in batch.items() if name not in ("names", "failures")}
        with torch.autocast(args.device.type, dtype=half_precision(args), enabled=args.bf16 or args.fp16):
            loss = model(**send_to_device(inputs, args.device))["loss"]
        loss.backward()
        idle = idle or any(weight.grad is None for weight in trained)
        model.zero_grad(set_to_none=True)
    return any(gathered([idle]))


def _checkpoint(args: TrainingArguments, folder: RunFolder) -> Path | None:
    """The checkpoint to continue from: the one that the user names, or else the run's last one; None to start anew.

    Raises UserError for a folder that is no checkpoint, and for a run that would start anew in the folder of another.
    """
    named = str(args.resume_from_checkpoint or "").lower()
    if not _continues(args):
        last = folder.last_checkpoint()
        if last is not None or folder.is_finished():
            raise UserError(
                f"run.resume_from_checkpoint is False, but {folder.path} holds {last.name if last else 'a model'} of "
                "an earlier run, which would be lost: name another run.output_dir to start anew, or leave "
                "out run.resume_from_checkpoint to continue"
            )
        return None
    if named in ("", "true"):
        return folder.last_checkpoint()
    path = Path(str(args.resume_from_checkpoint))
    if not (path / "trainer_state.json").is_file():
        raise UserError(f"run.resume_from_checkpoint: {path} is no checkpoint of a run (it has no trainer_state.json)")
    return path


def _continues(args: TrainingArguments) -> bool:
    """False when run.resume_from_checkpoint is False: the run must start anew."""
    return str(args.resume_from_checkpoint).lower() != "false"


def _finish(task: Any, trainer: STLLMTrainer, folder: RunFolder) -> None:
    """The trained model in our format in the output folder, as the task leaves it. A collective call."""
    partial = folder.path / ".model.partial"
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(partial))
    if is_main():
        model = trainer.accelerator.unwrap_model(trainer.model)
        task.export(model, partial, sharded=trainer.is_fsdp_enabled)
        folder.place_final(partial)
        log.info("the trained model is in %s", folder.path)
    wait_for_all()


# ---- transformers' training arguments --------------------------------------------------------------------------------

# What users cannot choose; run_section.py says why.
FIXED = {"remove_unused_columns": False, "logging_nan_inf_filter": False, "average_tokens_across_devices": True}
# They group the parameters themselves, layer by layer; ours are grouped by learning rate and weight decay.
OTHER_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")


def training_arguments(
    run: Mapping[str, Any], *, device: str = "auto", dtype: str = "auto", seed: int | None = None
) -> TrainingArguments:
    """Return the checked `run` section as TrainingArguments. device, dtype, seed: the command line's, over the section.

    Raises UserError for a device that is absent, for what transformers or our training refuses, and for a package that
    is named and not installed.
    """
    ours = {f.name for f in fields(RunSettings)}
    values = {key: value for key, value in run.items() if key not in ours and value is not None}
    if not values.get("output_dir"):
        raise UserError("run.output_dir is not set: name the folder that the run writes to")
    if (span := run.get("profile_steps")) is not None and not (len(span) == 2 and 1 <= span[0] <= span[1]):
        raise UserError(f"run.profile_steps must be the first and the last step, such as [10, 12], found {list(span)}")
    _check_values(values)
    values |= FIXED
    if (name := DTYPE_ALIASES.get(dtype, dtype)) != "auto":  # --dtype over bf16 and fp16 of the section
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
        values.pop("ddp_backend", None)  # accelerate would look for the other processes
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
    if args.fsdp and args.deepspeed:
        raise UserError("run.fsdp and run.deepspeed are both set: keep one of them")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError("run.fsdp divides a model among processes: start several with torchrun, or leave run.fsdp out")
    return args


def _check_values(values: Mapping[str, Any]) -> None:
    """Raise UserError for values that training refuses, and for files and packages that are not there."""
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
        # transformers does not list flyte among those available
        if tracker not in (*get_available_reporting_integrations(), "all", "none", "flyte"):
            raise UserError(f"run.report_to names {tracker}, which is not installed: `pip install {tracker}`")
    if values.get("use_liger_kernel") and not is_liger_kernel_available():
        raise UserError(
            "run.use_liger_kernel is True, but Liger is not installed: `pip install liger-kernel`, or leave it out"
        )
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        raise UserError(
            "run.deepspeed is set, but DeepSpeed is not installed: `pip install deepspeed`, or train without it "
            "(--options run.deepspeed=null)"
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
    """Build optimizer and schedule for one parameter, so that what is missing or wrong is found before training."""
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
