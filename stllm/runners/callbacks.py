"""Callbacks of the Trainer: the progress bar, checkpoints at signals, and torch's profiler."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.profiler import profile
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from stllm.common.distributed import rank

log = logging.getLogger(__name__)

SHOWN = ("eval_loss", "eval_mvbench", "loss", "loss_lm", "loss_mvm", "accuracy", "learning_rate", "samples_per_second")


class Progress(TrainerCallback):
    """A progress bar with losses and samples per second; log lines instead if the output is not a terminal."""

    bar: Any = None  # on the main process

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show a bar of all steps. A continued run begins at its last step."""
        if state.is_world_process_zero:
            hidden = args.disable_tqdm or None  # None: tqdm shows no bar if the output is not a terminal
            done, total = state.global_step, state.max_steps
            self.bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=hidden)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None and not self.bar.disable:
            self.bar.update(state.global_step - self.bar.n)

    def show(self, step: int, max_steps: int, figures: Mapping[str, Any]) -> None:
        """Show the figures of a log line, in the bar or as text."""
        words = {name.replace("_", " "): f"{figures[name]:.4g}" for name in SHOWN if figures.get(name) is not None}
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix(words)
        elif self.bar is not None:
            text = ", ".join(f"{name} {value}" for name, value in words.items())
            log.info("step %d of %d: %s", step, max_steps, text)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the bar; it stays visible."""
        if self.bar is not None:
            self.bar.close()


class Flow(TrainerCallback):
    """Control of saving and logging: stop with a checkpoint after a signal, and write a log line at each checkpoint.

    A run that continues from a checkpoint thus logs the same figures as an uninterrupted run.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save


class Profiler(TrainerCallback):
    """Recording of a trace of the steps `first` to `last`, for chrome://tracing or Perfetto: one file per process."""

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self.first, self.last, self.folder = first, last, folder
        self.running: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start recording before the first step."""
        if state.global_step + 1 == self.first:
            self.running = profile(record_shapes=True, profile_memory=True)
            self.running.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the trace after the last step."""
        if self.running is not None and (state.global_step == self.last or control.should_training_stop):
            self.running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            steps = f"{self.first}-{state.global_step}"
            self.running.export_chrome_trace(str(self.folder / f"trace-steps-{steps}-rank-{rank()}.json"))
            self.running = None
