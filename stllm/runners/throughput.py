"""What a training run achieves between two lines of its log: losses, samples and tokens a second, use of the device."""

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

MEASURED = ("loss", "loss_lm", "loss_mvm", "kept_visual_tokens", "accuracy")  # of each micro-batch, where it has them
# sums over micro-batches and processes
COUNTED = ("samples", "clips", "tokens", "positions", "padding", "flops", "waited")
# Dense FLOP/s in bfloat16 (NVIDIA's data sheets), by a part of the device's name; the first that fits
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the FLOP/s that the device reaches at most in bfloat16; None where they are not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class StepMeter:
    """Sums over the micro-batches since the last line of the log.

    device: where the losses are. peak: FLOP/s that one process's device reaches at most; None: not known.
    step: of the last line.
    """

    def __init__(self, device: torch.device, peak: float | None = None) -> None:
        self.device, self.peak, self.step = device, peak, 0
        # in float64: float32 sums of long windows would show; not on Apple's GPU, which lacks it
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self._begin()

    def _begin(self) -> None:
        self.sums = torch.zeros(len(MEASURED), dtype=self.dtype, device=self.device)
        self.counts = [0] * len(MEASURED)  # micro-batches that had the figure
        self.totals: dict[str, Any] = dict.fromkeys(COUNTED, 0)
        self.started = time.perf_counter()

    def add(self, figures: Mapping[str, Any]) -> None:
        """Add one micro-batch of this process. figures: those in MEASURED, scalars; None or absent where it has none.

        Nothing here waits for the device.
        """
        values = [figures.get(name) for name in MEASURED]
        known = [
            value.detach().to(self.sums)
            if isinstance(value, Tensor)
            else torch.full((), value or 0, dtype=self.dtype, device=self.device)  # a copy of a number would wait
            for value in values
        ]
        self.sums += torch.stack(known)
        self.counts = [count + (value is not None) for count, value in zip(self.counts, values, strict=True)]

    def count(self, **counts: Any) -> None:
        """Add to the sums in COUNTED; numbers, or tensors on the device. waited: seconds until a batch was ready."""
        for name, value in counts.items():
            self.totals[name] = self.totals[name] + value

    def read(self, step: int) -> dict[str, float | None]:
        """Return the figures up to this step, the same on every process, and begin anew. A collective call.

        Losses are means over the optimizer steps, loss = loss_lm + loss_mvm; the others are means over micro-batches.
        A figure that no micro-batch had is None. padding: its share of the positions of padded batches, teachers'
        included; packing saves it. data_wait: the share of the time in which no batch was ready.
        mfu: model FLOPs as a share of what the devices reach at most; None where that is not known.
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
        if self.device.type == "cuda":  # MiB that torch allocated, elsewhere that this process took
            figures["peak_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            figures["peak_memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
        self.step = step
        self._begin()
        return figures


def padding_of(prompts: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a batch's tokens and what padding it has, or would have without packing. Nothing is read from the device.

    prompts: of `processors.sequences.pad_sequences`.
    """
    if "packed" in prompts:
        lengths = prompts["packed"]["lengths"]
        tokens, positions = sum(lengths), len(lengths) * max(lengths)
    else:
        tokens, positions = prompts["attention_mask"].sum(), prompts["attention_mask"].numel()
    return tokens, positions - tokens


def _row_lengths(prompts: Mapping[str, Any]) -> list[int]:
    """The positions that attend to each other, of each row or packed prompt."""
    rows, length = prompts["input_ids"].shape
    return prompts["packed"]["lengths"] if "packed" in prompts else [length] * rows


class FlopCounter:
    """Counts the FLOPs of training passes from the shapes of their batches.

    Two for each weight of a linear layer and each position forward; as many again where a gradient passes through the
    layer, and where its weight trains; and those of attention over all positions (PaLM, arXiv 2204.02311, appendix B).
    Padding counts; what checkpointing computes again does not. The Q-Former counts with its queries alone.
    model: which may be divided among processes.
    """

    def __init__(self, model: STLLM) -> None:
        config = config_of(model)
        self.frame_tokens = config.num_query_tokens
        grid = config.vision_config["image_size"] // config.vision_config["patch_size"]
        self.patches = 1 + grid**2
        parts: dict[str, nn.Module] = {name: getattr(model, name) for name in ("vision_encoder", "qformer")}
        parts["frames"] = nn.ModuleList([model.projection, model.video_input])
        parts["decoder"] = model.language_model.get_decoder()
        reached = False  # whether a gradient comes back to this part
        self.forward: dict[str, int] = {}  # FLOPs a position
        self.passes: dict[str, float] = {}  # all of a training pass, over the forward ones
        for name, part in parts.items():
            layers = [module for module in part.modules() if isinstance(module, nn.Linear)]
            sizes = [layer.in_features * layer.out_features for layer in layers]
            trained = sum(size for size, layer in zip(sizes, layers, strict=True) if layer.weight.requires_grad)
            reached = reached or any(parameter.requires_grad for parameter in part.parameters())
            self.forward[name] = 2 * sum(sizes)
            self.passes[name] = 1 + reached + trained / max(sum(sizes), 1)
        text, vision = config.text_config, config.vision_config
        self.attention = {  # FLOPs a position and a position that it attends to
            "vision_encoder": 4 * vision["depth"] * vision["embed_dim"],
            "decoder": 4 * text.num_hidden_layers * text.hidden_size,
        }
        head: Any = model.get_output_embeddings()
        self.head = 2 * head.in_features * head.out_features * (2 + head.weight.requires_grad)

    def __call__(self, batch: Mapping[str, Any]) -> int:
        """Return the FLOPs of one pass. batch: arguments of `STLLM.forward`; nothing is read from the device."""
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
