"""Which parameters learn, and how fast: weight decay for matrices alone, the projection at a rate of its own."""

from collections.abc import Collection
from typing import Any

from torch import nn

PROJECTION = "projection."


def parameter_groups(
    model: nn.Module,
    *,
    decayed: Collection[str],
    weight_decay: float,
    learning_rate: float,
    projection_lr: float | None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: what trains, by learning rate and by whether it decays; none is empty.

    decayed: names of the parameters with weight decay (transformers' rule: no biases, no norms).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_rate = projection_lr is not None and PROJECTION in name and "adapter" not in name
            groups.setdefault((own_rate, name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr": projection_lr if own_rate else learning_rate,
        }
        for (own_rate, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
