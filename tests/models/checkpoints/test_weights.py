"""Weight files: shapes without reading weights, copies in slices, all types of files, and damaged files."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stllm.common.errors import UserError
from stllm.models.checkpoints import weights as module
from stllm.models.checkpoints.weights import WeightFiles, open_views, split_biases


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(37, 5),
        "half": torch.randn(64, 3).half(),
        "brain": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(3.5),
        "ids": torch.arange(7),
    }


def save(tensors: dict[str, torch.Tensor], path: Path, kind: str) -> None:
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        content = {"model": tensors, "epoch": 3} if kind == "nested" else tensors
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")


@pytest.mark.parametrize("kind", ["bin", "nested", "legacy", "safetensors"])
@pytest.mark.parametrize("mapped_bytes", [16, 1 << 20])
def test_tensors_are_copied_equal_in_slices_of_any_size(
    tensors: dict[str, torch.Tensor], tmp_path: Path, kind: str, mapped_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAPPED_BYTES", mapped_bytes)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.bin")
    save(tensors, path, kind)
    weights = WeightFiles([path])
    specs = {key: (spec.shape, spec.dtype) for key, spec in weights.specs.items()}
    assert specs == {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    assert all(spec.is_meta for spec in weights.specs.values())
    for key, tensor in tensors.items():
        assert torch.equal(weights.read(key), tensor)
        converted = torch.empty(tensor.shape, dtype=torch.float64)
        weights.copy_to(key, converted)
        assert torch.equal(converted, tensor.double())


def test_the_file_may_be_replaced_after_reading(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    save(tensors, path, "bin")
    read = WeightFiles([path]).read("a")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(read, tensors["a"])


def test_several_files_are_read_as_one_set_of_weights(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save({"a": tensors["a"]}, tmp_path / "1.bin", "bin")
    save({"half": tensors["half"]}, tmp_path / "2.safetensors", "safetensors")
    weights = WeightFiles([tmp_path / "1.bin", tmp_path / "2.safetensors"])
    assert list(weights.specs) == ["a", "half"]
    assert torch.equal(weights.read("half"), tensors["half"])


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping is closed before more than MAPPED_BYTES of it were read."""
    monkeypatch.setattr(module, "MAPPED_BYTES", 1 << 16)
    torch.save({str(i): torch.zeros(1 << 14) for i in range(8)}, tmp_path / "weights.bin")  # 64 KiB each
    weights = WeightFiles([tmp_path / "weights.bin"])
    maps = 0

    def counting(path: Path) -> Mapping[str, Any]:
        nonlocal maps
        maps += 1
        return open_views(path)

    monkeypatch.setattr(module, "open_views", counting)
    for key in weights.specs:
        weights.read(key)
        assert weights._touched <= 1 << 16
    assert maps == 8


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_reported(tensors: dict[str, torch.Tensor], tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    save(tensors, path, "safetensors" if name.endswith("safetensors") else "bin")
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(UserError, match=r"empty|cut off"):
        WeightFiles([path])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"just some text, no weights", "can't be read as weights"),
        (b"<html>404</html>", "can't be read as weights"),
        (LFS, "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: bytes, words: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        WeightFiles([tmp_path / name])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(run="me")}, "could run code"),
        ({"epoch": 3}, "holds no weights"),
    ],
)
def test_python_objects_are_never_loaded(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(UserError, match=words):
        WeightFiles([tmp_path / "w.bin"])


def test_a_fused_bias_is_split(tmp_path: Path) -> None:
    """The part for the attention keys must be zero, see also test_foreign.py."""
    fused = torch.cat([torch.full((4,), 1.0), torch.zeros(4), torch.full((4,), 3.0)])
    save_file({"layers.7.qkv.bias": fused, "layers.7.qkv.weight": torch.ones(12, 4)}, tmp_path / "w.safetensors")
    weights = split_biases(tmp_path, WeightFiles([tmp_path / "w.safetensors"]))
    parts = {key: weights.read(key).tolist() for key in weights.specs if key.endswith("bias")}
    assert parts == {"layers.7.q_bias": [1.0] * 4, "layers.7.v_bias": [3.0] * 4}
    assert weights.specs.keys() - parts.keys() == {"layers.7.qkv.weight"}
