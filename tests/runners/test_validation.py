"""Validation in `stllm train`: held-out data, equal figures for any number of processes, the best checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from stllm.cli import main
from stllm.common.config import load_config
from stllm.datasets.corpora import build_corpora
from stllm.datasets.mixture import HeldOutSampler
from tests.helpers.training import read_log, train, write_recipe
from tests.helpers.twins import twins

HELD_OUT: dict[str, dict[str, Any]] = {"toy_state": {"val_fraction": 0.3}, "toy_caption": {"split": "val"}}
FOLDERS = {
    name: f"video/{kind}/{name}/train.json" for kind, name in (("reasoning", "toy_state"), ("caption", "toy_caption"))
}
EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "save_steps": 2, "max_steps": 4}


def recipe_of(folder: Path, toy: Path, **run: Any) -> Path:
    """Write a recipe of three data sets, of which one is held out and one partly held out."""
    entries: dict[str, Any] = {"toy_direction": {"anno_path": "video/vqa/toy_direction/train.json"}}
    entries |= {name: {"anno_path": FOLDERS[name], **HELD_OUT[name]} for name in HELD_OUT}
    entries = {name: {"media_dir": "media", "num_frames": 4, **entry} for name, entry in entries.items()}
    roots = {"anno_root": str(toy / "vc2"), "media_root": str(toy / "vc2")}
    folder.mkdir(exist_ok=True)
    return write_recipe(folder / "recipe.yaml", toy, datasets={**roots, **entries}, **{**EVERY_TWO, **run})


def run(recipe: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(["train", "--cfg-path", str(recipe), *(["--options", *options] if options else [])]) == code
    return read_log(recipe.parent / "run") if code == 0 else []


def scores(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in log if "eval_loss" in line]


def learned(log: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in log if "loss" in line]


@pytest.fixture(scope="module")
def validated(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a finished run."""
    recipe = recipe_of(tmp_path_factory.mktemp("validated"), toy, eval_benchmark=str(twins() / "mvbench"))
    run(recipe)
    return recipe


def test_the_log_has_validation_losses_and_scores(validated: Path) -> None:
    lines = scores(read_log(validated.parent / "run"))
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert min(line["eval_loss_toy_state"], line["eval_loss_toy_caption"]) < line["eval_loss"]
        assert line["eval_loss"] < max(line["eval_loss_toy_state"], line["eval_loss_toy_caption"])
        assert 0 <= line["eval_mvbench"] <= 100 and "eval_mvbench_State Change" in line


def test_validation_does_not_change_training(validated: Path, toy: Path, tmp_path: Path) -> None:
    """Held-out samples are left out in both runs."""
    log = run(recipe_of(tmp_path, toy, eval_strategy="no"))
    assert learned(log) == learned(read_log(validated.parent / "run")) and not scores(log)


def test_a_killed_run_continues_with_its_validation(validated: Path, toy: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, toy, eval_benchmark=str(twins() / "mvbench"))
    shutil.copytree(validated.parent / "run", tmp_path / "run")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again, expected = run(recipe), read_log(validated.parent / "run")
    assert learned(again) == pytest.approx(learned(expected), abs=1e-6)
    for found, line in zip(scores(again), scores(expected), strict=True):
        assert found == pytest.approx(line, abs=1e-6)


def test_two_processes_give_the_scores_of_one(validated: Path, toy: Path, tmp_path: Path) -> None:
    options = (
        "run.per_device_train_batch_size=2",
        "run.per_device_eval_batch_size=3",
        f"run.output_dir={tmp_path / 'two'}",
    )
    train(validated, *options, processes=2)
    for found, expected in zip(
        scores(read_log(tmp_path / "two")), scores(read_log(validated.parent / "run")), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-4)


def test_the_best_checkpoint_is_kept_and_becomes_the_result(toy: Path, tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 3.0, "max_steps": 6}
    log = scores(run(recipe_of(tmp_path, toy, **options)))
    best = min(log, key=lambda line: line["eval_loss"])["step"]
    (kept,) = (tmp_path / "run").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{best}" and best < 6
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "run", kept))
    assert all(bool((found[name] == weight).all()) for name, weight in expected.items())


def test_all_parts_of_a_video_are_held_out_together(toy: Path, tmp_path: Path) -> None:
    cfg = load_config(recipe_of(tmp_path, toy))
    OmegaConf.set_struct(cfg, False)
    cfg.datasets.toy_state.qa_sampling = "all"
    parts = {}
    for split in ("train", "val"):
        (source,) = (s for s in build_corpora(cfg, image_size=32, split=split) if s.corpus.name == "toy_state")
        assert source.indices is not None
        parts[split] = {source.corpus.key_of(int(index)).split("[")[0] for index in source.indices}  # type: ignore[attr-defined]
    assert parts["train"] and parts["val"] and not parts["train"] & parts["val"]
    names = [source.corpus.name for source in build_corpora(cfg, image_size=32, split="train")]
    assert names == ["toy_direction", "toy_state"]


@pytest.mark.parametrize(("sizes", "batch_size", "world"), [((5, 1), 2, 2), ((8,), 4, 1), ((1, 7, 3), 3, 3)])
def test_every_held_out_sample_counts_once(sizes: tuple[int, ...], batch_size: int, world: int) -> None:
    ranks = [list(HeldOutSampler(sizes, batch_size=batch_size, rank=r, world_size=world)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {len(HeldOutSampler(sizes, batch_size=batch_size, world_size=world))}
    counted = [(key.corpus, key.index) for batches in ranks for batch in batches for key in batch if not key.round]
    assert sorted(counted) == [(corpus, index) for corpus, size in enumerate(sizes) for index in range(size)]
    assert all(batch and len({key.corpus for key in batch}) == 1 for batches in ranks for batch in batches)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["datasets.toy_state.val_fraction=0", "datasets.toy_caption.split=train"],
            "there is nothing to score: give a data set",
        ),
        (
            ["run.load_best_model_at_end=True", "run.metric_for_best_model=los"],
            "unknown run.metric_for_best_model 'los'",
        ),
        (["run.eval_benchmark=nowhere"], "run.eval_benchmark: "),
        (["datasets.toy_state.max_samples=1"], "val_fraction is 0.3, but there is only one medium"),
        (["datasets.toy_state.split=val", "datasets.toy_direction.split=val"], "every data set has split: val"),
        (["datasets.toy_state.split=test"], "unknown datasets.toy_state.split 'test': known are train, val"),
        (["run.save_strategy=best"], "run.load_best_model_at_end=True keeps the best checkpoint"),
        (["run.eval_steps=0"], "'run.eval_steps' must be above 0"),
    ],
)
def test_data_that_cannot_be_scored_is_refused(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    run(recipe_of(tmp_path, toy), *options, code=1)
    assert words in capsys.readouterr().err


def test_the_held_out_fraction_counts_media(toy: Path, tmp_path: Path) -> None:
    cfg = load_config(recipe_of(tmp_path, toy))
    held = build_corpora(cfg, image_size=32, train=False, split="val")
    counts = {source.corpus.name: (source.indices, len(source.corpus)) for source in held}
    assert counts["toy_caption"][0] is None
    chosen, total = counts["toy_state"]
    assert chosen is not None and len(chosen) == round(0.3 * total)
