"""What training keeps in memory, computed from parameter counts: weights, gradients and AdamW's states, by strategy.

Not counted: activations, autocast's copies, fragmentation. What each strategy keeps where, in bytes a parameter:
- DDP: 16 where it trains (weight 4, gradient 4, two moments 8; with several GPUs its buckets, 4 more), else 2.
- ZeRO-2 and ZeRO-3: DeepSpeed's own estimates (`estimate_zero{2,3}_model_states_mem_needs`), frozen weights told apart.
- FSDP 2: 16 and 4, shared out; the gathered units are in half precision.
The types are those that runners/train.py trains with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from rich.table import Table

FULL, HALF = 4, 2  # bytes of a number
MOMENTS = 2 * FULL  # AdamW's
STATES = FULL + FULL + MOMENTS  # of a parameter that trains: float32 weight, gradient and moments
NUM_GPUS = (1, 8)  # of one machine


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model: frozen ones, trained ones, and what a device has whole when the rest is shared out.

    largest: of the module with most of its own (ZeRO-3 gathers one by one). gathered: of the largest layer and of all
    that is in no layer (FSDP keeps both at once).
    """

    frozen: int
    trained: int
    largest: int
    gathered: int

    @property
    def all(self) -> int:
        """Frozen and trained ones."""
        return self.frozen + self.trained


def count_parameters(model: nn.Module) -> ParameterCounts:
    """The counts of a model that names its layers in `_no_split_modules`, as transformers' do; tied weights once."""
    layer_names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in layer_names]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    own = [sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()]
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCounts(
        frozen=sum(parameter.numel() for parameter in parameters) - trained,
        trained=trained,
        largest=max(own),
        gathered=max(sizes, default=0) + sum(p.numel() for p in parameters if id(p) not in inside),
    )


def training_memory(
    counts: ParameterCounts, *, half: bool, num_gpus: Sequence[int] = NUM_GPUS
) -> dict[str, dict[str, dict[int, int]]]:
    """Bytes by strategy: `gpu` -> number of GPUs -> of each of them, `host` -> the same number -> of the machine.

    half: bf16 or fp16 with float32 masters; else all in float32, where DeepSpeed is left out.
    host: the larger of what is offloaded and of what loading takes, where every process fills a whole model.
    """
    weight = HALF if half else FULL
    strategies: dict[str, Callable[[int], tuple[float, float]]] = {
        "DDP": lambda gpus: _ddp(counts, weight, gpus),
        "ZeRO-2": lambda gpus: _zero2(counts, gpus, offload=False),
        "ZeRO-2 offload": lambda gpus: _zero2(counts, gpus, offload=True),
        "ZeRO-3": lambda gpus: _zero3(counts, gpus, offload=False),
        "ZeRO-3 offload": lambda gpus: _zero3(counts, gpus, offload=True),
        "FSDP": lambda gpus: _fsdp(counts, weight, gpus, offload=False),
        "FSDP offload": lambda gpus: _fsdp(counts, weight, gpus, offload=True),
    }
    memory: dict[str, dict[str, dict[int, int]]] = {}
    for name, bytes_of in strategies.items():
        if half or not name.startswith("ZeRO"):
            both = {gpus: bytes_of(gpus) for gpus in num_gpus}
            memory[name] = {
                "gpu": {gpus: int(gpu) for gpus, (gpu, _) in both.items()},
                "host": {gpus: int(host) for gpus, (_, host) in both.items()},
            }
    return memory


# Each returns the bytes of one GPU and those of its machine.


def _ddp(counts: ParameterCounts, weight: int, gpus: int) -> tuple[float, float]:
    buckets = FULL if gpus > 1 else 0
    return weight * counts.frozen + (STATES + buckets) * counts.trained, 0


def _zero2(counts: ParameterCounts, gpus: int, *, offload: bool) -> tuple[float, float]:
    weights, states = HALF * counts.all, STATES * counts.trained
    loading = weights * gpus
    if offload:
        return weights, max(states, loading)
    return weights + (states + HALF * counts.trained) / gpus, loading  # the gradient in half precision too


def _zero3(counts: ParameterCounts, gpus: int, *, offload: bool) -> tuple[float, float]:
    shared = HALF * counts.all + STATES * counts.trained
    loading = HALF * counts.all * gpus
    whole = 2 * HALF * counts.largest  # the weights and their gradient
    return (whole, max(shared, loading)) if offload else (whole + shared / gpus, loading)


def _fsdp(counts: ParameterCounts, weight: int, gpus: int, *, offload: bool) -> tuple[float, float]:
    shared = FULL * counts.frozen + STATES * counts.trained
    loading = FULL * counts.all * gpus
    whole = 2 * weight * counts.gathered  # the weights and their gradient
    return (whole, max(shared, loading)) if offload else (whole + shared / gpus, loading)


def memory_table(memory: Mapping[str, Mapping[str, Mapping[int, int]]], precision: str) -> "Table":
    """The figures in GiB, a row a strategy."""
    from rich.table import Table

    title = f"training in {precision} with AdamW, GiB, computed; activations come on top"
    table = Table(title=title)
    table.add_column("strategy")
    gpus = list(next(iter(memory.values()))["gpu"])
    for number in gpus:
        table.add_column("1 GPU" if number == 1 else f"each of {number} GPUs", justify="right")
    for number in gpus:
        table.add_column("host, 1 GPU" if number == 1 else f"host, {number} GPUs", justify="right")
    for name, figures in memory.items():
        cells: list[Any] = [figures[where][number] for where in ("gpu", "host") for number in gpus]
        table.add_row(name, *(f"{size / 2**30:.1f}" for size in cells))
    return table
