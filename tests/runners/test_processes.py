"""`stllm train` in several processes: weights that get no gradient, launchers' options, and dropout."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from tests.helpers.training import assert_same_losses, command, losses, read_log, train, write_recipe

IDLE = "Parameter indices which did not receive grad"  # DDP's error
NOTHING_IDLE = "did not find any unused parameters"  # its warning
IMAGES: dict[str, dict[str, Any]] = {
    "videos": {"anno_path": "video/vqa/toy_direction/train.json", "media_dir": "media", "num_frames": 4},
    "images": {"anno_path": "image/vqa/toy_picture/train.json", "media_dir": "media", "media": "image"},
}
SINGLE_FRAMES: dict[str, dict[str, Any]] = {
    "videos": IMAGES["videos"],
    "short": {"anno_path": "video/reasoning/toy_state/train.json", "media_dir": "media", "num_frames": 1},
}
TEXT: dict[str, dict[str, Any]] = {"videos": IMAGES["videos"], "text": {"anno_path": "text.json", "media": "text"}}
LORA = {"lora_r": 2, "lora_dropout": 0.0, "freeze_LLM": True}
RESIDUAL = {"video_input": "residual", "residual_size": 2}


def one_and_two(folder: Path, toy: Path, *options: str, launcher: str = "run", **recipe: Any) -> tuple[Path, Path, str]:
    """Train one recipe with one process and with two. Returns both folders, and the stderr of the two."""
    path = write_recipe(folder / "recipe.yaml", toy, **recipe)
    one, two = folder / "one", folder / "two"
    words = ["train", "--cfg-path", str(path), "--options", f"run.output_dir={one}", *options]
    assert main(words) == 0
    words = command(path, f"run.output_dir={two}", "run.per_device_train_batch_size=2", *options, processes=2)
    words[words.index("torch.distributed.run")] = f"torch.distributed.{launcher}"
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0 and IDLE not in result.stderr, result.stderr[-3000:]
    return one, two, result.stderr


def test_masking_without_mvm_trains_in_two_processes(toy: Path, tmp_path: Path) -> None:
    """The MVM decoder then gets no gradient. torch.distributed.launch adds --local-rank before the command."""
    one, two, _ = one_and_two(tmp_path, toy, model={"use_mvm": False}, max_steps=4, launcher="launch")
    log = read_log(one)
    assert all(line["loss_mvm"] is None and line["kept_visual_tokens"] < 8 for line in log)
    assert_same_losses(losses(two, ["loss_lm"]), losses(one, ["loss_lm"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "datasets", "idle"),
    [
        ({"use_mask": False, "mvm_decode": True}, None, True),
        ({"use_mask": False, "mvm_decode": False}, None, False),
        ({"use_mask": True, "mvm_decode": False}, None, False),
        ({"use_mask": True, "mvm_decode": True}, None, False),
        ({"use_mvm": False, "mvm_decode": False, **RESIDUAL}, None, False),
        ({"mvm_decode": False}, IMAGES, False),
        ({"mvm_decode": True}, IMAGES, True),
        ({"use_mvm": False, **RESIDUAL}, IMAGES, True),
        ({"use_mask": False, "mvm_decode": False, **RESIDUAL}, IMAGES, True),
        ({**RESIDUAL, **LORA}, IMAGES, True),
        ({"use_mvm": False, **LORA}, None, True),
        ({"mvm_decode": False, **RESIDUAL}, SINGLE_FRAMES, True),
        ({"mvm_decode": False}, TEXT, True),
    ],
)
def test_parts_without_a_gradient_train_in_two_processes(
    toy: Path, tmp_path: Path, model: dict[str, Any], datasets: dict[str, Any] | None, idle: bool
) -> None:
    """Two processes give the losses of one, and search for unused parameters only if there can be some."""
    if datasets is TEXT:
        (tmp_path / "text.json").write_text('[{"QA": [{"q": "what is red?", "a": "the ball"}]}]')
        datasets = {**TEXT, "text": {**TEXT["text"], "anno_path": str(tmp_path / "text.json")}}
    accumulate = "run.gradient_accumulation_steps=2"
    one, two, stderr = one_and_two(tmp_path, toy, accumulate, model=model, datasets=datasets, max_steps=5)
    for found, expected in zip(losses(two, ["loss_lm"]), losses(one, ["loss_lm"]), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    if not idle:
        assert NOTHING_IDLE not in stderr


@pytest.mark.slow
def test_processes_draw_different_dropout(toy: Path, tmp_path: Path) -> None:
    """Both processes have the same sample; with equal dropout the loss would be that of one process."""
    clip = next((toy / "vc2" / "media").glob("*.mp4")).name
    (tmp_path / "one.json").write_text(f'[{{"video": "{clip}", "QA": [{{"q": "what is red?", "a": "the ball"}}]}}]')
    entry = {**IMAGES["videos"], "anno_path": str(tmp_path / "one.json"), "crop": "center", "sampling": "middle"}
    single: dict[str, Any] = {"datasets": {"videos": entry}, "max_steps": 1, "per_device_train_batch_size": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={"use_mask": False}, **single)
    for processes in (1, 2):
        output = f"run.output_dir={tmp_path / str(processes)}"
        train(recipe, output, "model.qformer.dropout=0.5", processes=processes)
    alone, together = (losses(tmp_path / name, ["loss"])[0][0] for name in ("1", "2"))
    assert together == pytest.approx(alone, rel=0.2) and abs(together - alone) > 1e-5
