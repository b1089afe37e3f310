"""A killed command leaves no process behind: SIGKILL at five moments of each command."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from stllm.common.distributed import end_with_parent
from tests.helpers.evaluation import CHECKPOINT, arguments
from tests.helpers.training import ROOT, command, write_recipe
from tests.helpers.videos import write_video

SECONDS = 10  # after which nothing may be left
IMPORTS = 60  # more, where a worker that is not forked still imports torch when its parent is killed
MARK = "STLLM_TEST_ORPHANS"


class Started:
    """A started command and its processes: descendants, and others that inherited its environment."""

    def __init__(self, words: list[str], output: Path) -> None:
        self.mark = uuid4().hex
        self.output = output
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark}
        with output.open("w") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        self.begun = time.monotonic()

    def others(self) -> list[psutil.Process]:
        found = {one for one in psutil.process_iter() if self._is_marked(one)}
        with suppress(psutil.NoSuchProcess):
            found.update(psutil.Process(self.process.pid).children(recursive=True))
        return [one for one in found if one.pid != self.process.pid and lives(one)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark
        except psutil.Error:
            return False

    def wait_for(self, num_processes: int, text: str = "") -> None:
        """Wait until the command has started this number of processes and has printed the text."""
        while len(self.others()) < num_processes or not re.search(text, self.output.read_text()):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < self.begun + 120, self.output.read_text()
            time.sleep(0.02)

    def kill(self, seconds: float = SECONDS) -> None:
        """Kill only the command, and check that all its other processes end within this time."""
        assert self.process.poll() is None, self.output.read_text()
        before = self.others()
        self.process.kill()
        self.process.wait()
        killed = time.monotonic()
        while left := {*self.others(), *filter(lives, before)}:
            assert time.monotonic() < killed + seconds, f"{len(left)} of {len(before)} are left: {left}"
            time.sleep(0.05)
        print(f"{len(before)} processes ended after {time.monotonic() - killed:.1f} s")


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def started(words: list[str], output: Path) -> Iterator[Started]:
    one = Started(words, output)
    try:
        yield one
    finally:
        one.process.kill()
        for process in one.others():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        one.process.wait()


def stllm(*words: object) -> list[str]:
    return [sys.executable, "-m", "stllm", *map(str, words)]


def copies(folder: Path, count: int, num_frames: int) -> list[str]:
    """Write copies of a video, and return their names."""
    folder.mkdir()
    first = write_video(folder / "0.mp4", num_frames=num_frames, size=(160, 120))
    for number in range(1, count):
        os.link(first, folder / f"{number}.mp4")
    return [path.name for path in folder.iterdir()]


# ---- the commands: their words, how many processes they start at least, and what they print when they work ----------

Command = tuple[list[str], int, str]


def training(toy: Path, folder: Path, *options: str, processes: int = 1, expected: int = 2) -> Command:
    recipe = write_recipe(folder / "recipe.yaml", toy, max_steps=10000, save_steps=10000)
    settings = [f"run.output_dir={folder / 'run'}", "run.dataloader_num_workers=2", *options]
    return command(recipe, *settings, processes=processes), expected, ""


def training_under_torchrun(toy: Path, folder: Path) -> Command:
    return training(toy, folder, "run.per_device_train_batch_size=2", processes=2, expected=6)


def training_with_spawned_workers(toy: Path, folder: Path) -> Command:  # and multiprocessing's tracker
    return training(toy, folder, "run.dataloader_multiprocessing_context=spawn", expected=3)


def training_with_served_workers(toy: Path, folder: Path) -> Command:  # and the server that forks them
    return training(toy, folder, "run.dataloader_multiprocessing_context=forkserver", expected=4)


def extraction(toy: Path, folder: Path) -> Command:
    records = [{"video": name, "QA": [{"q": "what?", "a": "it"}]} for name in copies(folder / "clips", 3000, 40)]
    (folder / "clips.json").write_text(json.dumps(records))
    entry = {"anno_path": str(folder / "clips.json"), "media_dir": str(folder / "clips"), "num_frames": 16}
    recipe = write_recipe(folder / "recipe.yaml", toy, model={"freeze_vit": True}, datasets={"clips": entry})
    return stllm("extract", "--cfg-path", recipe, "--output", folder / "features", "--num-workers", 2), 2, ""


def evaluation(toy: Path, folder: Path) -> Command:
    names = copies(folder / "videos", 500, 80)
    items = [{"video_name": name, "question_id": name, "question": "what moves?", "answer": "it"} for name in names]
    (folder / "test_qa.json").write_text(json.dumps(items))
    words = arguments(folder, folder / "answers", "--num-workers", "2", "--num-frames", "32")
    return stllm(*words), 2, ""


def check(toy: Path, folder: Path) -> Command:
    records = [{"video": name, "QA": [{"q": "what?", "a": "it"}]} for name in copies(folder / "clips", 3000, 400)]
    (folder / "clips.json").write_text(json.dumps(records))
    files = ("--anno-path", folder / "clips.json", "--video-dir", folder / "clips", "--format", "vc2")
    return stllm("doctor", *files, "--decode", "all", "--num-workers", 2), 3, ""


def toy_world(toy: Path, folder: Path) -> Command:
    return stllm("toy", "--output", folder / "world", "--num-train", 20000, "--num-workers", 2), 3, ""


def server(toy: Path, folder: Path) -> Command:
    return stllm("serve", "--ckpt-path", CHECKPOINT, "--port", 0, "--device", "cpu"), 0, "http://"


def demo(toy: Path, folder: Path) -> Command:
    return stllm("demo", "--ckpt-path", CHECKPOINT, "--port", 0, "--device", "cpu"), 0, "http://"


WORKING = (extraction, evaluation, check, toy_world, server, demo)
TRAINING = (training, training_under_torchrun)
NOT_FORKED = (training_with_spawned_workers, training_with_served_workers)


@pytest.mark.parametrize("new", [extraction, check])
def test_workers_end_when_their_command_is_killed_while_it_starts_them(new: Any, toy: Path, tmp_path: Path) -> None:
    words, num_processes, _ = new(toy, tmp_path)
    with started(words, tmp_path / "output") as one:
        one.wait_for(num_processes)
        one.kill()


@pytest.mark.slow
@pytest.mark.parametrize("new", [*TRAINING, *NOT_FORKED, *WORKING])
def test_no_process_outlives_a_killed_command(new: Any, toy: Path, tmp_path: Path) -> None:
    """Kill when all processes run, seconds later, when the first one runs, and at 10 % and 90 % of that time."""
    start_up = 0.0
    for moment in ("all", "later", "early", "late", "first"):
        folder = tmp_path / moment
        folder.mkdir()
        words, num_processes, text = new(toy, folder)
        with started(words, tmp_path / "output") as one:
            if moment in ("all", "later"):
                one.wait_for(num_processes, text)
                start_up = time.monotonic() - one.begun
                time.sleep(3 if moment == "later" else 0)
            elif moment == "first" and num_processes > 0:
                one.wait_for(1)
            else:
                time.sleep(start_up * {"early": 0.1, "first": 0.5, "late": 0.9}[moment])
            one.kill(SECONDS + (IMPORTS if new in NOT_FORKED else 0))
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_command_in_the_background_outlives_its_shell(tmp_path: Path) -> None:
    """Two commands: one in its own session, and one in that of a script started by a rank."""
    words = shlex.join(stllm("toy", "--num-train", 20000, "--num-workers", 0, "--output"))
    lines = f"""
        nohup setsid {words} {tmp_path}/one &
        TORCHELASTIC_RUN_ID=1 nohup {words} {tmp_path}/two &
        until [ $(ls -A {tmp_path} | wc -l) = 3 ]; do sleep 0.1; done
    """  # until both draw
    with started(["bash", "-c", lines], tmp_path / "output") as shell:
        shell.process.wait(120)
        time.sleep(3)
        assert len(shell.others()) == 2, shell.output.read_text()


class Unsendable(Dataset[Any]):
    """A data set whose samples cannot be pickled, which imitates full shared memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return lambda: index


def test_a_result_that_cannot_be_sent_ends_its_worker() -> None:
    """The message differs from that of torch's timeout."""
    loader = DataLoader(Unsendable(), num_workers=1, worker_init_fn=end_with_parent, batch_size=None, timeout=20)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iter(loader))
