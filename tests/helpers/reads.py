"""Counts, on a CPU, the operations that would make a GPU wait."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DeviceReads(TorchDispatchMode):
    """Collects the operations that read a value from the device. A GPU would wait at each of them."""

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> "DeviceReads":
        for name in ("tolist", "numpy"):  # no operations
            self.patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.found.append(name)
            return original(*args)

        return call

    def __exit__(self, *error: Any) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple)) else ()
        boolean = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if boolean or name.strip("_").startswith(self.READING) or name in self.READING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
