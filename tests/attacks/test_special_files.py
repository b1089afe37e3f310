"""Pipes and devices in place of files are refused with a sentence, because reading them may never end."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.common.files import check_regular
from stllm.media.clip import MediaError
from stllm.media.open import open_media
from tests.attacks.test_no_code import CLIP
from tests.helpers.training import write_recipe
from tests.judge.test_local import judge, write_judge

SECONDS = 60


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Fail a test that waits for a pipe."""

    def fail(number: int, frame: object) -> None:
        raise AssertionError("it waited for a pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe_at(path: Path) -> Path:
    """Replace a file by a pipe that nobody writes to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose Q-Former reads questions."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "--cfg-path", str(write_recipe(folder / "recipe.yaml", toy, max_steps=1))]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "more.bin", "qformer_tokenizer/tokenizer.json"]
)
def test_a_pipe_in_a_checkpoint_is_refused(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained, folder)
    path = pipe_at(folder / name)
    words = ["--device", "cpu", "--ckpt-path", str(folder), "--video", str(CLIP), "--question", "Why?"]
    assert main(["chat", *words]) == 1
    assert f"{path}: found a pipe, expected" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "pipe"])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_weights_that_are_not_a_file_are_refused(
    command: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = pipe_at(tmp_path / "w.pth") if device == "pipe" else Path(device)
    more = ["--to", str(tmp_path / "new")] if command == "convert" else []
    assert main([command, str(place), *more]) == 1
    assert f"{place}: found a {'pipe' if device == 'pipe' else 'device'}, expected weights" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "pipe"])
def test_media_that_are_not_a_file_are_refused(device: str, tmp_path: Path) -> None:
    place = pipe_at(tmp_path / "clip.mp4") if device == "pipe" else tmp_path / "clip.mp4"
    if device != "pipe":
        place.symlink_to(device)
    with pytest.raises(MediaError, match=r"found a (pipe|device), expected a video"):
        open_media(place)


def test_a_pipe_in_a_frame_folder_is_refused(tmp_path: Path) -> None:
    pipe_at(tmp_path / "00001.jpg")
    with pytest.raises(MediaError, match=r"00001\.jpg: found a pipe, expected an image"):
        open_media(tmp_path)


def test_an_annotation_file_that_is_a_pipe_is_refused(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pipe_at(tmp_path / "train.json")
    recipe = write_recipe(
        tmp_path / "recipe.yaml", toy, datasets={"own": {"anno_path": str(pipe), "media_dir": str(tmp_path)}}
    )
    assert main(["train", "--cfg-path", str(recipe)]) == 1
    assert f"{pipe}: found a pipe, expected" in capsys.readouterr().err


def test_a_pipe_in_a_local_judges_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_judge(tmp_path / "judge", says="4")
    pipe_at(model / "tokenizer.json")
    assert judge(tmp_path, model) == 1
    assert "tokenizer.json: found a pipe, expected" in capsys.readouterr().err


def test_regular_files_folders_and_links_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path, tmp_path / "link", tmp_path / "dead", tmp_path / "missing", "a\0b"):
        check_regular(place, "a file")
    pipe_at(tmp_path / "folder" / "pipe")
    check_regular(tmp_path, "a file")
    with pytest.raises(UserError, match="found a pipe"):
        check_regular(tmp_path / "folder", "a file")
