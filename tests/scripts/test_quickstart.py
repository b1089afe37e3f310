"""scripts/quickstart.sh and test.sh: which environment they take, what they install and run (Python is a stand-in)."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
INSTALLED = "-m pip install --quiet --disable-pip-version-check"
# notes its arguments, makes environments whose python is itself, runs what prints the examples, answers questions
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$(dirname "$0")") $*" | head -n 1 >>"$LOG"
case "$1 ${2:-} ${3:-}" in
"-c import json"*) exec python3 "$@" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "PATH=$PWD/$3/bin:\\$PATH" >"$3/bin/activate" ;;
"-m stllm chat") echo "an answer" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts alone, with a clip and a stand-in for training; no environment is active."""
    shutil.copytree(SCRIPTS, tmp_path / "clone" / "scripts")
    root = tmp_path / "clone"
    (root / "scripts" / "train_tiny.sh").write_text('echo "trained $*" >>"$LOG"\n')
    (root / "stllm" / "assets" / "examples").mkdir(parents=True)
    examples = [{"file": "a b.mp4", "question": "What's first?"}, {"file": "c.mp4", "question": "And then?"}]
    (root / "stllm" / "assets" / "examples" / "examples.json").write_text(json.dumps(examples))
    (root / "stllm" / "assets" / "stllm-tiny").mkdir()
    (root / "stllm" / "assets" / "stllm-tiny" / "config.json").write_text("{}")
    (tmp_path / "usual").mkdir()
    stand_in = tmp_path / "usual" / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return root


def run(clone: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "LOG": str(clone / "log"), "PYTHON": str(clone.parent / "usual" / "python")}
    words = ["bash", str(clone / "scripts" / script), *arguments]
    return subprocess.run(words, capture_output=True, text=True, env={**env, **environment}, cwd=clone.parent)


def log(clone: Path) -> list[str]:
    return [line for line in (clone / "log").read_text().splitlines() if " -c import" not in line]


def test_without_an_environment_one_is_made(clone: Path) -> None:
    done = run(clone, "quickstart.sh")
    assert done.returncode == 0, done.stderr
    assert log(clone)[:3] == [
        "usual -m venv .venv",
        f"bin {INSTALLED} torch torchvision",
        f"bin {INSTALLED} -e .",
    ]
    chat = "bin -m stllm chat --ckpt-path stllm/assets/stllm-tiny --video stllm/assets/examples"
    assert log(clone)[3:] == [f"{chat}/a b.mp4 --question What's first?", f"{chat}/c.mp4 --question And then?"]
    assert done.stdout.count("  > an answer\n") == 2
    assert "source .venv/bin/activate && stllm demo --ckpt-path stllm/assets/stllm-tiny" in done.stdout


def test_an_active_environment_is_taken(clone: Path) -> None:
    done = run(clone, "quickstart.sh", VIRTUAL_ENV="/some/where", TORCH_INDEX="file:///builds")
    assert done.returncode == 0 and not (clone / ".venv").exists() and ".venv" not in done.stdout
    assert log(clone)[0] == f"usual {INSTALLED} --index-url file:///builds torch torchvision"


def test_training_comes_before_asking(clone: Path) -> None:
    assert run(clone, "quickstart.sh", "--train", VIRTUAL_ENV="x", TINY_OUTPUT="out").returncode == 0
    assert log(clone)[2] == "trained --quick"
    assert log(clone)[3].startswith("usual -m stllm chat --ckpt-path out/3_masking --video ")


def test_a_copy_without_the_model_says_so(clone: Path) -> None:
    (clone / "stllm" / "assets" / "stllm-tiny" / "config.json").unlink()
    done = run(clone, "quickstart.sh", CONDA_PREFIX="x")
    assert done.returncode == 1 and "no stllm/assets/stllm-tiny" in done.stderr and "--train" in done.stderr


def test_wrong_words_and_old_pythons(clone: Path) -> None:
    assert run(clone, "quickstart.sh", "--fast").returncode == 2
    for script in ("quickstart.sh", "test.sh"):
        assert run(clone, script, "--help").stdout.startswith(f"usage: bash scripts/{script}")
    old = clone.parent / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    for script in ("quickstart.sh", "test.sh"):
        for python in (str(old), "/no/such/python"):
            done = run(clone, script, PYTHON=python)
            assert done.returncode == 1 and "Python 3.10 or newer expected" in done.stderr
        assert not (clone / ".venv").exists()


def test_the_tests_have_an_environment_of_their_own(clone: Path) -> None:
    assert run(clone, "test.sh", "-k", "cli", VIRTUAL_ENV="/some/where").returncode == 0
    assert log(clone)[:3] == [
        "usual -m venv .venv",
        f"bin {INSTALLED} torch torchvision",
        f"bin {INSTALLED} -e .[dev]",
    ]
    assert [line.split()[2] for line in log(clone)[3:]] == ["ruff", "ruff", "mypy", "pytest"]
    assert log(clone)[-1].endswith("-m not slow -k cli")
    (clone / "log").unlink()
    assert run(clone, "test.sh", "--active").returncode == 0
    assert log(clone)[0] == "usual -m ruff check"
