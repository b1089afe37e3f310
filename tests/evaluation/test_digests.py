"""Digests: equal for equal checkpoints wherever they lie, another one for every change that training makes."""

import shutil
from pathlib import Path

import numpy as np

from stllm.evaluation import runs
from stllm.evaluation.runs import checkpoint_digest, content_digest
from stllm.models.checkpoints.formats import open_source
from tests.helpers.evaluation import CHECKPOINT


def of(folder: Path) -> str:
    return checkpoint_digest([open_source(folder)])


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHECKPOINT, tmp_path / "another name"))
    assert of(copy) == of(CHECKPOINT)
    (copy / "mvbench.results.json").write_text("{}")  # of an evaluation that was written there
    (copy / "log.jsonl").write_text("{}")
    assert of(copy) == of(CHECKPOINT)
    weights = copy / "pytorch_model-00002-of-00002.bin"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert of(copy) != of(CHECKPOINT)


def test_tokenizer_and_configuration_belong_to_it(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model"):
        copy = Path(shutil.copytree(CHECKPOINT, tmp_path / name))
        with (copy / name).open("ab") as stream:
            stream.write(b" ")
        assert of(copy) != of(CHECKPOINT)


def test_a_large_file_is_sampled_all_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "SMALL", 1000)
    monkeypatch.setattr(runs, "STRIDE", 100)
    monkeypatch.setattr(runs, "BLOCK", 10)
    content = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    path = tmp_path / "model.safetensors"

    def blocks(values: np.ndarray) -> list[bytes]:
        path.write_bytes(values.tobytes())
        return list(runs._blocks(path, path.stat().st_size))

    before = blocks(content)
    assert sum(map(len, before)) == 510
    for start in (0, 1700, 4995):
        changed = content.copy()
        changed[start : start + 100] ^= 1
        assert blocks(changed) != before


def test_the_order_of_keys_does_not_matter_their_values_do() -> None:
    assert content_digest({"a": 1, "b": [2]}) == content_digest({"b": [2], "a": 1})
    assert content_digest({"a": 1}) != content_digest({"a": 2})
    assert len(content_digest("")) == 16
