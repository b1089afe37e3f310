"""Key tables: renaming there and back, fused tensors, ignored and unknown keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stllm.models.checkpoints import tables
from stllm.models.checkpoints.formats import open_source
from stllm.models.checkpoints.tables import KeyTable, UnknownKeyError
from tests.models.checkpoints.conftest import FOLDERS, FOREIGN, GOLDEN, golden_weights

LM_NORM = "language_model.model.norm.weight"

INVERTIBLE = (
    tables.RELEASED,
    tables.INSTRUCTBLIP_LAVIS,
    tables.BLIP2_LAVIS,
    tables.MINIGPT4,
    tables.CAUSAL_LM,
    tables.EVA,
)


@pytest.mark.parametrize("name", FOLDERS)
def test_released_keys_survive_the_way_to_ours_and_back(name: str) -> None:
    keys = golden_weights(name)
    ours = {key: tables.RELEASED.to_ours(key) for key in keys}
    kept = {key: value for key, value in ours.items() if value is not None}
    assert len(set(kept.values())) == len(kept), "two keys became one"
    assert {tables.RELEASED.to_theirs(value) for value in kept.values()} == set(kept)


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
        tables.MINIGPT4.to_ours("llama_proj2.weight")
    with pytest.raises(UnknownKeyError):
        tables.RELEASED.to_theirs("something.else")


def test_eva_leaves_out_one_block_and_the_classifier() -> None:
    source = open_source(FOREIGN / "eva_vit_g.pth")
    assert {key.split(".")[0] for key in source.ignored_keys} == {"blocks", "norm", "head"}
    assert {key.split(".")[1] for key in source.ignored_keys if key.startswith("blocks")} == {"4"}
    assert "vision_encoder.backbone.blocks.3.norm1.weight" in source.entries


def test_a_fused_bias_is_split() -> None:
    """That its k part must be zero is the loading's, see test_foreign.py."""
    fused = torch.cat([torch.full((4,), 1.0), torch.zeros(4), torch.full((4,), 3.0)])
    targets = tables.TRANSFORMERS_BLIP.targets("vision_model.encoder.layers.7.self_attn.qkv.bias")
    stem = "vision_encoder.backbone.blocks.7.attn"
    parts = {target.key: target.take(fused).tolist() for target in targets}
    assert parts == {f"{stem}.q_bias": [1.0] * 4, None: [0.0] * 4, f"{stem}.v_bias": [3.0] * 4}


def test_a_source_s_entries_are_its_tensors_under_our_names() -> None:
    weights = golden_weights("minigpt4_plain_all")
    source = open_source(GOLDEN / "minigpt4_plain_all")
    ours = {key: source.weights.read(source.entries[key].key) for key in ("projection.weight", LM_NORM)}
    assert torch.equal(ours["projection.weight"], weights["model.stllm_model.llama_proj.weight"])
    assert torch.equal(ours[LM_NORM], weights["model.norm.weight"])
