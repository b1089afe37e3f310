"""The figures of a training log: losses, samples and tokens per second, memory, and use of the device."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from stllm.common.distributed import is_distributed
from stllm.models.st_llm import STLLM, config_of

MEASURED = ("loss", "loss_lm", "loss_mvm", "kept_visual_tokens", "accuracy")  # averaged; a micro-batch may lack some
# summed over micro-batches and processes
COUNTED = ("samples", "clips", "tokens", "positions", "padding", "flops", "waited")
# dense FLOP/s in bfloat16 (NVIDIA's data sheets), by a part of the device's name; the first match counts
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device in bfloat16; None if it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class StepMeter:
    """Sums of figures over the micro-batches since the last log line.

    device: device of the losses. peak: peak FLOP/s of one process's device; None: unknown. step: step of the last line.
    """

    def __init__(self, device: torch.device, peak: float | None = None) -> None:
        self.device, self.peak, self.step = device, peak, 0
        # float32 sums over many steps would be inexact; Apple's GPU has no float64
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self._begin()

    def _begin(self) -> None:
        self.sums = torch.zeros(len(MEASURED), dtype=self.dtype, device=self.device)
        self.counts = [0] * len(MEASURED)  # micro-batches that had the figure
        self.totals: dict[str, Any] = dict.fromkeys(COUNTED, 0)
        self.started = time.perf_counter()

    def add(self, figures: Mapping[str, Any]) -> None:
        """Add the scalar figures of one micro-batch of this process, without waiting for the device.

        figures: values of the names in MEASURED; a value may be None or absent.
        """
        values = [figures.get(name) for name in MEASURED]
        known = [
            value.detach().to(self.sums)
            if isinstance(value, Tensor)
            else torch.full((), value or 0, dtype=self.dtype, device=self.device)  # copying a number would wait
            for value in values
        ]
        self.sums += torch.stack(known)
        self.counts = [count + (value is not None) for count, value in zip(self.counts, values, strict=True)]

    def count(self, **counts: Any) -> None:
        """Add to the sums in COUNTED. Values are numbers or tensors. waited: seconds spent waiting for a batch."""
        for name, value in counts.items():
            self.totals[name] = self.totals[name] + value

    def read(self, step: int) -> dict[str, float | None]:
        """Return the figures since the last log line, equal on all processes, and reset the sums.

        All processes must call this together. Losses are means over optimizer steps, with loss = loss_lm + loss_mvm;
        the other averages are over micro-batches. A figure that no micro-batch had is None.
        padding: share of padding among all positions, the teacher's included; packing saves it.
        data_wait: share of the time spent waiting for a batch.
        mfu: model FLOPs as a share of the devices' peak; None if the peak is unknown.
        """
        numbers = [float(count) for count in (*self.counts, *self.totals.values())]
        totals = torch.cat([self.sums, torch.tensor(numbers, dtype=self.dtype, device=self.device)])
        world = dist.get_world_size() if is_distributed() else 1
        if is_distributed():
            dist.all_reduce(totals)
        sums, counts, counted = totals.split([len(MEASURED), len(MEASURED), len(COUNTED)])
        steps = max(step - self.step, 1) * world
        figures: dict[str, float | None] = {
            name: total / (steps if name.startswith("loss") else count) if count else None
            for name, total, count in zip(MEASURED, sums.tolist(), counts.tolist(), strict=True)
        }
        seconds = max(time.perf_counter() - self.started, 1e-9)
        total = dict(zip(COUNTED, counted.tolist(), strict=True))
        figures |= {f"{name}_per_second": total[name] / seconds for name in ("samples", "clips", "tokens")}
        figures["padding"] = total["padding"] / total["positions"] if total["positions"] else None
        figures["data_wait"] = total["waited"] / world / seconds
        figures["mfu"] = None if self.peak is None else total["flops"] / seconds / self.peak / world
        if self.device.type == "cuda":  # MiB allocated by torch; on other devices, MiB used by the process
            figures["peak_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            figures["peak_memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
        self.step = step
        self._begin()
        return figures


def padding_of(prompts: Mapping[str, Any]) -> tuple[Any, Any]:
    """Count the tokens of a batch, and its padding tokens (for packed prompts, those that packing has saved).

    Nothing is copied from the device. prompts: output of `processors.sequences.pad_sequences`.
    """
    if "attention_mask" not in prompts:
        lengths = prompts["packed"]["lengths"]
        tokens, positions = sum(lengths), len(lengths) * max(lengths)
    else:
        tokens, positions = prompts["attention_mask"].sum(), prompts["attention_mask"].numel()
    return tokens, positions - tokens


def _row_lengths(prompts: Mapping[str, Any]) -> list[int]:
    """Return the length of each row, or of each prompt of a packed row. Its positions attend to each other."""
    rows, length = prompts["input_ids"].shape
    return [length] * rows if "attention_mask" in prompts else prompts["packed"]["lengths"]


class FlopCounter:
    """A counter of the FLOPs of training passes, computed from the shapes of their batches.

    A linear layer needs 2 FLOPs per weight and position in the forward pass, 2 more if a gradient passes through it,
    and 2 more if its weight is trained. Attention over all positions is added (PaLM, arXiv 2204.02311, appendix B).
    Padding is counted; recomputation by activation checkpointing is not. Of the Q-Former, only the queries are counted.
    model: the model, which may be divided among processes.
    """

    def __init__(self, model: STLLM) -> None:
        config = config_of(model)
        self.frame_tokens = config.num_query_tokens
        grid = config.vision_config["image_size"] // config.vision_config["patch_size"]
        self.patches = 1 + grid**2
        parts: dict[str, nn.Module] = {name: getattr(model, name) for name in ("vision_encoder", "qformer")}
        parts["frames"] = nn.ModuleList([model.projection, model.video_input])
        parts["decoder"] = model.language_model.get_decoder()
        reached = False  # True if a gradient passes back to this part
        self.forward: dict[str, int] = {}  # FLOPs per position in the forward pass
        self.passes: dict[str, float] = {}  # FLOPs of the whole training pass / FLOPs of the forward pass
        for name, part in parts.items():
            layers = [module for module in part.modules() if isinstance(module, nn.Linear)]
            sizes = [layer.in_features * layer.out_features for layer in layers]
            trained = sum(size for size, layer in zip(sizes, layers, strict=True) if layer.weight.requires_grad)
            reached = reached or any(parameter.requires_grad for parameter in part.parameters())
            self.forward[name] = 2 * sum(sizes)
            self.passes[name] = 1 + reached + trained / max(sum(sizes), 1)
        text, vision = config.text_config, config.vision_config
        self.attention = {  # FLOPs per pair of positions that attend to each other
            "vision_encoder": 4 * vision["depth"] * vision["embed_dim"],
            "decoder": 4 * text.num_hidden_layers * text.hidden_size,
        }
        head: Any = model.get_output_embeddings()
        self.head = 2 * head.in_features * head.out_features * (2 + head.weight.requires_grad)

    def __call__(self, batch: Mapping[str, Any]) -> int:
        """Return the FLOPs of one pass. Nothing is copied from the device. batch: arguments of `STLLM.forward`."""
        media = next(
            (batch[name] for name in ("pixel_values", "vision_features", "query_features") if name in batch), None
        )
        frames = 0 if media is None else media.shape[0] * media.shape[1]
        flops = self._part("frames", frames * self.frame_tokens)
        if "pixel_values" in batch:
            flops += self._part("vision_encoder", frames * self.patches, self.patches)
        if "query_features" not in batch:
            flops += self._part("qformer", frames * self.frame_tokens)
        flops += sum(self._part("decoder", length, length) for length in _row_lengths(batch))
        if (teacher := batch.get("teacher")) is not None:
            lengths = _row_lengths(teacher)
            flops += sum(self._part("decoder", length, length) for length in lengths) / self.passes["decoder"]
        return int(flops + self.head * len(batch["label_positions"]))

    def _part(self, name: str, positions: int, attended: int = 0) -> float:
        each = self.forward[name] + attended * self.attention.get(name, 0)
        return positions * each * self.passes[name]
