"""Two trainings in one folder: the second is refused, but a killed one does not block the folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from stllm.cli import main
from stllm.runners import run_folder
from tests.helpers.training import command, read_log, write_recipe

# holds the lock, as a training does, with a forked data worker that notices its parent's end half a second later
OWNER = """
import os, sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""
BUSY = "another training uses this folder: wait until it ends, or name another run.output_dir"


@pytest.mark.parametrize("held_before", ["nothing", "a run"])
def test_a_second_training_in_the_same_folder_is_refused(
    held_before: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=1)
    folder = tmp_path / "run"
    if held_before == "a run":
        assert main(["train", "--cfg-path", str(recipe)]) == 0
    else:
        folder.mkdir()
    with FileLock(folder / run_folder.LOCK):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert main(["train", "--cfg-path", str(recipe)]) == 1
        assert f"error: {folder}: {BUSY}" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_killed_training_does_not_block_its_folder(toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=1)
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", OWNER, str(tmp_path / "run" / run_folder.LOCK)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        owner.send_signal(signal.SIGKILL)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_of_a_refused_training_ends(processes: int, toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=2)
    words = command(recipe, "run.per_device_train_batch_size=2", processes=processes)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / run_folder.LOCK):
        second = subprocess.run(words, capture_output=True, text=True, env=os.environ, timeout=120)
    assert second.returncode == 1
    assert second.stderr.count(BUSY) >= 1  # each process says so
    assert "unexpected" not in second.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [run_folder.LOCK]
    assert subprocess.run(words, capture_output=True, env=os.environ, timeout=120).returncode == 0


def test_a_folder_that_cannot_be_created_is_reported(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=1)
    assert main(["train", "--cfg-path", str(recipe), "--options", f"run.output_dir={recipe}/run"]) == 1
    assert f"error: the folder {recipe}/run cannot be created (Not a directory): name another one" in (
        capsys.readouterr().err
    )
