"""`stllm verify`: all golden folders, before and after conversion."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.models.checkpoints.convert import convert
from stllm.models.checkpoints.verify import verify_folder
from tests.models.checkpoints.conftest import FOLDERS, GOLDEN


@pytest.mark.parametrize("name", FOLDERS)
def test_every_golden_number_is_recomputed(name: str) -> None:
    rows = verify_folder(GOLDEN / name)
    assert {row.name: row.difference for row in rows if not row.passed} == {}
    expected = set(load_file(GOLDEN / name / "expected.safetensors"))
    compared = {row.name for row in rows} | {"video", "mask", "prompt_ids_before", "prompt_ids_after"}
    assert expected <= compared, "a tensor was not compared"


@pytest.mark.parametrize("name", ["instructblip_residual_mvm", "minigpt4_bta_all_mvm"])
def test_golden_numbers_survive_conversion_and_back(name: str, tmp_path: Path) -> None:
    convert([GOLDEN / name], tmp_path / "ours")
    convert([tmp_path / "ours"], tmp_path / "released", format="released")
    convert([tmp_path / "released"], tmp_path / "again")
    for place in ("ours", "released", "again"):
        rows = verify_folder(GOLDEN / name, checkpoint=tmp_path / place)
        assert {row.name: row.difference for row in rows if not row.passed} == {}
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert (tmp_path / "ours/config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()


def test_the_command_names_tensors_beyond_tolerance(
    golden_copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden_copy("minigpt4_plain_all")
    expected = load_file(folder / "expected.safetensors")
    expected["vit_ln"] = expected["vit_ln"] + 1e-3
    expected["greedy_ids"][0, 3] += 1
    expected["grad.model.stllm_model.llama_proj.weight"] *= 1.01
    expected["loss"] = torch.tensor(float("nan"))
    save_file(expected, folder / "expected.safetensors")
    assert main(["verify", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: beyond tolerance: ")
    for name in ("vit_ln", "greedy_ids", "grad.model.stllm_model.llama_proj.weight", "loss"):
        assert f"minigpt4_plain_all: {name}" in err
    assert err.count("minigpt4_plain_all") == 4
    assert "frame_tokens" in out


def test_a_folder_that_is_not_golden_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no golden folder"):
        verify_folder(tmp_path)
