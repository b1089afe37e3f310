"""`stllm extract`: each clip once, resumed, divided among processes; features train like the pixels."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stllm.cli import main
from stllm.common.files import locked
from stllm.datasets.features import FeatureStore
from stllm.models import precomputed
from stllm.runners import extract as extraction
from tests.helpers.training import ROOT, losses, read_log, write_recipe

FROZEN: dict[str, dict[str, Any]] = {  # what is frozen for each stage
    "vit": {"freeze_vit": True},
    "qformer": {"freeze_vit": True, "freeze_qformer": True, "qformer_text_input": False},
}
SAME_FRAMES = {"sampling": "middle", "crop": "center"}
FEW = {"max_samples": 4}
VIDEOS = {"media_dir": "media", "num_frames": 4, **SAME_FRAMES}


def datasets(toy: Path) -> dict[str, Any]:
    """Return data sets of videos, images and image-text shards, read in the way that features are made."""
    return {
        "videos": {"anno_path": "video/vqa/toy_direction/train.json", **VIDEOS, **FEW},
        "pictures": {"anno_path": "image/vqa/toy_picture/train.json", "media_dir": "media", "crop": "center", **FEW},
        "shards": {"type": "image_text", "shards": str(toy / "images" / "00000.tar"), "crop": "center", **FEW},
    }


def extract(recipe: Path, output: Path, stage: str = "vit", *more: str, code: int = 0) -> None:
    argv = ["extract", "--cfg-path", str(recipe), "--output", str(output), "--stage", stage, "--num-workers", "0"]
    assert main([*argv, *more]) == code


def train(recipe: Path, *options: str, code: int = 0) -> None:
    assert main(["train", "--cfg-path", str(recipe), *(["--options", *options] if options else [])]) == code


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of the last command."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_data_sets_with_the_same_media_share_their_features(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each clip is encoded once, and both data sets train on the features."""
    first = {"anno_path": "video/vqa/toy_direction/open.json", **VIDEOS, "max_samples": 2}
    second = {**first, "anno_path": "video/vqa/toy_direction/train.json", "max_samples": 4, "features_of": "first"}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        toy,
        model=FROZEN["qformer"],
        datasets={"first": first, "second": second},
        max_steps=2,
    )
    features = tmp_path / "features"
    extract(recipe, features, "qformer")
    assert "4 clips encoded" in capsys.readouterr().out
    assert {path.name for path in features.iterdir() if path.is_dir()} == {"first"}
    train(recipe, f"datasets.features_root={features}", "model.pre_encoding=True")
    assert read_log(tmp_path / "run")[-1]["skipped_samples"] == 0
    other = ["--options", "datasets.second.num_frames=2"]
    extract(recipe, tmp_path / "other", "qformer", *other, code=1)
    assert "data set second shares the features in" in failure(capsys)


@pytest.mark.parametrize("stage", ["vit", "qformer"])
def test_training_on_features_is_training_on_the_same_pixels(toy: Path, tmp_path: Path, stage: str) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        toy,
        model=FROZEN[stage],
        datasets=datasets(toy),
        max_steps=-1,
        num_train_epochs=1,
        save_steps=100,
    )
    extract(recipe, tmp_path / "features", stage)
    train(recipe)
    features = [f"datasets.features_root={tmp_path / 'features'}", "model.pre_encoding=True"]
    train(recipe, *features, f"run.output_dir={tmp_path / 'again'}")
    log = read_log(tmp_path / "run")
    assert {line["loss_mvm"] is None for line in log} == {True, False}  # videos and images both took part
    for found, expected in zip(losses(tmp_path / "again"), losses(tmp_path / "run"), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert read_log(tmp_path / "again")[-1]["skipped_samples"] == 0
    store = FeatureStore(tmp_path / "features" / "videos")
    assert store.load("toy_direction_00000.mp4").shape == {"vit": (4, 5, 32), "qformer": (4, 2, 32)}[stage]
    settings = {"image_size": 32, "num_frames": 4, "dtype": "float32", **SAME_FRAMES}
    assert store.stage == stage and settings.items() <= store.settings.items() and len(store.settings["digest"]) == 16


@pytest.fixture
def planted(toy: Path, tmp_path: Path) -> Path:
    """Write a recipe of nine records of five clips: one twice, one in two parts, one missing, one without an answer."""
    clips = [f"toy_direction_{number:05d}.mp4" for number in range(4)]
    pair = [{"i": "", "q": "where?", "a": "left"}]
    records: list[dict[str, Any]] = [{"video": clip, "QA": pair} for clip in [*clips[:3], *clips[:2], "gone.mp4"]]
    records += [{"video": clips[3], "QA": pair, "start": 0, "end": 0.5}, {"video": clips[3], "QA": pair, "start": 0.5}]
    records += [{"video": clips[3], "QA": [{"q": "where?", "a": ""}]}]
    annotation = tmp_path / "train.json"
    annotation.write_text(json.dumps(records))
    entries = {"mine": {"anno_path": str(annotation), **VIDEOS}}
    return write_recipe(
        tmp_path / "recipe.yaml", toy, model=FROZEN["vit"], datasets=entries, max_steps=4, max_bad_fraction=0.5
    )


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return a list to which each call appends its number of clips. Each shard holds one clip."""
    real, counts = precomputed.encode, []

    def counting(model: Any, pixel_values: Tensor, stage: str) -> Tensor:
        counts.append(len(pixel_values))
        return real(model, pixel_values, stage)

    monkeypatch.setattr(precomputed, "encode", counting)
    monkeypatch.setattr(extraction, "SHARD_BYTES", 1)
    yield counts


def test_each_clip_is_extracted_once_and_bad_ones_are_left_out(
    planted: Path, tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "features"
    extract(planted, output, "vit", "--batch-size", "2")
    found = capsys.readouterr()
    assert sum(encoded) == 5 and max(encoded) == 2
    assert found.err.count("gone.mp4") == 1
    assert (
        found.out.startswith("5 clips encoded in ")
        and "0 were there, 1 could not be read and were left out" in found.out
    )
    store = FeatureStore(output / "mine")
    assert len(store) == 5
    halves = [store.load(f"toy_direction_00003.mp4[{part}]") for part in ("0.0,0.5", "0.5,inf")]
    assert not halves[0].equal(halves[1])
    # training counts unreadable clips as missing and continues
    train(planted, f"datasets.features_root={output}", "run.per_device_train_batch_size=8")
    assert read_log(tmp_path / "run")[-1]["skipped_samples"] > 0


def test_two_extractions_into_one_folder_do_not_mix(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features" / "mine"
    with locked(tmp_path / "features" / ".mine.lock", busy="the test is the first one"):
        extract(planted, tmp_path / "features", "vit", code=1)
    busy = f"error: {folder}: another extraction writes to it: wait until it ends, or name another --output"
    assert capsys.readouterr().err.splitlines()[-1] == busy
    assert not folder.exists()
    extract(planted, tmp_path / "features", "vit")


def test_an_interrupted_extraction_continues(
    planted: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, output = precomputed.encode, tmp_path / "features"

    def interrupted(*args: Any) -> Tensor:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return counting(*args)

    with monkeypatch.context() as patch:
        patch.setattr(precomputed, "encode", interrupted)
        extract(planted, output, "vit", "--batch-size", "1", code=130)
    assert len(shards(output / "mine")) == 2
    (output / "mine" / ".features-00000-00002.safetensors.1.partial").touch()  # of a process that was killed
    train(planted, f"datasets.features_root={output}", code=1)  # not complete
    extract(planted, output)
    assert encoded == [1, 1, 3]
    assert not list((output / "mine").glob(".*"))
    (output / "mine" / shards(output / "mine")[1]).unlink()  # as if it had never been written
    extract(planted, output)
    extract(planted, output)  # nothing is left to do
    assert encoded == [1, 1, 3, 1] and len(FeatureStore(output / "mine")) == 5


def test_computed_features_are_written_from_time_to_time(
    planted: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process loses only what it computed since then."""
    monkeypatch.setattr(extraction, "SHARD_BYTES", 2**30)
    monkeypatch.setattr(extraction, "SAVE_SECONDS", 0)
    counting, folder, written = precomputed.encode, tmp_path / "features" / "mine", []

    def looking(*args: Any) -> Tensor:
        written.append(len(shards(folder)))
        return counting(*args)

    monkeypatch.setattr(precomputed, "encode", looking)
    extract(planted, tmp_path / "features", "vit", "--batch-size", "1")
    assert written == [0, 1, 2, 3, 4] and len(FeatureStore(folder)) == 5


def test_too_many_bad_clips_fail_the_extraction(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "features"
    extract(planted, output, "vit", "--options", "run.max_bad_fraction=0.1", code=1)
    found = failure(capsys)
    assert "1 of 6 samples could not be read (1 missing), more than run.max_bad_fraction (0.1) allows: " in found
    train(planted, f"datasets.features_root={output}", code=1)
    assert "the features are not complete: run the same `stllm extract` again" in failure(capsys)
    extract(planted, output, "vit")  # as the recipe has it, 0.5 are allowed
    assert "0 clips encoded in " in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_clips(toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model=FROZEN["vit"], datasets=datasets(toy))
    extract(recipe, tmp_path / "one")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "stllm", "extract"]
    command = [sys.executable, *launch, "--cfg-path", str(recipe), "--output", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("clips encoded in") == 1
    counts = [0, 0]
    for name in datasets(toy):
        one, two = FeatureStore(tmp_path / "one" / name), FeatureStore(tmp_path / "two" / name)
        assert one.settings == two.settings
        index = json.loads((tmp_path / "two" / name / "index.json").read_text())
        for shard, keys in index["shards"].items():
            counts[int(shard.split("-")[1])] += len(keys)
            for key in keys:
                torch.testing.assert_close(two.load(key), one.load(key), atol=1e-5, rtol=0)
        assert len(one) == len(two)
    assert abs(counts[0] - counts[1]) <= 1


def test_unsuitable_recipes_are_refused(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={**FROZEN["qformer"], "qformer_text_input": True})
    cases = {
        ("vit", "model.freeze_vit=False"): "the vision encoder trains (model.freeze_vit: False)",
        (
            "vit",
            "model.vit_model=eva_btadapter_g model.vision.adapter_depth=1",
        ): "the temporal adapter (model.vit_model: eva_btadapter_g) trains even",
        ("qformer", "model.freeze_vit=True"): "this Q-Former reads the question too (model.qformer_text_input: True)",
        ("qformer", "model.has_qformer=False"): "the model has no Q-Former (model.has_qformer: False)",
        ("vit", "datasets.toy_directions={}"): "unknown data set 'toy_directions'",
        ("vit", "datasets.media_root=nowhere"): "not found: nowhere/media",
    }
    for (stage, option), words in cases.items():
        extract(recipe, tmp_path / "features", stage, "--options", *option.split(), code=1)
        assert words in failure(capsys), option
    plain = ["model.qformer_text_input=False", "model.freeze_qformer=False"]
    extract(recipe, tmp_path / "features", "qformer", "--options", *plain, code=1)
    assert "--stage qformer: the Q-Former trains (model.freeze_qformer: False)" in failure(capsys)
    talk = tmp_path / "talk.json"
    talk.write_text('[{"QA": [{"q": "who?", "a": "me"}]}]')
    text = write_recipe(
        tmp_path / "text.yaml",
        toy,
        model=FROZEN["vit"],
        datasets={"talk": {"anno_path": str(talk), "media": "text"}},
    )
    extract(text, tmp_path / "features", code=1)
    assert "no data set of the configuration has videos or images" in failure(capsys)
    assert not (tmp_path / "features").exists()


def test_a_full_disk_and_too_little_memory_are_reported(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "free")
        patch.setattr(shutil, "disk_usage", lambda path: usage(free=6 * 4 * 5 * 32 * 4 - 1))
        extract(planted, tmp_path / "features", code=1)
        assert "6 clips of stage vit take 0.0 GiB, 0.0 GiB are free: name another disk" in failure(capsys)

    def full(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(precomputed, "encode", full)
    extract(planted, tmp_path / "features", code=1)
    assert "not enough memory for 8 clips at once: lower --batch-size" in failure(capsys)


def test_training_refuses_features_that_are_not_the_pixels(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"videos": datasets(toy)["videos"]}
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model=FROZEN["vit"], datasets=entries)
    features = f"datasets.features_root={tmp_path / 'features'}"
    extract(recipe, tmp_path / "features")
    capsys.readouterr()
    cases = {
        ("model.pre_encoding=True",): "model.pre_encoding is True, but data set videos has no precomputed features",
        (features, "model.freeze_vit=False"): "but the vision encoder trains (model.freeze_vit: False)",
        (features, "model.vit_model=eva_btadapter_g", "model.vision.adapter_depth=2"): "but the temporal adapter",
        (features, "model.image_size=64"): "made with image_size 32, expected 64",
        (features, "datasets.videos.num_frames=8"): "made with num_frames 4, expected 8",
        (features, "datasets.videos.sampling=uniform"): "made with sampling 'middle', expected 'uniform'",
        (features, "run.seed=1"): "the features there were made with other weights than the model's",  # random ones
    }
    for options, words in cases.items():
        train(recipe, *options, f"run.output_dir={tmp_path / 'run'}", code=1)
        assert words in failure(capsys), options
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    extract(recipe, tmp_path / "features", "vit", "--dtype", "bfloat16", code=1)
    assert "made with dtype 'float32', expected 'bfloat16'" in failure(capsys)
