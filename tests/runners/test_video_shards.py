"""`stllm train` on tars of clips: the same run as on files, in several processes, and continued after a kill."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from tests.datasets.test_image_text import write_tar
from tests.helpers.training import losses, read_log, train, write_recipe

CLIPS_A_TAR = 10


@pytest.fixture(scope="module")
def sets(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One data set of the toy world in three forms: files, tars with json, an annotation file over tars."""
    anno = toy / "vc2" / "video" / "vqa" / "toy_direction" / "train.json"
    folder = tmp_path_factory.mktemp("tars")
    members: list[list[tuple[str, bytes]]] = []
    for number, record in enumerate(json.loads(anno.read_text())):
        if number % CLIPS_A_TAR == 0:
            members.append([])
        video = toy / "vc2" / "media" / record["video"]
        members[-1] += [
            (f"{number:05d}{video.suffix}", video.read_bytes()),
            (f"{number:05d}.json", json.dumps({"QA": record["QA"]}).encode()),
        ]
        write_tar(folder / "named" / f"{number:05d}.tar", [(record["video"], video.read_bytes())])
    for number, shard in enumerate(members):
        write_tar(folder / f"{number:05d}.tar", shard)
    tars = {"cache_dir": str(folder / "cache"), "num_frames": 4}
    return {
        "files": {"anno_path": str(anno), "media_dir": str(toy / "vc2" / "media"), "num_frames": 4},
        "tars": {"type": "video_text", "shards": str(folder / f"{{00000..{len(members) - 1:05d}}}.tar"), **tars},
        "named": {"anno_path": str(anno), "shards": str(folder / "named" / "*.tar"), **tars},
    }


def recipe_of(sets: dict[str, dict[str, Any]], form: str, folder: Path, toy: Path, **run: Any) -> Path:
    return write_recipe(folder / "recipe.yaml", toy, datasets={"clips": sets[form]}, **run)


@pytest.fixture(scope="module")
def on_files(sets: dict[str, dict[str, Any]], toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on files."""
    recipe = recipe_of(sets, "files", tmp_path_factory.mktemp("files"), toy)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    return recipe.parent / "run"


@pytest.mark.parametrize(("form", "workers"), [("tars", 2), ("named", 0)])
def test_tars_teach_what_files_do(sets, form: str, workers: int, on_files: Path, toy: Path, tmp_path: Path) -> None:
    recipe = recipe_of(sets, form, tmp_path, toy, dataloader_num_workers=workers)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    assert losses(tmp_path / "run") == losses(on_files)
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["skipped_samples"] == 0


@pytest.mark.slow
def test_two_processes_and_a_killed_run(sets, on_files: Path, toy: Path, tmp_path: Path) -> None:
    """Two processes share each batch; a run goes on after its checkpoint with the samples that would have come."""
    recipe = recipe_of(sets, "tars", tmp_path, toy, per_device_train_batch_size=2)
    train(recipe, processes=2)
    for found, expected in zip(losses(tmp_path / "run"), losses(on_files), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    whole = losses(tmp_path / "run")
    for gone in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / gone)
    for gone in ("config.json", "model.safetensors"):
        (tmp_path / "run" / gone).unlink()
    train(recipe, processes=2)
    assert losses(tmp_path / "run") == whole


def test_captions_of_remote_tars_are_learned(sets, toy: Path, tmp_path: Path, capsys) -> None:
    """`pipe:` needs --allow-pipe; the doctor reads the same tars; a damaged clip is replaced and counted."""
    media = sorted((toy / "vc2" / "media").glob("*.mp4"))[:12]
    members = [
        item
        for number, path in enumerate(media)
        for item in ((f"{number}.mp4", path.read_bytes()), (f"{number}.txt", b"red"))
    ]
    members[0] = ("0.mp4", b"\0damaged" * 99)
    shard = write_tar(tmp_path / "x.tar", members)
    entry = {"type": "video_text", "shards": f"pipe:cat {shard}", "num_frames": 4, "instruction": "Describe it."}
    datasets = {"clips": {**entry, "cache_dir": str(tmp_path / "cache")}}
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, datasets=datasets, max_bad_fraction=0.9, max_steps=3)
    command = ["--cfg-path", str(recipe)]
    assert main(["train", *command]) == 1
    assert "found no --allow-pipe on the command line" in capsys.readouterr().err
    assert main(["train", *command, "--allow-pipe"]) == 0
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["skipped_samples"] == 1
    assert main(["doctor", *command, "--allow-pipe", "--decode", "all", "--num-workers", "0"]) == 1
    captured = capsys.readouterr()
    assert "found 1 fault" in captured.err and "0.mp4" in captured.out


def test_a_reader_that_is_missing_is_noticed_before_training(
    sets, toy: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from stllm.media import libraries

    libraries._torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    recipe = recipe_of({"tars": {**sets["tars"], "reader": "torchcodec"}}, "tars", tmp_path, toy)
    assert main(["train", "--cfg-path", str(recipe)]) == 1
    assert "data set clips: reader torchcodec: the package cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
