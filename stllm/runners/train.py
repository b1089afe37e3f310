"""`stllm train`: train the model of a configuration, with one process or several (torchrun).

The configuration gives a task (data sets, prompts, model). The trainer trains its model, and writes checkpoints, the
log and the trained model to the output folder. The same command continues an interrupted run.
"""

import logging
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate.utils import is_torch_version, send_to_device
from omegaconf import DictConfig
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from stllm.common.device import seed_everything
from stllm.common.distributed import gathered, is_main, wait_for_all
from stllm.common.errors import UserError
from stllm.common.registry import runners
from stllm.datasets.collate import MEDIA_FIELDS
from stllm.datasets.samples import BadSampleLog, SampleKey
from stllm.models.language_model import set_attention, use_liger
from stllm.models.st_llm import STLLM
from stllm.runners.arguments import half_precision
from stllm.runners.callbacks import Profiler
from stllm.runners.resume import continues, find_checkpoint, read_state
from stllm.runners.run_folder import RunFolder
from stllm.runners.sharding import division_of
from stllm.runners.trainer import STLLMTrainer
from stllm.runners.validation import open_validation

log = logging.getLogger(__name__)


@contextmanager
def stopping_at_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list, so that the trainer can finish its step and write a checkpoint.

    A second SIGINT raises KeyboardInterrupt at once. In a thread other than the main one, signals are not handled.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            log.info("%s: finishing this step, then a checkpoint is written", signal.Signals(number).name)
        elif number == signal.SIGINT:  # only SIGINT: a launcher may send SIGTERM twice
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
    """Train the model of a task with transformers' Trainer, and return the exit code. Raises UserError.

    stop: the signals received so far, see `stopping_at_signals`.
    """
    disable_progress_bar()  # transformers shows one at every checkpoint
    validation = None if args.eval_strategy == "no" else open_validation(task, args, cfg)
    folder = RunFolder(str(args.output_dir))
    with folder.locked():
        checkpoint = find_checkpoint(args, folder)
        folder.begin(cfg)
        if folder.is_finished():
            log.info("%s: this run is finished; name another run.output_dir to train again", folder.path)
            return 0
        state: dict[str, Any] = {}
        step = 0
        if checkpoint is not None:
            state, step = read_state(checkpoint, args, folder, only_model=cfg.run.resume_only_model)
        sampler = task.sampler(
            batch_size=args.per_device_train_batch_size, rank=args.process_index, world_size=args.world_size
        )
        model = _build_model(task, args)
        if isinstance(model, STLLM):
            attention = cfg.model.get("attn_implementation")
            set_attention(
                model.language_model, attention, device=args.device, dtype=half_precision(args) or torch.float32
            )
        if args.use_liger_kernel:
            if not isinstance(model, STLLM):
                raise UserError(f"run.use_liger_kernel: run.task {cfg.run.task} trains no language model: leave it out")
            use_liger(model.language_model, args.liger_kernel_config, whole=not args.fsdp and not args.deepspeed)
            args.use_liger_kernel = False  # applied above; the Trainer would look for kernels of the whole model
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
            trainer.resume(state, step)
            log.info("continuing from %s", checkpoint)
        if is_main():
            folder.rewind_log(step)
        seed_everything((args.seed + args.process_index) % 2**32)  # processes must not draw the same dropout
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
            step = trainer.state.global_step
            again = "the same command" if continues(args) else "the same command without run.resume_from_checkpoint"
            log.info("stopped at step %d; checkpoint-%d is written: %s continues from it", step, step, again)
            return 128 + (stop[0] if stop else signal.SIGINT)  # as in shells; another process may have got the signal
        _finish(task, trainer, folder)
        return 0


def _build_model(task: Any, args: TrainingArguments) -> nn.Module:
    """Build the model of a task, with the dtypes and on the device that the method of training needs.

    Frozen weights are in half precision. Trained weights stay in float32, and autocast or FSDP computes in half
    precision. FSDP 1, and FSDP of torch before 2.9, can only shard units of one dtype, so all weights are float32.
    DeepSpeed keeps its own float32 copies of the trained weights.
    """
    division, half = division_of(args), half_precision(args)
    if args.fsdp and (division is None or is_torch_version("<", "2.9")):
        half = None
    return task.build_model(
        # a model that is divided or moved later is first built in main memory
        device=torch.device("cpu") if (args.fsdp or args.deepspeed) and division is None else args.device,
        dtype=half or torch.float32,
        trained_dtype=torch.float32 if half and not args.deepspeed else None,
        division=division,
    )


def compile_blocks(model: nn.Module, args: TrainingArguments) -> None:
    """Compile each block of the vision encoder and of the language model in place. Module names do not change.

    Blocks of one kind share compiled code. It is compiled for passes with and without gradients, and again for varying
    lengths. The whole model is not compiled: the code between the blocks depends on the batch (masking, placeholders),
    so each kind of batch would be compiled again.
    """
    names = getattr(model, "_no_split_modules", STLLM._no_split_modules)
    parts = [getattr(model, name) for name in ("vision_encoder", "language_model") if hasattr(model, name)]
    for block in (block for part in parts or [model] for block in part.modules()):
        if type(block).__name__ in names:
            block.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    args.torch_compile_backend = None  # otherwise accelerate compiles the whole model


def some_parts_idle(task: Any, model: nn.Module, args: TrainingArguments) -> bool:
    """Check whether some batches give a trained weight no gradient, so that DDP must search for such weights.

    Examples are images, which skip the layers of the residual video input, and an MVM decoder if no token is masked.
    The check runs a forward and backward pass for one sample of each kind: each number of frames, images, text only.
    All processes must call this together.
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


def _finish(task: Any, trainer: STLLMTrainer, folder: RunFolder) -> None:
    """Write the trained model to the output folder, in our format. All processes must call this together."""
    partial = folder.path / ".model.partial"
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(partial))
    if is_main():
        model = trainer.accelerator.unwrap_model(trainer.model)
        task.export(model, partial, sharded=trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled())
        folder.place_final(partial)
        log.info("the trained model is in %s", folder.path)
    wait_for_all()
