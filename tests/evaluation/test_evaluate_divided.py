"""`stllm evaluate` with several processes, killed and interrupted: files equal those of one uninterrupted process."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.evaluation import evaluate, lines, start, write_set

pytestmark = pytest.mark.slow
NUM_ITEMS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data"), num_questions=NUM_ITEMS // 4)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert evaluate(data, output) == 0
    return output


def num_lines(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.glob("*.jsonl"))


def wait_for_lines(process: "subprocess.Popen[str]", output: Path, wanted: int) -> None:
    """Wait until this number of records is written by all processes together."""
    deadline = time.monotonic() + 240
    while num_lines(output) < wanted:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: "subprocess.Popen[str]") -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def check_equal(output: Path, whole: Path) -> None:
    assert lines(output) == lines(whole)
    for name in ("msvd.json", "msvd.md"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert not list(output.glob("*.part-*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_twice_gives_the_same_results(data: Path, whole: Path, tmp_path: Path, processes: int) -> None:
    output = tmp_path / "out"
    for wanted in (5, 40):
        process = start(data, output, "--batch-size", "1", "--num-workers", "1", processes=processes)
        wait_for_lines(process, output, wanted)
        ranks = children(process) if processes > 1 else []  # torchrun's are no members of its group
        for pid in (process.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert wanted <= num_lines(output) < NUM_ITEMS
    process = start(data, output, "--num-workers", "1", processes=3 - processes)  # goes on with another number
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    check_equal(output, whole)


def test_ctrl_c_prints_a_sentence_and_the_run_can_be_resumed(data: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(data, output, "--batch-size", "1", "--num-workers", "2")
    wait_for_lines(process, output, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers have it, too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted: what was answered is kept, and the same command goes on"
    assert "Traceback" not in error
    assert 5 <= num_lines(output) < NUM_ITEMS
    assert evaluate(data, output) == 0
    check_equal(output, whole)


def test_a_dying_process_ends_the_others_but_keeps_their_records(data: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(data, output, "--batch-size", "1", processes=2)
    wait_for_lines(process, output, 5)
    os.kill(children(process)[1], signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode == 1
    assert num_lines(output) >= 5
    assert evaluate(data, output) == 0
    check_equal(output, whole)
