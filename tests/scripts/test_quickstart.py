"""scripts/quickstart.sh and test.sh: which environment they take, what they install and run (Python is a stand-in)."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
INSTALLED = "-m pip install --quiet --disable-pip-version-check"
# notes its arguments, makes environments whose python is itself, has torch or not, runs what asks about the examples
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$(dirname "$0")") $*" | head -n 1 >>"$LOG"
case "$1 ${2:-} ${3:-}" in
"-c import json"*) exec python3 "$@" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "PATH=$PWD/$3/bin:\\$PATH" >"$3/bin/activate" ;;
"-c import importlib"*) [[ -z ${NO_TORCH:-} ]] ;;
esac
"""
MODEL = """from types import SimpleNamespace as Space
def load_chat(model):
    return Space(ask=lambda clip, question: Space(text=f"an answer of {model} about {clip.name}"))
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts alone, with clips and stand-ins for model and training; no environment is active."""
    shutil.copytree(SCRIPTS, tmp_path / "clone" / "scripts")
    root = tmp_path / "clone"
    (root / "scripts" / "train_tiny.sh").write_text('echo "trained $*" >>"$LOG"\n')
    (root / "stllm" / "assets" / "examples").mkdir(parents=True)
    (root / "stllm" / "__init__.py").write_text(MODEL)
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
        f"bin {INSTALLED} -r requirement.txt -e .",
    ]
    examples = "stllm/assets/examples"
    said = done.stdout.partition(f"asked about the clips in {examples}\n")[2].splitlines()
    assert said[:3] == [
        f"{examples}/a b.mp4",
        "  What's first?",
        "  > an answer of stllm/assets/stllm-tiny about a b.mp4",
    ]
    assert said[3:6] == [f"{examples}/c.mp4", "  And then?", "  > an answer of stllm/assets/stllm-tiny about c.mp4"]
    next_steps = [line.split("  #")[0].strip() for line in said[8:11]]
    assert next_steps[0] == "source .venv/bin/activate" and next_steps[2] == "stllm demo"
    assert next_steps[1] == f"stllm chat --video {examples}/action_sequence.mp4"
    assert (SCRIPTS.parent / examples / "action_sequence.mp4").is_file()
    assert "downloaded" not in done.stdout  # torch is there already


def test_an_environment_that_was_half_made_is_made_again(clone: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)  # as python -m venv leaves it where ensurepip is missing
    assert run(clone, "quickstart.sh").returncode == 0
    assert log(clone)[0] == "usual -m venv .venv"
    (clone / "log").unlink()
    assert run(clone, "quickstart.sh").returncode == 0
    assert log(clone)[0].endswith("torch torchvision")  # the whole one is taken as it is


def test_minutes_of_download_are_announced(clone: Path) -> None:
    done = run(clone, "quickstart.sh", VIRTUAL_ENV="x", NO_TORCH="1")
    assert done.returncode == 0 and "torch and the rest are downloaded: some minutes" in done.stdout
    done = run(clone, "quickstart.sh", VIRTUAL_ENV="x", NO_TORCH="1", TORCH_INDEX="file:///builds")
    assert "downloaded" in done.stdout and "TORCH_INDEX" not in done.stdout


def test_an_active_environment_is_taken(clone: Path) -> None:
    done = run(clone, "quickstart.sh", VIRTUAL_ENV="/some/where", TORCH_INDEX="file:///builds")
    assert done.returncode == 0 and not (clone / ".venv").exists() and ".venv" not in done.stdout
    assert done.stdout.startswith("== into the active environment, /some/where\n")
    assert log(clone)[0] == f"usual {INSTALLED} --index-url file:///builds torch torchvision"


def test_training_comes_before_asking(clone: Path) -> None:
    done = run(clone, "quickstart.sh", "--train", VIRTUAL_ENV="x", TINY_OUTPUT="out")
    assert done.returncode == 0, done.stderr
    assert log(clone)[2] == "trained --quick"
    model = "out/4_choices"
    assert f"an answer of {model} about c.mp4" in done.stdout and f"stllm demo --ckpt-path {model}" in done.stdout
    script = (SCRIPTS / "train_tiny.sh").read_text()
    assert "stages=(2_images 3_videos 4_choices)\n" in script  # the last one that --quick trains


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
        f"bin {INSTALLED} -r requirement.txt -e .[dev]",
    ]
    assert [line.split()[2] for line in log(clone)[3:]] == ["ruff", "ruff", "mypy", "pytest"]
    assert log(clone)[-1].endswith("-m not slow -k cli")
    (clone / "log").unlink()
    assert run(clone, "test.sh", "--active").returncode == 0
    assert log(clone)[0] == "usual -m ruff check"


def test_the_lowest_versions_have_an_environment_of_their_own(clone: Path) -> None:
    requirements = Path(shutil.copy(SCRIPTS.parent / "requirement.txt", clone)).read_text()
    done = run(clone, "test.sh", "--lowest", "-k", "cli")
    assert done.returncode == 0, done.stderr
    assert log(clone)[0] == "usual -m venv .venv-lowest"
    assert [line.split()[2] for line in log(clone)[1:]] == ["pip", "pip", "pytest"]
    bounds = re.findall(r"^(\w+)>=([\d.]+)", requirements, re.MULTILINE)
    lines = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    assert len(bounds) == len(lines)
    constraints = (clone / ".venv-lowest" / "constraints.txt").read_text().splitlines()
    assert constraints == [f"{name}=={version}" for name, version in bounds]
