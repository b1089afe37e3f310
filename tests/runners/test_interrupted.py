"""Runs that are killed and resumed, or stopped by a signal: their log equals that of an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import ROOT, command, losses, read_log, train, write_recipe
from tests.helpers.twins import twins

VALIDATION = [
    "run.eval_strategy=steps",
    "run.eval_steps=3",
    "run.eval_benchmark={mvbench}",
    "datasets.toy_state.val_fraction=0.3",
    "run.load_best_model_at_end=true",
]
SAME = ("loss", "eval_loss", "eval_mvbench")  # figures of a line that an interruption does not change
SETTINGS: dict[str, Any] = {"max_steps": 14, "save_steps": 3, "logging_steps": 2, "save_total_limit": 2}


def start(recipe: Path, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(recipe, *options, processes=processes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Wait until the log has a line of this step, or the process has ended."""
    while process.poll() is None:
        log = folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that torchrun has started, each in its own session."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill(process: subprocess.Popen[str], *, processes: int) -> None:
    ranks = children(process) if processes > 1 else []
    os.killpg(process.pid, signal.SIGKILL)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, ["run.dataloader_num_workers=0"]),
        (1, ["run.dataloader_num_workers=2", "run.gradient_accumulation_steps=2"]),
        (2, ["run.per_device_train_batch_size=2"]),
        (2, ["run.per_device_train_batch_size=2", "run.fsdp=true"]),
        (1, VALIDATION),
        (2, ["run.per_device_train_batch_size=2", *VALIDATION]),
    ],
    ids=["alone", "workers-and-accumulation", "ddp", "fsdp", "validation", "validation-ddp"],
)
def test_a_run_killed_three_times_gives_the_same_log(
    processes: int, options: list[str], toy: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, **SETTINGS)
    options = [option.format(mvbench=twins() / "mvbench") for option in options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(recipe, *options, f"run.output_dir={whole}", processes=processes)
    steps = sorted(random.Random(processes).sample(range(2, 13), 3))
    for step in steps:
        process = start(recipe, *options, f"run.output_dir={killed}", processes=processes)
        wait_for_step(process, killed, step)
        kill(process, processes=processes)
    train(recipe, *options, f"run.output_dir={killed}", processes=processes)
    log, whole_log = read_log(killed), read_log(whole)
    learned = [line["step"] for line in log if "loss" in line]
    assert learned == [2, 3, 4, 6, 8, 9, 10, 12, 14]  # each 2, and each checkpoint
    if "run.eval_strategy=steps" in options:
        assert [line["step"] for line in log if "eval_loss" in line] == [3, 6, 9, 12, 14]  # and at the end
    for found, expected in zip(log, whole_log, strict=True):
        names = [name for name in expected if name == "step" or name.startswith(SAME)]
        assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], abs=1e-6)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_of_the_current_step(number: signal.Signals, toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, **{**SETTINGS, "save_steps": 100, "logging_steps": 1})
    process = start(recipe)
    folder = tmp_path / "run"
    wait_for_step(process, folder, 3)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert "the same command continues from it" in errors
    (checkpoint,) = folder.glob("checkpoint-*")
    assert int(checkpoint.name.split("-")[1]) == read_log(folder)[-1]["step"] >= 3
    assert not (folder / "config.json").exists()
    train(recipe)
    train(recipe, f"run.output_dir={tmp_path / 'whole'}")
    for found, expected in zip(losses(folder), losses(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_sentence(toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=10000, save_steps=3, logging_steps=1)
    process = start(recipe, "run.per_device_train_batch_size=2", processes=2)
    folder = tmp_path / "run"
    wait_for_step(process, folder, 4)
    os.kill(children(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert (folder / "checkpoint-3" / "trainer_state.json").exists()
    assert "another process of this run has ended" in errors
