"""Choice of device and dtype, seeding, and recognition of out-of-memory errors."""

import errno
import random

import numpy as np
import pytest
import torch

from stllm.common.device import resolve_device, resolve_dtype, seed_everything
from stllm.common.errors import UserError, out_of_memory

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False, capability=(9, 0)) -> None:
    """Make torch report this number of GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "device"),
    [
        (0, False, "auto", "cpu"),
        (0, True, "auto", "mps"),
        (2, False, "auto", "cuda:0"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cpu", "cpu"),
        (0, True, "mps", "mps"),
    ],
)
def test_the_requested_device_or_the_best_one_is_chosen(monkeypatch, gpus, mps, name, device) -> None:
    pretend(monkeypatch, gpus=gpus, mps=mps)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_under_torchrun_gets_its_gpu(monkeypatch, name) -> None:
    pretend(monkeypatch, gpus=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device(name) == torch.device("cuda:3")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "device 'cuda:0' is not there: this machine has cpu; use one, or auto"),
        ("cuda:3", "device 'cuda:3' is not there: this machine has cpu; use one, or auto"),
        ("mps", "device 'mps' is not there: this machine has cpu; use one, or auto"),
        ("cudda", "unknown device 'cudda': expected auto, cpu, cuda, cuda:N or mps; did you mean 'cuda'?"),
    ],
)
def test_the_error_for_an_absent_device_lists_those_present(monkeypatch, name, message) -> None:
    pretend(monkeypatch)
    with pytest.raises(UserError) as caught:
        resolve_device(name)
    assert str(caught.value) == message


def test_more_processes_than_gpus_is_an_error(monkeypatch) -> None:
    pretend(monkeypatch, gpus=1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="this machine has cpu, cuda:0"):
        resolve_device("auto")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.float32),
        ("float16", torch.float16),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
    ],
)
def test_dtype_on_a_cpu(name, dtype) -> None:
    assert resolve_dtype(name, CPU) == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_the_default_dtype_on_a_gpu_depends_on_its_capability(monkeypatch, capability, dtype) -> None:
    pretend(monkeypatch, gpus=1, capability=capability)
    assert resolve_dtype("auto", torch.device("cuda:0")) == dtype


def test_an_unknown_dtype() -> None:
    with pytest.raises(UserError, match=r"unknown dtype 'floot16'.*did you mean 'float16'"):
        resolve_dtype("floot16", CPU)


def test_equal_seeds_give_equal_random_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        seed_everything(5)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
    with pytest.raises(UserError, match="seed -1 is out of range"):
        seed_everything(-1)


def chained() -> RuntimeError:
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("loading failed") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            True,
        ),
        (RuntimeError("MPS backend out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (chained(), True),
        (RuntimeError("shapes differ"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory(error, expected) -> None:
    assert out_of_memory(error) is expected


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**50)
    assert out_of_memory(caught.value)
