"""What a person sees while it trains: a bar with the losses and the samples a second, or a line where nobody looks."""

import logging
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

SHOWN = ("loss", "loss_lm", "loss_mvm", "accuracy", "learning_rate", "samples_per_second")


class Progress(TrainerCallback):
    """The bar of optimizer steps, on the main process."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A bar of all steps, begun where the run is continued."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                disable=args.disable_tqdm or None,  # None: no bar where the output is no terminal
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step more."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def show(self, step: int, max_steps: int, figures: Mapping[str, Any]) -> None:
        """The figures of a line of the log."""
        if self.bar is None:
            return
        words = {name.replace("_", " "): f"{figures[name]:.4g}" for name in SHOWN if figures.get(name) is not None}
        if self.bar.disable:
            log.info(
                "step %d of %d: %s", step, max_steps, ", ".join(f"{name} {value}" for name, value in words.items())
            )
        else:
            self.bar.set_postfix(words)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the finished bar standing."""
        if self.bar is not None:
            self.bar.close()
