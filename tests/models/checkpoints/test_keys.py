"""Key tables: renaming there and back, fused tensors, ignored and unknown keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stllm.models.checkpoints import tables
from stllm.models.checkpoints.keys import KeyTable, UnknownKeyError
from tests.models.checkpoints.conftest import FOLDERS, FOREIGN, golden_weights

INVERTIBLE = (
    tables.RELEASED,
    tables.INSTRUCTBLIP_LAVIS,
    tables.BLIP2_LAVIS,
    tables.MINIGPT4,
    tables.CAUSAL_LM,
    tables.eva_table(39),
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
    table = tables.eva_table(4)
    weights = torch.load(FOREIGN / "eva_vit_g.pth", weights_only=True)
    ignored = {key for key in weights if table.to_ours(key) is None}
    assert {key.split(".")[0] for key in ignored} == {"blocks", "norm", "head"}
    assert {key.split(".")[1] for key in ignored if key.startswith("blocks")} == {"4"}
    assert "vision_encoder.backbone.blocks.3.norm1.weight" in table.convert(weights)


def test_a_fused_bias_is_split_and_its_k_part_must_be_zero() -> None:
    key = "vision_model.encoder.layers.7.self_attn.qkv.bias"
    fused = torch.cat([torch.full((4,), 1.0), torch.zeros(4), torch.full((4,), 3.0)])
    ours = tables.TRANSFORMERS_BLIP.convert({key: fused})
    stem = "vision_encoder.backbone.blocks.7.attn"
    assert {name: tensor[0].item() for name, tensor in ours.items()} == {f"{stem}.q_bias": 1.0, f"{stem}.v_bias": 3.0}
    fused[5] = 0.5
    with pytest.raises(ValueError, match="no key bias"):
        tables.TRANSFORMERS_BLIP.convert({key: fused})


def test_a_converted_state_dict_has_the_same_tensors() -> None:
    weights = golden_weights("minigpt4_plain_all")
    ours = tables.RELEASED.convert(weights)
    assert ours["projection.weight"] is not None
    assert torch.equal(ours["projection.weight"], weights["model.stllm_model.llama_proj.weight"])
    assert torch.equal(ours["language_model.model.norm.weight"], weights["model.norm.weight"])
