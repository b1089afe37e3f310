"""Weight files read with bounded memory: shapes from the header, tensors copied out of a short-lived memory mapping.

Pages of a mapping that were touched count as the process's memory for as long as it lives, so the file is mapped anew
after every `MAPPED_BYTES` or thirty-second part of it. What is handed out is a copy: the file may be replaced as soon
as loading is over.
"""

import math
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stllm.common.device import out_of_memory
from stllm.common.errors import UserError

MAPPED_BYTES = 64 << 20
CONTAINERS = ("model", "state_dict", "module")  # where training scripts put the weights
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor that was not read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(ABC):
    """Named tensors that can be copied out one by one."""

    specs: dict[str, Spec]

    @abstractmethod
    def copy_to(self, key: str, destination: Tensor) -> None:
        """Copies a tensor into one of the same shape, on any device and of any type."""

    def read(self, key: str) -> Tensor:
        """A copy of the tensor, in its own type, in main memory."""
        spec = self.specs[key]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self.copy_to(key, tensor)
        return tensor


class WeightFile(Weights):
    """One file, mapped while it is read and never for long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._budget = max(MAPPED_BYTES, path.stat().st_size // 32)
        self._mapped: Any = None
        self._touched = 0
        try:
            self.specs = self._read_specs()
        except UserError:
            raise
        except pickle.UnpicklingError as error:
            raise UserError(_not_only_tensors(path, error)) from error
        except Exception as error:  # torch and safetensors raise many kinds; the sentence keeps the cause
            if out_of_memory(error):
                raise
            raise UserError(_unreadable(path, error)) from error
        self._release()

    def copy_to(self, key: str, destination: Tensor) -> None:
        """In slices that fit the budget, so that the largest tensor costs no more than the smallest."""
        spec = self.specs[key]
        size = math.prod(spec.shape) * spec.dtype.itemsize
        if not spec.shape or size <= self._budget:
            destination.copy_(self._slice(key, None, size))
            return
        rows = max(1, self._budget * spec.shape[0] // size)
        for start in range(0, spec.shape[0], rows):
            stop = min(start + rows, spec.shape[0])
            part = self._slice(key, slice(start, stop), size * (stop - start) // spec.shape[0])
            destination[start:stop].copy_(part)

    def _slice(self, key: str, rows: slice | None, size: int) -> Tensor:
        if self._touched + size > self._budget:
            self._release()
        if self._mapped is None:
            self._mapped = self._map()
        self._touched += size
        return self._take(key, rows)

    def _release(self) -> None:
        self._mapped = None
        self._touched = 0

    @abstractmethod
    def _read_specs(self) -> dict[str, Spec]: ...

    @abstractmethod
    def _map(self) -> Any: ...

    @abstractmethod
    def _take(self, key: str, rows: slice | None) -> Tensor: ...


class TorchFile(WeightFile):
    """A .bin or .pth file written by `torch.save`."""

    def _read_specs(self) -> dict[str, Spec]:
        # files older than torch 1.6 are no zip archives and can't be mapped: they are held whole
        self._mappable = zipfile.is_zipfile(self.path)
        state = self._map()
        self._held = None if self._mappable else state
        return {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}

    def _map(self) -> dict[str, Tensor]:
        if not self._mappable and getattr(self, "_held", None) is not None:
            return self._held  # type: ignore[return-value]  # just checked
        if not self._mappable:
            with self.path.open("rb") as stream:
                if stream.read(1) != b"\x80":  # the pickle protocol mark that every torch.save begins with
                    raise ValueError("it is neither a file of torch.save nor of safetensors")
        content = torch.load(self.path, map_location="cpu", mmap=self._mappable, weights_only=True)
        return _state_dict(content, self.path)

    def _take(self, key: str, rows: slice | None) -> Tensor:
        tensor = self._mapped[key]
        return tensor if rows is None else tensor[rows]


class SafetensorsFile(WeightFile):
    """A .safetensors file."""

    def _read_specs(self) -> dict[str, Spec]:
        with self._map() as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  # no mapping
            return {
                key: Spec(tuple(view.get_shape()), SAFETENSORS_DTYPES[view.get_dtype()]) for key, view in slices.items()
            }

    def _map(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="pt")

    def _take(self, key: str, rows: slice | None) -> Tensor:
        return self._mapped.get_tensor(key) if rows is None else self._mapped.get_slice(key)[rows]


class MemoryWeights(Weights):
    """Tensors that are in memory already; each is let go once it was copied."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)
        self.specs = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}

    def copy_to(self, key: str, destination: Tensor) -> None:
        destination.copy_(self._state.pop(key))


class ShardedWeights(Weights):
    """Several files as one. files: in reading order."""

    def __init__(self, files: Iterable[WeightFile]) -> None:
        self.files = list(files)
        self._home = {key: file for file in self.files for key in file.specs}
        # in file order, so that each file is read through once
        self.specs = {key: file.specs[key] for key, file in self._home.items()}

    def copy_to(self, key: str, destination: Tensor) -> None:
        self._home[key].copy_to(key, destination)


def open_weights(paths: Iterable[Path]) -> Weights:
    """Opens weight files by their ending. Raises UserError when one is damaged or no weight file."""
    files = [SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path) for path in paths]
    return files[0] if len(files) == 1 else ShardedWeights(files)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights in what a training script saved: at the top, or under `model`."""
    if isinstance(content, Mapping):
        for container in (content, *(content.get(name) for name in CONTAINERS)):
            if isinstance(container, Mapping):
                tensors = {str(key): value for key, value in container.items() if isinstance(value, Tensor)}
                if tensors:
                    return tensors
    raise UserError(f"{path} holds no weights: expected a state dict, at the top or under 'model'")


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    size = path.stat().st_size
    if size == 0:
        return f"{path} is empty, expected weights: copy or download it again"
    with path.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a git-lfs pointer, not the weights: fetch them with `git lfs pull`"
    if start.startswith(b"PK"):
        return (
            f"{path} ends too early ({size} bytes; the directory at its end is missing): it was cut off or is still "
            "being written; copy or download it again"
        )
    return (
        f"{path} can't be read as weights ({size} bytes; {reason}): it is damaged or cut off, copy or download it again"
    )


def _not_only_tensors(path: Path, error: Exception) -> str:
    return (
        f"{path} holds Python objects beside its tensors, which are never loaded because they could run code: save its "
        "state dict alone (torch.save(model.state_dict(), ...)) where the file comes from"
    )
