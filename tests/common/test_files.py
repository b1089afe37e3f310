"""Atomic writing of files and folders: a failure keeps the old content."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stllm.common.files import new_folder, replacing, write_text


def test_text_is_written_and_replaced(tmp_path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é")
    write_text(tmp_path / "new" / "a.txt", "×")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "×"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt") as partial:
        partial.write_text("ne")
        raise RuntimeError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def write_model(target: Path, text: str) -> None:
    with new_folder(target, needed=1) as folder:
        (folder / "weights").write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    (tmp_path / "model" / "more").touch()
    write_model(tmp_path / "model", "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_a_folder_that_cannot_be_replaced_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    write_model(target, "old")
    rename = Path.rename

    def refusing(path: Path, to: Path) -> Path:
        if to == target and path.name.endswith(f".{os.getpid()}.partial"):  # the new one's last step
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="Input/output"):
        write_model(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "old"


KILLED = """import os, signal, sys
from pathlib import Path
from stllm.common.files import new_folder
rename, moves = Path.rename, int(sys.argv[2])
def dying(path, to):
    global moves
    if not moves:
        os.kill(os.getpid(), signal.SIGKILL)
    moves -= 1
    return rename(path, to)
Path.rename = dying
with new_folder(Path(sys.argv[1]), 1) as folder:
    (folder / "weights").write_text("new")
"""


@pytest.mark.parametrize("moves", [0, 1])
def test_a_kill_while_a_folder_is_replaced_loses_nothing(tmp_path: Path, moves: int) -> None:
    """moves: number of renames before the kill: none, or only that of the old folder."""
    target = tmp_path / "model"
    write_model(target, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target), str(moves)])
    assert killed.returncode == -9 and target.exists() == (moves == 0)
    with pytest.raises(RuntimeError, match="no weights yet"), new_folder(target, needed=1):
        raise RuntimeError("no weights yet")
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
