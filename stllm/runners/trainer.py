"""A subclass of transformers' Trainer, with reproducible batches, a loss of two parts and exact continuation.

It stops a run at a NaN loss or gradient, and at too many unreadable samples. transformers and accelerate provide the
loop, the optimizers, DDP, FSDP, DeepSpeed and mixed precision.
"""

import json
import logging
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from stllm.common.distributed import end_with_parent, gathered, is_distributed
from stllm.common.errors import UserError, out_of_memory, reason
from stllm.common.files import write_text
from stllm.datasets.collate import MEDIA_FIELDS
from stllm.datasets.mixture import MixtureSampler
from stllm.datasets.samples import BadSampleLog
from stllm.models.checkpoints.audit import MAX_NAMED
from stllm.models.checkpoints.load import restore
from stllm.models.st_llm import STLLM
from stllm.processors.prompts import PromptProcessor
from stllm.runners.callbacks import Flow, Progress
from stllm.runners.resume import RUN_STATE, reading
from stllm.runners.run_folder import STATE, RunFolder
from stllm.runners.throughput import FlopCounter, StepMeter, padding_of, peak_flops
from stllm.runners.validation import Validation

log = logging.getLogger(__name__)

PROJECTION = "projection."


class KeyedLoader(DataLoader[Any]):
    """A DataLoader that passes the epoch to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The Trainer calls this at the beginning of each epoch."""
        assert isinstance(self.batch_sampler, MixtureSampler)
        self.batch_sampler.set_epoch(epoch)


class STLLMTrainer(Trainer):
    """A trainer of `model` on batches of `dataset`, in the order of `sampler`.

    model: returns loss_lm (and loss_mvm), or only `loss`; and accuracy, if it has one.
    collator: converts a list of samples to the model's arguments, `names` and `failures`.
    processor: prompt processor whose tokenizers are saved with the model; None: no tokenizers.
    folder: output folder. bad_samples: counter of unreadable samples, which stops the run if there are too many.
    stop: the signals received so far. validation: evaluated as often as `args.eval_strategy` requires.
    projection_lr: learning rate of the projection; None: args.learning_rate.
    resume_only_model: continue with a checkpoint's weights and step, but with a new optimizer and random state.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        dataset: Dataset[Any],
        sampler: MixtureSampler,
        collator: Any,
        processor: PromptProcessor | None,
        folder: RunFolder,
        bad_samples: BadSampleLog,
        stop: Sequence[int],
        validation: Validation | None = None,
        projection_lr: float | None = None,
        resume_only_model: bool = False,
    ) -> None:
        # transformers requires an eval_dataset, though `evaluate` is overridden
        held_out: Any = validation
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator, eval_dataset=held_out)
        self.validation = validation
        self.model_accepts_loss_kwargs = True  # forward takes num_items_in_batch
        self.dataset, self.sampler, self.prompts, self.folder = dataset, sampler, processor, folder
        self.bad_samples, self.stop, self.projection_lr = bad_samples, stop, projection_lr
        self.resume_only_model = resume_only_model
        self.meter = StepMeter(args.device, peak_flops(args.device) if args.bf16 or args.fp16 else None)
        self.flops = FlopCounter(model) if isinstance(model, STLLM) else None
        self.stopping = False  # equal on all processes
        self.learned: list[tuple[Tensor, list[str]]] = []  # per micro-batch of this step: loss is finite, sample names
        self.new_failures: list[Any] = []
        self.shards: list[list[nn.Parameter]] = []  # parameters of the optimizer's groups, if FSDP divided the model
        self._save_to: Path | None = None
        self.progress = Progress()
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(callback)
        self.add_callback(self.progress)
        self.add_callback(Flow(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator. On CPUs accelerate would replace FSDP by DDP, although gloo can shard."""
        if self.args.fsdp and self.args.device.type == "cpu":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    # ---- batches ------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Make the loader of this process's samples. The sampler divides the batches, so accelerate must not."""
        args = self.args
        workers = args.dataloader_num_workers
        return KeyedLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            worker_init_fn=end_with_parent,
            generator=torch.Generator().manual_seed(args.seed),  # leave the global generator to the model
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step, and count the time spent waiting for them."""
        begun = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.meter.count(waited=time.perf_counter() - begun)
        return samples

    def _prepare_input(self, data: Any) -> Any:
        """Copy a batch to the device without waiting for it. The model converts dtypes."""
        return send_to_device(data, self.args.device, non_blocking=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the share of a micro-batch in the loss of its step.

        loss_lm is a mean over all answer tokens of the step; loss_mvm is a mean over its micro-batches.
        """
        batch = {key: value for key, value in inputs.items() if key not in ("names", "failures")}
        self.new_failures += inputs["failures"]
        outputs = model(**batch, num_items_in_batch=num_items_in_batch)
        world = self.accelerator.num_processes  # DDP averages gradients over processes, but the sum is needed
        loss_lm, loss_mvm = outputs.get("loss_lm"), outputs.get("loss_mvm")
        loss = (outputs["loss"] if loss_lm is None else loss_lm) * (1 if num_items_in_batch is None else world)
        figures = {**outputs, "loss_lm": None if loss_lm is None else loss}
        if loss_mvm is not None:
            figures["loss_mvm"] = loss_mvm / self.current_gradient_accumulation_steps
            loss = loss + figures["loss_mvm"]
        self.learned.append((loss.detach().isfinite().all(), inputs["names"]))
        self.meter.add({**figures, "loss": loss})
        num_samples, has_media = len(inputs["names"]), any(name in batch for name in MEDIA_FIELDS)
        self.meter.count(samples=num_samples, clips=num_samples * has_media)
        if "input_ids" in batch:
            tokens, padding = padding_of(batch)
            self.meter.count(tokens=tokens, positions=tokens + padding, padding=padding)
        if "teacher" in batch:
            tokens, padding = padding_of(batch["teacher"])
            self.meter.count(positions=tokens + padding, padding=padding)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm. Stop all processes at a NaN or infinite loss or gradient.

        Also share the signals that any process received. This is called once per step, before the optimizer's step;
        nothing else in a step waits for the device. Raises UserError.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, DTensor):  # FSDP
            norm = norm.full_tensor()
        losses, names = zip(*self.learned, strict=True)
        self.learned = []
        checked = norm is not None and self.accelerator.scaler is None  # fp16's scaler skips a step that overflows
        gradient = torch.as_tensor(norm if checked else 0.0, device=losses[0].device).isfinite()
        own = (~torch.stack([*losses, gradient])).int()
        agreed = torch.stack([own[:-1].any(), own[-1], torch.tensor(bool(self.stop), device=own.device)]).int()
        if is_distributed():
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        *broken, _, loss_broken, gradient_broken, stopping = torch.cat([own, agreed]).tolist()
        self.stopping = bool(stopping)
        if loss_broken:
            own_names = [name for batch, bad in zip(names, broken, strict=True) if bad for name in batch]
            self._fail("its loss is no number", gathered(own_names))
        if gradient_broken:
            self._fail("its gradient is no number", [])
        return norm

    def _fail(self, what: str, names: list[str]) -> None:
        last = self.folder.last_checkpoint()
        kept = f"{last.name} is kept" if last else "no checkpoint was written yet"
        batch = f", with {'; '.join(names[:8])}" if names else ""
        raise UserError(
            f"step {self.state.global_step + 1} can't be learned from: {what} (NaN or infinite){batch}; {kept}: look "
            "at these samples, or lower run.learning_rate, or train in bf16 or float32"
        )

    # ---- learning rates -----------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer that transformers chooses, with a separate learning rate of the projection."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(
                trained,
                decayed=set(self.get_decay_parameter_names(trained)),
                weight_decay=self.args.weight_decay,
                learning_rate=self.args.learning_rate,
                projection_lr=self.projection_lr,
            )
            if isinstance(trained, FSDPModule):  # divided while its weights were read
                self.shards = [list(group["params"]) for group in groups]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule, and restore the optimizer's parameters under FSDP.

        accelerate has just prepared the optimizer. It matches parameters by memory address, and empty shards have none.
        """
        if self.shards:
            prepared: Any = self.optimizer
            for group, weights in zip(prepared.param_groups, self.shards, strict=True):
                group["params"] = weights
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- the log ------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of log.jsonl. All processes must call this together.

        Raises UserError on all processes if too many samples could not be read.
        """
        if "loss" in logs:
            for failure in gathered(self.new_failures):
                self.bad_samples.add(failure)
            self.new_failures = []
            step = self.state.global_step
            self.bad_samples.check(step * self.args.gradient_accumulation_steps * self.global_batch)
            figures: dict[str, Any] = {
                **self.meter.read(step),
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "skipped_samples": self.bad_samples.total,
            }
            if self.is_world_process_zero():
                self.folder.append_log({"step": step, "epoch": self.state.epoch, **figures})
                self.progress.show(step, self.state.max_steps, figures)
            logs = {**logs, **figures}
        super().log({key: value for key, value in logs.items() if value is not None}, start_time)

    @property
    def global_batch(self) -> int:
        """The number of samples of one micro-batch over all processes."""
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the held-out samples and the benchmark, and log the figures; see validation.py.

        All processes must call this together.
        """
        assert self.validation is not None
        begun = time.perf_counter()
        model: Any = self.model_wrapped
        model.eval()
        # generation has many sequence lengths, and would be compiled for each
        eager = torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()
        with torch.no_grad(), self.compute_loss_context_manager(), eager:
            figures = self.validation.losses(model, self.args.device)
            figures |= self.validation.scores(self.accelerator.unwrap_model(model))
        self.meter.started += time.perf_counter() - begun  # do not count it as time of training
        if self.is_world_process_zero():
            self.folder.append_log({"step": self.state.global_step, "epoch": self.state.epoch, **figures})
            self.progress.show(self.state.global_step, self.state.max_steps, figures)
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write transformers' checkpoint and our own state. An incomplete checkpoint is removed."""
        step = self.state.global_step
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        with self.folder.new_checkpoint(step, limit=self.args.save_total_limit, keep=best) as partial:
            self._save_to = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._save_to = None
            if best:
                self.state.best_model_checkpoint = str(self.folder.path / f"checkpoint-{best}")
            if self.is_world_process_zero():
                self.state.save_to_json(str(partial / f"checkpoint-{step}" / STATE))
                state = {
                    "bad_samples": self.bad_samples.state_dict(),
                    "global_batch": self.global_batch,
                    "num_processes": self.accelerator.num_processes,
                    "model_only": self.args.save_only_model,
                }
                write_text(partial / f"checkpoint-{step}" / RUN_STATE, json.dumps(state))

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """Restore our own state of a checkpoint, before `train(resume_from_checkpoint=...)` restores the rest.

        state, step: as returned by `read_state`.
        """
        self.bad_samples.load_state_dict(state["bad_samples"])
        self.meter.step = step

    def _reading(self, checkpoint: str | None, files: str) -> AbstractContextManager[None]:
        return reading(self.folder, checkpoint or "", files)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.resume_only_model:
            with self._reading(checkpoint, "optimizer.pt or scheduler.pt"):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate may have wrapped it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the optimizer made no step yet
            for _ in range(self.meter.step):  # the step of the checkpoint
                schedule.step()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self.resume_only_model:
            with self._reading(checkpoint, "the random state (rng_state*.pth)"):
                super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self.resume_only_model:
            with self._reading(checkpoint, "scaler.pt"):
                super()._load_scaler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint. Raises UserError, with their names, if weights are missing.

        FSDP's own file has the names of the module in memory. A model in our format has those of `save_pretrained`.
        """
        quantized = getattr(self.model, "hf_quantizer", None) is not None  # its tensors are not the model's parameters
        if isinstance(self.model, STLLM) and not self.is_fsdp_enabled and not quantized:
            with self._reading(resume_from_checkpoint, "the weights"):
                restore(self.model, Path(resume_from_checkpoint))
            return
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # torch raises it for weights that are missing or have another size
            if out_of_memory(error):
                raise
            raise UserError(f"{resume_from_checkpoint} can't be continued from ({reason(error)})") from error

    def _load_best_model(self) -> None:
        log.info("the best checkpoint is %s", self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint), self.model_wrapped)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.missing_keys:
            raise UserError(
                f"the checkpoint lacks weights of the model: {', '.join(load_result.missing_keys[:MAX_NAMED])}"
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._save_to is None else str(self._save_to)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model in our format, and its tokenizers."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.folder.path)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml has the same settings
            if self.prompts is not None:
                self.prompts.save_pretrained(folder)

    def floating_point_ops(self, inputs: Any) -> int:
        """Count the FLOPs of the pass of a micro-batch."""
        flops = 0 if self.flops is None else self.flops(inputs)
        self.meter.count(flops=flops)
        return flops


def parameter_groups(
    model: nn.Module,
    *,
    decayed: Collection[str],
    weight_decay: float,
    learning_rate: float,
    projection_lr: float | None,
) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate and weight decay, for a torch optimizer. No group is empty.

    decayed: names of the parameters with weight decay (transformers' rule: no biases, no norms).
    projection_lr: learning rate of the projection; None: `learning_rate`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_rate = projection_lr is not None and PROJECTION in name and "adapter" not in name
            groups.setdefault((own_rate, name in decayed), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay * key[1], "lr": projection_lr if key[0] else learning_rate}
        for key in sorted(groups)
    ]
