"""`stllm verify`: all golden folders, before and after conversion."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stllm.cli import main
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


def test_a_folder_that_is_not_golden_is_refused(
    golden_copy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str | Path) -> str:
        assert main(["verify", str(name)]) == 1
        return capsys.readouterr().err

    advice = "expected a folder of golden tensors (expected.safetensors and meta.json beside weights), such as "
    advice += "tests/golden/minigpt4_plain_all in the repository: name one, or look at other weights with `stllm "
    for name in (tmp_path / "absent", "nobody/nothing"):  # the hub is not asked
        assert refused(name) == f"error: {name}: there is no such folder, {advice}inspect`\n"
    folder = golden_copy("minigpt4_plain_all")
    assert f"error: {folder / 'meta.json'}: found a file, {advice}" in refused(folder / "meta.json")
    (folder / "meta.json").write_text("{}")
    assert f"{folder}: found a meta.json without instructions, {advice}" in refused(folder)
    (folder / "meta.json").unlink()
    assert f"{folder}: found a folder without meta.json, {advice}" in refused(folder)
    assert f"found a folder without expected.safetensors and meta.json, {advice}" in refused(tmp_path)


def test_a_damaged_file_of_golden_tensors_is_refused(
    golden_copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden_copy("minigpt4_plain_all")
    (folder / "expected.safetensors").write_bytes((folder / "expected.safetensors").read_bytes()[:1000])
    assert main(["verify", str(folder)]) == 1
    assert "expected.safetensors can't be read as weights (1000 bytes" in capsys.readouterr().err
