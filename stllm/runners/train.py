"""`stllm train`: a configuration to a trained model, alone or under torchrun; the same command continues a run.

configuration -> task (data sets, prompts, model) -> trainer -> checkpoints, log, the model in the output folder
"""

import logging
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import send_to_device
from omegaconf import DictConfig
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from stllm.common.device import seed_everything
from stllm.common.distributed import gathered, is_main, wait_for_all
from stllm.common.errors import UserError
from stllm.common.registry import runners
from stllm.datasets.collate import MEDIA_FIELDS
from stllm.datasets.samples import BadSampleLog, SampleKey
from stllm.runners.run_folder import RunFolder
from stllm.runners.trainer import STLLMTrainer

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
        # What is frozen is in half precision; what trains stays in float32 and is computed on in half (autocast). FSDP
        # shards units of one type, so there everything is float32 until it computes; DeepSpeed keeps its own masters.
        half = None if args.fsdp else torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        model = task.build_model(
            device=torch.device("cpu") if args.fsdp or args.deepspeed else args.device,  # divided among several later
            dtype=half or torch.float32,
            trained_dtype=torch.float32 if half and not args.deepspeed else None,
        )
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
            projection_lr=cfg.run.projection_lr,
            resume_only_model=cfg.run.resume_only_model,
        )
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


def some_parts_idle(task: Any, model: nn.Module, args: TrainingArguments) -> bool:
    """Check for batches that give some trained weights no gradient, so that DDP must look for such weights.

    Examples are images, which skip the residual's layers, and an MVM decoder where nothing is masked. One sample of
    each kind (a video of so many frames, an image, text alone) goes forward and backward. All processes must call this
    together.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    half = torch.bfloat16 if args.bf16 else torch.float16
    collate, kinds, idle = task.collator(), set(), False
    model.train()
    for number in range(len(task.mixture.corpora)):
        batch = collate([task.mixture[SampleKey(epoch=0, batch=0, corpus=number, index=0)]])
        kind = tuple((name, batch[name].shape) for name in MEDIA_FIELDS if name in batch)
        if kind in kinds:
            continue
        kinds.add(kind)
        inputs = {name: value for name, value in batch.items() if name not in ("names", "failures")}
        with torch.autocast(args.device.type, dtype=half, enabled=args.bf16 or args.fp16):
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
