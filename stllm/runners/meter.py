"""What is measured between two lines of the log: exact sums over processes and micro-batches, kept in checkpoints.

A run that is continued within a window logs the same figures as one that was never interrupted.
"""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from stllm.common.distributed import is_distributed

SUMS = (
    *("loss", "loss_lm", "loss_mvm", "kept_visual_tokens", "accuracy"),
    *("told_batches", "masked_batches", "seen_batches", "judged_batches"),
)


class StepMeter:
    """Sums since the last line of the log. device: where the losses are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # in float64: float32 sums of long windows would show; not on Apple's GPU, which lacks it
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(SUMS), dtype=self.dtype, device=device)
        self.started = time.perf_counter()
        self.timed_samples = 0  # of this process, since `started`

    def add(
        self,
        *,
        loss: Tensor,
        samples: int,
        loss_lm: Tensor | None = None,
        loss_mvm: Tensor | None = None,
        kept_visual_tokens: int | None = None,
        accuracy: Tensor | None = None,
    ) -> None:
        """One micro-batch of this process; losses as they enter the optimizer step's, scalars."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        known: dict[str, Any] = {
            "loss": loss.detach(),
            "loss_lm": zero if loss_lm is None else loss_lm.detach(),
            "loss_mvm": zero if loss_mvm is None else loss_mvm.detach(),
            "kept_visual_tokens": kept_visual_tokens or 0,
            "accuracy": zero if accuracy is None else accuracy.detach(),
            "told_batches": int(loss_lm is not None),
            "masked_batches": int(loss_mvm is not None),
            "seen_batches": int(kept_visual_tokens is not None),
            "judged_batches": int(accuracy is not None),
        }
        # filled without waiting for the device
        values = [torch.as_tensor(known[name], dtype=self.dtype, device=self.device) for name in SUMS]
        self.sums += torch.stack(values)
        self.timed_samples += samples

    def gather(self) -> None:
        """Moves the sums of all processes to the first one. A collective call."""
        if is_distributed():
            dist.all_reduce(self.sums)
            if dist.get_rank() > 0:
                self.sums.zero_()

    def read(self, num_steps: int) -> dict[str, float | None]:
        """The window's figures, the same on every process, and a new window. A collective call.

        num_steps: optimizer steps in the window. The losses are means over them, loss = loss_lm + loss_mvm; loss_mvm
        is None where no batch was masked, loss_lm and accuracy where no batch had one.
        """
        world = dist.get_world_size() if is_distributed() else 1
        if is_distributed():
            dist.all_reduce(self.sums)
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        steps = max(num_steps, 1) * world
        seconds = max(time.perf_counter() - self.started, 1e-9)
        figures = {
            "loss": sums["loss"] / steps,
            "loss_lm": sums["loss_lm"] / steps if sums["told_batches"] else None,
            "loss_mvm": sums["loss_mvm"] / steps if sums["masked_batches"] else None,
            "kept_visual_tokens": sums["kept_visual_tokens"] / sums["seen_batches"] if sums["seen_batches"] else None,
            "accuracy": sums["accuracy"] / sums["judged_batches"] if sums["judged_batches"] else None,
            "samples_per_second": self.timed_samples * world / seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        self.sums.zero_()
        self.started, self.timed_samples = time.perf_counter(), 0
        return figures

    def state_dict(self) -> dict[str, float]:
        """The sums, after `gather`, on the first process."""
        return dict(zip(SUMS, self.sums.tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """What `state_dict` gave; on the first process alone."""
        self.sums = torch.tensor([state[name] for name in SUMS], dtype=self.dtype, device=self.device)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that was held so far, in MiB: on the GPU what torch allocated, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
