"""The toy versions of the benchmarks, written once for all tests, and functions to read written folders."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from stllm.toy.benchmarks import write_benchmarks
from stllm.toy.tasks import World

SEED = 5
NUM_FRAMES = 16  # of a clip of the usual length, at 4 frames a second

_folders: list[tempfile.TemporaryDirectory[str]] = []  # each is removed when the process ends


@cache
def twins(count: int = 2) -> Path:
    """Return the folder with mvbench, vcgbench, msvd, msrvtt, activitynet and tgif. Tests must not write into it.

    count: items of each task of MVBench, and clips of each part of the others. 2: 54 clips, about a second.
    """
    _folders.append(tempfile.TemporaryDirectory(prefix="stllm_twins_"))
    root = Path(_folders[-1].name)
    write_benchmarks(root, World(SEED, NUM_FRAMES), count=count)
    return root


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def files(root: Path) -> dict[str, bytes]:
    """Return path -> bytes of all files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
