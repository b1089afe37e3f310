"""Section `run`: keys that need more than transformers' checks, such as FSDP settings and published DeepSpeed files."""

import logging
from pathlib import Path
from typing import Any

import pytest

from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.common.run_section import DEEPSPEED, LAVIS, check_run, run_keys


def load_run(*options: str) -> Any:
    return load_config(None, options, "tiny").run


@pytest.mark.parametrize("name", LAVIS)
def test_the_error_for_a_lavis_name_gives_the_current_name(name: str) -> None:
    assert LAVIS[name] in run_keys() and name not in run_keys()
    with pytest.raises(UserError, match=rf"unknown key 'run\.{name}'; did you mean '{LAVIS[name]}'\?$"):
        load_run(f"run.{name}=1")


def test_fsdp_accepts_true_and_false() -> None:
    assert load_run("run.fsdp=True").fsdp is True
    assert load_run("run.fsdp=False").fsdp is False
    assert load_run("run.fsdp='full_shard auto_wrap'").fsdp == "full_shard auto_wrap"


def test_fsdp_true_becomes_words_for_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {**run_keys(), "fsdp": list[str] | str | None}
    monkeypatch.setattr("stllm.common.run_section.run_keys", lambda: old)
    assert check_run({"fsdp": True}, lambda key: "x")["fsdp"] == "full_shard auto_wrap"
    assert check_run({"fsdp": False}, lambda key: "x")["fsdp"] is False


def test_keys_of_fsdp_config_are_checked() -> None:
    run = load_run("run.fsdp=True", "run.fsdp_config={version: 2, fsdp_cpu_offload: True}")
    assert run.fsdp_config == {"version": 2, "fsdp_cpu_offload": True}
    with pytest.raises(UserError) as caught:
        load_run("run.fsdp=True", "run.fsdp_config={cpu_ofload: True}")
    assert str(caught.value).startswith("--options: unknown key of run.fsdp_config 'cpu_ofload': known are activation_")
    assert str(caught.value).endswith("; did you mean 'cpu_offload'?")


def test_a_published_deepspeed_path_finds_the_shipped_file(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert load_run("run.deepspeed=stllm/train/zero2.json").deepspeed == str(DEEPSPEED / "zero2.json")
    assert (
        f"--options: run.deepspeed: stllm/train/zero2.json is not here, {DEEPSPEED}/zero2.json is taken" in caplog.text
    )
    assert load_run("run.deepspeed=zero3_offload.json").deepspeed == str(DEEPSPEED / "zero3_offload.json")


def test_other_deepspeed_paths_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2.json").write_text("{}")
    assert load_run("run.deepspeed=zero2.json").deepspeed == str(tmp_path / "zero2.json")  # one's own goes first
    assert load_run("run.deepspeed=/nowhere/zero2.json").deepspeed == "/nowhere/zero2.json"
    assert load_run("run.deepspeed=other.json").deepspeed == "other.json"
    assert load_run("run.deepspeed={zero_optimization: {stage: 2}}").deepspeed == {"zero_optimization": {"stage": 2}}
    assert "deepspeed" not in load_run("run.deepspeed=null", "run.seed=1")
