"""Formats: recognising them, missing shards, the hub and its errors, and key tables in both directions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.models.checkpoints import formats
from stllm.models.checkpoints.formats import Format, KeyTable, UnknownKeyError, locate, open_source, weight_files
from tests.models.checkpoints.conftest import FOLDERS, FOREIGN, GOLDEN, golden_weights


@pytest.mark.parametrize("name", FOLDERS)
def test_released_folders_are_recognised(name: str) -> None:
    source = open_source(GOLDEN / name)
    assert source.format is Format.RELEASED
    assert source.is_whole_model
    assert not source.unknown_keys


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("eva_vit_g.pth", Format.EVA),
        ("instruct_blip_vicuna7b_trimmed.pth", Format.INSTRUCTBLIP),
        ("blip2_pretrained_flant5xxl.pth", Format.BLIP2),
        ("pretrained_minigpt4.pth", Format.MINIGPT4),
    ],
)
def test_single_files_are_recognised_by_their_keys(name: str, format: Format, tmp_path: Path) -> None:
    renamed = tmp_path / "weights.pth"  # the name does not matter
    renamed.write_bytes((FOREIGN / name).read_bytes())
    for path in (FOREIGN / name, renamed, tmp_path):  # nor does a folder around it
        source = open_source(path)
        assert source.format is format
        assert not source.is_whole_model
        assert not source.unknown_keys


def test_a_language_model_is_recognised(vicuna: Callable[[str], Path]) -> None:
    source = open_source(vicuna("minigpt4"))
    assert source.format is Format.CAUSAL_LM
    assert "language_model.model.layers.2.mlp.up_proj.weight" in source.entries
    assert all("inv_freq" in key for key in source.ignored_keys)


@pytest.mark.parametrize("with_index", [False, True])
def test_a_missing_shard_is_reported(golden_copy: Callable[[str], Path], with_index: bool) -> None:
    folder = golden_copy("minigpt4_plain_all")
    lost = "pytorch_model-00002-of-00002.bin"
    if with_index:
        index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": lost}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / lost).unlink()
    with pytest.raises(UserError, match=rf"shard 2 of 2, {lost}, is missing in .*minigpt4_plain_all"):
        open_source(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 5}}])
def test_an_index_without_files_is_refused(index: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json holds no weight_map, expected each tensor's file"):
        weight_files(tmp_path)


@pytest.mark.parametrize("place", ["../other", "sub/../../other", "absolute"])
def test_an_index_that_names_files_outside_its_folder_is_refused(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "model" / "sub").mkdir(parents=True)
    save_file({"llama_proj.weight": torch.zeros(2, 2)}, tmp_path / "other" / "model.safetensors")
    name = f"{tmp_path / 'other' if place == 'absolute' else place}/model.safetensors"
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"llama_proj.weight": name}}))
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert f"{index}: its weight_map names {name!r}, a file outside this folder" in capsys.readouterr().err
    inside = tmp_path / "model" / "sub" / "model.safetensors"  # a link, as in the hub's cache
    inside.symlink_to(tmp_path / "other" / "model.safetensors")
    index.write_text(json.dumps({"weight_map": {"llama_proj.weight": "sub/model.safetensors"}}))
    assert main(["inspect", str(tmp_path / "model")]) == 0


def test_safetensors_shards_are_found(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"model-{number:05d}-of-00002.safetensors").touch()
    assert [path.name[:11] for path in weight_files(tmp_path)] == ["model-00001", "model-00002"]


def test_training_args_bin_is_not_a_weight_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "training_args.bin")
    with pytest.raises(UserError, match="holds no weights"):
        weight_files(tmp_path)


def test_a_dead_link_to_a_weight_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(UserError, match=r"model\.safetensors is a link to .*gone, which does not exist"):
        weight_files(tmp_path)


@pytest.mark.parametrize("make", ["empty", "two", "unknown", "orphan", "bad json"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, make: str) -> None:
    expected = "holds no weights"
    if make == "two":
        for name in ("a.pth", "b.pth"):
            torch.save({"x": torch.ones(1)}, tmp_path / name)
        expected = "several weight files"
    elif make == "unknown":
        torch.save({"backbone.conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
        expected = "no known checkpoint .*backbone.conv1"
    elif make == "orphan":
        torch.save({"language_model.lm_head.weight": torch.ones(1)}, tmp_path / "model.bin")
        expected = "no config.json beside it"
    elif make == "bad json":
        (tmp_path / "config.json").write_text("{")
        expected = "not valid JSON"
    with pytest.raises(UserError, match=expected):
        open_source(tmp_path)


def test_a_lora_adapter_without_its_model_is_refused(tmp_path: Path) -> None:
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"a LoRA adapter without the model under it: .*convert MODEL --adapter"):
        open_source(tmp_path)


def test_a_single_shard_is_refused() -> None:
    shard = next((GOLDEN / FOLDERS[0]).glob("*-00001-of-00002.bin"))
    with pytest.raises(UserError, match=rf"is one of 2 shards: name their folder, {shard.parent}$"):
        open_source(shard)


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    torch.save({"shared.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds a t5 model, expected a causal language model"):
        open_source(tmp_path)


def test_a_missing_path_is_reported() -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        locate("/nowhere/at/all")


def test_only_hub_names_are_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("org/name") == tmp_path
    assert asked == ["org/name"]


def test_a_failure_of_the_hub_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no network\nlong\ntext")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"org/name: there is no such file or folder, .*\(no network\)"):
        locate("org/name")


# ---- key tables ----------------------------------------------------------------------------------------------------

LM_NORM = "language_model.model.norm.weight"

INVERTIBLE = [
    getattr(formats, name) for name in ("RELEASED", "INSTRUCTBLIP_LAVIS", "BLIP2_LAVIS", "MINIGPT4", "CAUSAL_LM", "EVA")
]


@pytest.mark.parametrize("name", FOLDERS)
def test_released_keys_survive_translation_to_ours_and_back(name: str) -> None:
    keys = golden_weights(name)
    ours = {key: formats.RELEASED.to_ours(key) for key in keys}
    kept = {key: value for key, value in ours.items() if value is not None}
    assert len(set(kept.values())) == len(kept), "two keys became one"
    assert {formats.RELEASED.to_theirs(value) for value in kept.values()} == set(kept)


PARTS = st.sampled_from(
    (
        "attn.q_bias",
        "attn.qkv.weight",
        "mlp.fc1.bias",
        "attention.self.query.weight",
        "crossattention.self.key.bias",
        "attention.output.dense.weight",
        "LayerNorm.weight",
        "self_attn.q_proj.weight",
        "weight",
        "bias",
    )
)


@given(table=st.sampled_from(INVERTIBLE), data=st.data())
def test_every_table_is_a_bijection_on_what_it_renames(table: KeyTable, data: st.DataObject) -> None:
    prefix = data.draw(st.sampled_from([theirs for theirs, _ in table.prefixes]))
    number = data.draw(st.integers(0, 47))
    rest = data.draw(PARTS)
    key = f"{prefix}{number}.{rest}" if prefix.endswith((".", "")) else prefix
    ours = table.to_ours(key)
    if ours is not None:
        assert table.to_theirs(ours) == key


def test_an_unknown_key_raises() -> None:
    with pytest.raises(UnknownKeyError):
        formats.MINIGPT4.to_ours("llama_proj2.weight")
    with pytest.raises(UnknownKeyError):
        formats.RELEASED.to_theirs("something.else")


def test_eva_leaves_out_one_block_and_the_classifier() -> None:
    source = open_source(FOREIGN / "eva_vit_g.pth")
    assert {key.split(".")[0] for key in source.ignored_keys} == {"blocks", "norm", "head"}
    assert {key.split(".")[1] for key in source.ignored_keys if key.startswith("blocks")} == {"4"}
    assert "vision_encoder.backbone.blocks.3.norm1.weight" in source.entries


def test_entries_of_a_source_are_its_tensors_under_our_names() -> None:
    weights = golden_weights("minigpt4_plain_all")
    source = open_source(GOLDEN / "minigpt4_plain_all")
    ours = {key: source.weights.read(source.entries[key].key) for key in ("projection.weight", LM_NORM)}
    assert torch.equal(ours["projection.weight"], weights["model.stllm_model.llama_proj.weight"])
    assert torch.equal(ours[LM_NORM], weights["model.norm.weight"])
