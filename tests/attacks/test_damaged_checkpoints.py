"""Damaged or incomplete training checkpoints: the error names the file and the last complete checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.cli import main
from tests.helpers.training import read_log, train, write_recipe

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
FILES = (*STATES, "trainer_state.json", "run_state.json", "model.safetensors", "config.json")
RUN: dict[str, Any] = {"max_steps": 4, "save_steps": 2}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def other_type(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text("[1, 2]")
    elif path.suffix == ".safetensors":
        path.write_bytes((2).to_bytes(8, "little") + b"[]")
    else:
        torch.save([torch.zeros(2)], path)


def other_keys(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text('{"a": 1}')
    elif path.suffix == ".safetensors":
        path.write_bytes((2).to_bytes(8, "little") + b"{}")
    else:
        torch.save({"a": torch.zeros(2)}, path)


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run killed before its end, with checkpoint-2 and checkpoint-4, and its recipe."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "recipe.yaml", toy, **RUN)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    for path in (folder / "run").glob("*"):
        if path.name in ("config.json", "model.safetensors"):
            path.unlink()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Return a copy of the run's folder, and the command that resumes it."""
    shutil.copytree(trained / "run", tmp_path / "run")
    recipe = trained / "recipe.yaml"
    return tmp_path / "run", ["train", "--cfg-path", str(recipe), "--options", f"run.output_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    "damage", [cut, other_keys, *(pytest.param(one, marks=pytest.mark.slow) for one in (empty, garble, other_type))]
)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_a_checkpoint_is_reported(
    file: str, damage: Callable[[Path], None], run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = run
    if file == "config.json" and damage is other_keys:
        return  # training takes the configuration from the recipe
    damage(folder / "checkpoint-4" / file)
    assert main(words) == 1
    message = capsys.readouterr().err
    stem = {"rng_state.pth": "rng_state", "model.safetensors": ""}.get(file, file)
    assert stem in message and str(folder / "checkpoint-4") in message and "error: unexpected" not in message
    if not (file == "model.safetensors" and damage is other_keys):
        assert f"the last whole checkpoint is {folder / 'checkpoint-2'}: remove checkpoint-4" in message
    shutil.rmtree(folder / "checkpoint-4")
    if damage is cut and file == "optimizer.pt":  # the advice works
        assert main(words) == 0
        assert [line["step"] for line in read_log(folder)] == [1, 2, 3, 4]


@pytest.mark.parametrize("file", [*STATES, "run_state.json"])
def test_a_missing_file_of_a_checkpoint_is_reported(
    file: str, run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = run
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / file).unlink()
    assert main(words) == 1
    message = capsys.readouterr().err
    assert f"checkpoint-4 cannot be continued from: {file} is missing" in message and "error: unexpected" not in message


def test_resuming_only_the_model(run: tuple[Path, list[str]]) -> None:
    """The learning-rate schedule resumes at the step; a restarted one would have other rates."""
    folder, words = run
    whole = read_log(folder)
    shutil.rmtree(folder / "checkpoint-4")
    for file in STATES:
        (folder / "checkpoint-2" / file).unlink()
    assert main([*words, "run.resume_only_model=True"]) == 0
    lines = read_log(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in whole]
    assert lines[:2] == whole[:2] and lines[3]["loss"] != whole[3]["loss"]  # a new optimizer state


@pytest.mark.slow
def test_two_processes_report_a_damaged_checkpoint(toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, **RUN)
    options = ["run.per_device_train_batch_size=2"]
    train(recipe, *options, processes=2)
    folder = tmp_path / "run"
    (folder / "config.json").unlink()
    state = folder / "checkpoint-4" / "rng_state_1.pth"
    assert json.loads((folder / "checkpoint-4" / "run_state.json").read_text())["num_processes"] == 2
    cut(state)
    for fault in ("rng_state_1.pth is damaged or cut off", "rng_state_1.pth is missing"):
        message = train(recipe, *options, processes=2, code=1).stderr
        assert fault in message and "error: unexpected" not in message
        assert f"the last whole checkpoint is {folder / 'checkpoint-2'}" in message
        state.unlink(missing_ok=True)
