"""Dividing a model among processes while its weights are read, so that no process holds the whole model.

FSDP 2 makes each weight a `DTensor` before it is read, and each process reads its own rows. DeepSpeed's ZeRO-3 can only
divide existing weights, as `deepspeed.zero.Init` does: each weight is divided right after it was read.
Sources: torch.distributed.fsdp.fully_shard; ZeRO (arXiv 1910.02054), deepspeed.runtime.zero.partition_parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, get_module_children_bottom_up
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from stllm.models.checkpoints.load import CopyRows, Division
from stllm.runners.arguments import half_precision


def division_of(args: TrainingArguments) -> Division | None:
    """Return the method that divides the weights while they are read; None if each process reads all weights.

    FSDP 1 can only divide a loaded model. The same holds for FSDP's own activation checkpointing, which renames
    weights. ZeRO-1 and ZeRO-2 do not divide the weights.
    """
    plugin: dict[str, Any] = args.fsdp_plugin_args or {}
    if args.fsdp and plugin.get("fsdp_version") == 2 and not plugin.get("activation_checkpointing"):
        return FSDP2(args)
    return ZeRO3(args) if args.deepspeed and args.hf_deepspeed_config.is_zero3() else None


class FSDP2:
    """FSDP 2, with the units of `run.fsdp_config`. accelerate does not change a model that is already divided."""

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self.plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        self.device = torch.device("cpu") if isinstance(self.plugin.cpu_offload, CPUOffloadPolicy) else args.device

    def begin(self, model: nn.Module) -> None:
        """See `Division`."""
        self.plugin.set_auto_wrap_policy(model)
        is_unit = fsdp2_prepare_auto_wrap_policy(self.plugin, model)
        options = {
            "mesh": init_device_mesh(self.args.device.type, (dist.get_world_size(),)),
            "reshard_after_forward": self.plugin.reshard_after_forward,
            "offload_policy": self.plugin.cpu_offload,
            "mp_policy": MixedPrecisionPolicy(param_dtype=half_precision(self.args), reduce_dtype=torch.float32),
        }
        for module in get_module_children_bottom_up(model)[:-1]:
            if is_unit is not None and is_unit(module):
                fully_shard(module, **options)
        fully_shard(model, **{**options, "reshard_after_forward": False})
        # sharding renamed the classes of the units, so accelerate would not find them
        self.args.fsdp_plugin_args["auto_wrap_policy"] = "NO_WRAP"

    def read(self, old: Tensor, copy: CopyRows) -> Tensor:
        """See `Division`. FSDP divides by rows; the last ranks may have fewer rows, or none."""
        new: Any = torch.empty_like(old, device=self.device, requires_grad=False)
        if not isinstance(old, DTensor):
            copy(new)
        elif (rows := new.to_local()).numel():
            rows_each = -(-old.shape[0] // old.device_mesh.size())
            copy(rows, rows_each * old.device_mesh.get_local_rank())
        return new


class ZeRO3:
    """DeepSpeed's ZeRO-3. Rank 0 reads each weight, DeepSpeed sends it to all processes, and each keeps a part.

    During this each process holds the one whole weight. Buffers are not divided.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.device, self.config = args.device, args.hf_deepspeed_config.config
        self.space = torch.empty(0)  # memory for one whole weight, reused, since new memory for each would fragment
        self.divided: Any = None  # the first divided weight, which can divide others

    def begin(self, model: nn.Module) -> None:
        """See `Division`."""
        for buffer in model.buffers():
            buffer.data = buffer.data if buffer.is_meta else buffer.data.to(self.device)
        self._divide([weight for weight in model.parameters() if not weight.is_meta])

    def read(self, old: Tensor, copy: CopyRows) -> Tensor:
        """See `Division`."""
        if not isinstance(old, nn.Parameter):
            new = torch.empty_like(old, device=self.device)
            copy(new)
            return new
        if old.numel() > len(self.space) or old.dtype != self.space.dtype:
            self.space = torch.empty(old.numel(), dtype=old.dtype, device=self.device)
        weight = nn.Parameter(self.space[: old.numel()].view(old.shape), requires_grad=old.requires_grad)
        if dist.get_rank() == 0:
            copy(weight.data)
        self._divide([weight])
        return weight

    def _divide(self, weights: Sequence[nn.Parameter]) -> None:
        import deepspeed

        if self.divided is not None:
            self.divided.convert_to_zero_parameters(param_list=weights)
        elif weights:
            deepspeed.init_distributed()  # uses torch's process group
            deepspeed.zero.Init(module=nn.ParameterList(weights), config_dict_or_path=self.config)
            self.divided = weights[0]
