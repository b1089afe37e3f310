"""The tiny encoder's own stage: a run like any other, whose folder holds two parts and no heads."""

import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from stllm.cli import main
from stllm.common.config import load_config
from stllm.datasets.mixture import Mixture, MixturePart
from stllm.datasets.samples import SampleKey
from stllm.toy.seeing import FrameLabels, SeeingHeads, ToyFrame, ToyFrames, ToySeeingTask, collate
from stllm.toy.world import world_texts, write_language_model
from tests.configs.recipes import CONFIGS
from tests.helpers.training import losses, read_log, train

VISION = CONFIGS / "tiny" / "stages" / "1_alignment.yaml"
FEW = ("run.max_steps=4", "run.save_steps=2", "run.logging_steps=1", "run.per_device_train_batch_size=4")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's configuration with the toy world's language, and no world."""
    root = tmp_path_factory.mktemp("language")
    write_language_model(root / "language_model", world_texts(), seed=0)
    path = root / "stage.yaml"
    path.write_text(
        f"base: {VISION}\n"
        f"model: {{llama_model: {root}/language_model}}\n"
        "run: {dataloader_num_workers: 0, use_cpu: True}\n"
    )
    return path


def run(recipe: Path, output: Path, *options: str) -> int:
    return main(["train", "--cfg-path", str(recipe), "--options", *FEW, f"run.output_dir={output}", *options])


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(recipe, folder, "run.save_total_limit=3") == 0
    return folder


def batch_of(count: int, *, seed: int = 0) -> dict[str, Any]:
    """A batch of the recipe's frames, without names and failures."""
    mixture = Mixture([MixturePart(ToyFrames(size=64, patch=8))], seed=seed, max_tries=1)
    frames = [mixture[SampleKey(0, 0, 0, number)] for number in range(count)]
    batch = collate(cast(list[ToyFrame], frames))
    return {key: value for key, value in batch.items() if key not in ("names", "failures")}


def test_what_a_run_leaves_behind(trained: Path) -> None:
    log = read_log(trained)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert all(0 <= line["accuracy"] <= 1 and line["loss"] > 0 and line["grad_norm"] > 0 for line in log)
    assert all(line["loss_lm"] is line["loss_mvm"] is line["kept_visual_tokens"] is None for line in log)
    left = load_file(trained / "model.safetensors")
    assert {key.split(".")[0] for key in left} == {"vision_encoder", "qformer"}
    kept = load_file(trained / "checkpoint-4" / "model.safetensors")
    assert {key.split(".")[0] for key in kept} == {"vision_encoder", "qformer", "heads"}
    assert all(torch.equal(left[key], kept[key]) for key in left)
    assert (trained / "config.json").is_file() and not (trained / "checkpoint-4" / "config.json").exists()


def test_the_same_command_goes_on_and_the_seed_decides(recipe: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoint-4")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    assert run(recipe, folder) == 0
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    names = ("step", "loss", "accuracy", "learning_rate", "grad_norm")
    assert losses(folder, names) == losses(trained, names)
    assert run(recipe, tmp_path / "other", "run.seed=1", "run.max_steps=1") == 0
    assert read_log(tmp_path / "other")[0]["loss"] != read_log(trained)[0]["loss"]


def test_the_loss_falls(recipe: Path, tmp_path: Path) -> None:
    steps = ("run.max_steps=60", "run.save_steps=60", "run.warmup_steps=10", "run.per_device_train_batch_size=8")
    assert run(recipe, tmp_path, *steps) == 0
    log = [line["loss"] for line in read_log(tmp_path)]
    assert sum(log[-10:]) < 0.85 * sum(log[:10])


def test_micro_batches_are_shares_of_the_steps_loss(recipe: Path) -> None:
    task = ToySeeingTask.from_config(load_config(recipe), seed=0)
    model = task.build_model(device="cpu", dtype=torch.float32, trained_dtype=None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    batch = batch_of(3)
    alone, third = (model(**batch, num_items_in_batch=frames)["loss"].item() for frames in (None, torch.tensor(9)))
    assert third == pytest.approx(alone / 3)
    model(**batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frames_with_nothing_in_them_can_be_learned_from() -> None:
    heads, truth = SeeingHeads(width=8, query_width=8), FrameLabels(**batch_of(2)["truth"])
    empty = FrameLabels(*(torch.zeros_like(part) for part in truth))
    features, queries = torch.randn(2, 65, 8, requires_grad=True), torch.randn(2, 6, 8)
    loss, accuracy = heads(features, queries, empty)
    loss.backward()
    assert features.grad is not None
    assert math.isfinite(float(loss.detach())) and bool(features.grad.isfinite().all()) and 0 <= accuracy <= 1


def test_mistakes(recipe: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, sentence in (
        (["model.num_query_token=4"], "needs a Q-Former of more than 4 queries"),
        (["model.has_qformer=False"], "needs a Q-Former of more than 4 queries"),
        (["model.freeze_vit=True"], "one of them is frozen"),
        (["model.qformer_text_input=True"], "set model.qformer_text_input=False"),
        (["datasets.toy_direction.media=video"], "found datasets.toy_direction, leave it out"),
    ):
        assert run(recipe, tmp_path / "new", *options) == 1
        assert sentence in capsys.readouterr().err
    (trained / "config.json").rename(tmp_path / "config.json")
    assert run(recipe, trained, "run.learning_rate=0.001") == 1
    (tmp_path / "config.json").rename(trained / "config.json")
    assert "run.learning_rate" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_see_the_frames_of_one(recipe: Path, trained: Path, tmp_path: Path) -> None:
    """A frame counts a little more where the frames beside it show less, so losses are close, not equal."""
    divided = [*FEW[:3], "run.per_device_train_batch_size=2", f"run.output_dir={tmp_path}"]
    train(recipe, *divided, processes=2)
    names = ("loss", "accuracy")
    assert losses(tmp_path, names)[0][1] == losses(trained, names)[0][1]
    for found, expected in zip(losses(tmp_path, names[:1]), losses(trained, names[:1]), strict=True):
        assert found == pytest.approx(expected, rel=0.1)
    left = load_file(tmp_path / "model.safetensors")
    assert {key.split(".")[0] for key in left} == {"vision_encoder", "qformer"}
