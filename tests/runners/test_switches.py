"""Every switch of training on configs/tiny/train.yaml, from one list of override sets: `pytest -m slow -k switches`."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from stllm.toy.world import write_world
from tests.helpers.training import ROOT, losses, read_log, train
from tests.helpers.twins import twins

pytestmark = pytest.mark.slow

RECIPE = ROOT / "configs" / "tiny" / "train.yaml"
STEPS = 4
COMMON = [f"run.max_steps={STEPS}", "run.logging_steps=1", "run.save_steps=2", "run.use_cpu=true"]
# Dropout is drawn by each process for itself, and in another order where layers are computed again or compiled.
COMMON += ["model.qformer.dropout=0.0", "run.dataloader_num_workers=0"]

# Name -> overrides, and how far its losses may be from the plain run's, relatively; None: they are others.
SETS: dict[str, tuple[list[str], float | None]] = {
    "workers": (["run.dataloader_num_workers=2"], 1e-6),
    "packing": (["run.packing=true"], 1e-4),
    "eager": (["model.attn_implementation=eager"], 1e-4),
    "packing-eager": (["run.packing=true", "model.attn_implementation=eager"], 1e-4),
    "compile": (["run.torch_compile=true"], 1e-4),
    "checkpointing": (["run.gradient_checkpointing=true"], 1e-4),
    "checkpointing-packing": (["run.gradient_checkpointing=true", "run.packing=true"], 1e-4),
    "accumulation": (["run.per_device_train_batch_size=4", "run.gradient_accumulation_steps=2"], None),
    "bucket": (["run.mask_bucket=8"], None),
    "bfloat16": (["run.bf16=true"], 0.02),
    "bfloat16-packing": (["run.bf16=true", "run.packing=true"], 0.02),
    "profile": (["run.profile_steps=[2, 3]"], 1e-6),
    "validation": (
        [
            *("run.eval_strategy=steps", "run.eval_steps=2", "run.eval_benchmark={mvbench}"),
            *("datasets.toy_caption.split=val", "datasets.toy_state.val_fraction=0.2"),
            "run.load_best_model_at_end=true",
        ],
        None,
    ),
    "qlora": (["model.quantization=4bit", "model.lora_r=4", "model.freeze_LLM=true"], None),
    "fsdp": (["run.fsdp=true"], 1e-4),
    "zero2": (["run.deepspeed=configs/deepspeed/zero2.json"], 1e-4),
    "zero3": (["run.deepspeed=configs/deepspeed/zero3.json"], 1e-4),
}
TWO = {"fsdp", "zero2", "zero3"}  # in two processes, with half of the batch each
NEEDS = {"qlora": "bitsandbytes", "zero2": "deepspeed", "zero3": "deepspeed"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "toy"
    write_world(folder, num_train=48, num_test=2, seed=1)
    return folder


@pytest.fixture(scope="module")
def plain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[float]]]:
    """The losses of the run without any switch: in one process, and in two."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"plain{processes}")
        run(world, folder, [], processes)
        found[processes] = losses(folder)
    return found


def run(world: Path, folder: Path, options: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    half = ["run.per_device_train_batch_size=4"] if processes == 2 else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_ROOT", str(world))
        return train(RECIPE, *COMMON, *half, *options, f"run.output_dir={folder}", processes=processes)


@pytest.mark.parametrize("name", SETS)
def test_a_switch_trains_the_tiny_recipe(
    name: str, world: Path, plain: dict[int, list[list[float]]], tmp_path: Path
) -> None:
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    options, distance = SETS[name]
    processes = 2 if name in TWO else 1
    run(world, tmp_path / "run", [option.format(mvbench=twins() / "mvbench") for option in options], processes)
    log, found = [line for line in read_log(tmp_path / "run") if "loss" in line], plain[processes]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    learned = [[line[key] for key in ("loss", "loss_lm", "loss_mvm")] for line in log]
    if distance is not None:
        assert learned == [pytest.approx(line, rel=distance) for line in found]
    else:
        assert learned != found and all(0 < loss < 20 for line in learned for loss in line)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    if name == "profile":
        assert list((tmp_path / "run" / "profile").iterdir())
    if name == "validation":
        assert [line["step"] for line in read_log(tmp_path / "run") if "eval_loss" in line] == [2, 4]
