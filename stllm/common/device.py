"""Choice of device and dtype, and seeding, for the whole package. torch is imported when a function needs it."""

import os
import random
import re
from typing import TYPE_CHECKING

from stllm.common.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICE_PATTERN = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def resolve_device(name: str = "auto") -> "torch.device":
    """Return the device of that name: auto, cpu, cuda, cuda:N or mps.

    auto: CUDA, else Apple's GPU, else the CPU. Under torchrun, `auto` and `cuda` mean the GPU numbered LOCAL_RANK.
    Raises UserError for a device that is absent (listing those present) or a name that is not a device.
    """
    import torch

    if not DEVICE_PATTERN.fullmatch(name):
        guess = did_you_mean(name, ("auto", "cpu", "cuda", "mps"))
        raise UserError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:N or mps{guess}")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if num_gpus else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    present = ["cpu", *(f"cuda:{index}" for index in range(num_gpus)), *(["mps"] if mps else [])]
    if name not in present:
        raise UserError(f"device {name!r} is not there: this machine has {', '.join(present)}; use one, or auto")
    return torch.device(name)


def resolve_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """Return the floating-point type of that name: auto, float32, bfloat16, float16 (or fp32, bf16, fp16).

    auto: bfloat16 on a GPU that computes in it, float16 on an older one, float32 on the CPU and on Apple's GPU.
    Raises UserError for any other name.
    """
    import torch

    full = DTYPE_ALIASES.get(name, name)
    if full not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: expected {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")
    if full == "auto":
        full = "float32"
        if device.type == "cuda":
            # ROCm devices support bfloat16; NVIDIA's do from compute capability 8.0 on
            native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
            full = "bfloat16" if native else "float16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[full]


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, for libraries; stllm passes generators explicitly.

    Raises UserError for a seed outside numpy's range, 0 to 2**32 - 1.
    """
    import numpy as np
    import torch

    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is out of range: expected 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
