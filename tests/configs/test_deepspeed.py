"""configs/deepspeed: only documented keys, and `auto` for every value that the Trainer can fill in."""

import json
from pathlib import Path
from typing import Any

import pytest

from stllm.common.run_section import DEEPSPEED

FILES = sorted(DEEPSPEED.glob("*.json"))
SIZES = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
# of DeepSpeed's "configuration JSON" page; all four files, filled in by the Trainer, pass its DeepSpeedConfig (0.19.8)
KEYS = {
    "bf16": {"enabled"},
    "fp16": {"enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"},
    "zero_optimization": {
        *("stage", "overlap_comm", "contiguous_gradients", "reduce_bucket_size", "sub_group_size"),
        *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
        *("stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
        *("offload_optimizer", "offload_param"),
    },
}


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_there_are_four_deepspeed_configurations() -> None:
    assert [path.stem for path in FILES] == ["zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keys_are_documented_and_batch_sizes_are_auto(path: Path) -> None:
    found = read(path)
    assert set(found) == {*SIZES, *KEYS}
    assert all(found[key] == "auto" for key in SIZES)
    assert found["bf16"]["enabled"] == found["fp16"]["enabled"] == "auto"
    for section, keys in KEYS.items():
        assert set(found[section]) <= keys
    zero = found["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    assert ("offload_optimizer" in zero) == path.stem.endswith("_offload")
    assert ("offload_param" in zero) == (path.stem == "zero3_offload")
