"""The run folder: complete checkpoints, resuming or refusing to, and cutting the log back to the checkpoint."""

import errno
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from stllm.common.errors import UserError
from stllm.runners.run_folder import STATE, RunFolder


def cfg(**run):
    return OmegaConf.create({"model": {"video_input": "all"}, "datasets": {"a": {"anno_path": "x"}}, "run": run})


def write_checkpoint(folder: RunFolder, step: int, *, limit: int | None = None, error: Exception | None = None) -> None:
    with folder.new_checkpoint(step, limit=limit) as partial:
        target = partial / f"checkpoint-{step}"
        target.mkdir()
        (target / "weights").write_text(str(step))
        if error is not None:
            raise error
        (target / STATE).write_text("{}")


def test_a_checkpoint_is_complete_or_absent(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_checkpoint(folder, 9)
    write_checkpoint(folder, 10)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    assert folder.last_checkpoint() == tmp_path / "run" / "checkpoint-10"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-9", "checkpoint-10"}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_checkpoint(folder, 5, limit=1)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(
        UserError, match=r"checkpoint-6 could not be written .*no space left.*checkpoint-5 before it is"
    ):
        write_checkpoint(folder, 6, limit=1, error=full)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-5" / "weights").read_text() == "5"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 10, 3):
        write_checkpoint(folder, step, limit=2)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-3", "checkpoint-10"]


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_checkpoint(folder, 4)
    write_checkpoint(folder, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / ".checkpoint.partial" / "checkpoint-8").mkdir(parents=True)
    assert RunFolder(tmp_path).last_checkpoint() is None


def test_a_run_continues_only_with_its_own_configuration(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(cfg(learning_rate=0.1, logging_steps=1))
    folder.begin(cfg(learning_rate=0.2))  # without a checkpoint the run starts again
    write_checkpoint(folder, 1)
    folder.begin(cfg(learning_rate=0.2, logging_steps=5, dataloader_num_workers=2))
    with pytest.raises(UserError, match=r"another configuration: run\.learning_rate was 0\.2 and is now 0\.3;"):
        folder.begin(cfg(learning_rate=0.3))
    with pytest.raises(UserError, match=r"run\.learning_rate was 0\.2 and is now None \(and 1 more: run\.max_steps\)"):
        folder.begin(cfg(max_steps=4))
    assert OmegaConf.load(folder.config_path).run.learning_rate == 0.2


def test_a_model_that_no_run_wrote_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model that no run made there"):
        RunFolder(tmp_path).begin(cfg())


def test_the_log_is_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_log({"step": step})
    with folder.log_path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed here
    folder.rewind_log(2)
    assert [json.loads(line)["step"] for line in folder.log_path.read_text().splitlines()] == [1, 2]


def test_the_final_model_is_complete_when_its_config_is_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_checkpoint(folder, 1)
    new = tmp_path / "run" / ".model.partial"
    new.mkdir()
    for name in ("config.json", "model.safetensors"):
        (new / name).write_text("new")
    assert not folder.is_finished()
    folder.place_final(new)
    assert folder.is_finished()
    assert {path.name for path in folder.path.iterdir()} == {"checkpoint-1", "config.json", "model.safetensors"}
