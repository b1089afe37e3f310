"""Prompts that are read once give the ids of transformers' own `generate`, and their keys and values stay in place."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from stllm.models import generation
from stllm.models.generation import NotShared, PromptLayer, generate, shares_prompts
from tests.models.test_language_model import ARCHITECTURES

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gpt2": {},
    "phi": {},
    "cohere": {},
    "granite": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "smollm3": {},
    **{name: ARCHITECTURES[name] for name in ("mixtral", "deepseek_v3")},
}
FALLING_BACK: dict[str, dict[str, Any]] = {  # sliding windows, softcap, ALiBi, state space, convolutions
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16},
    "bloom": {},
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}
LENGTHS = (17, 5, 23, 1)


def new_model(model_type: str, sizes: dict[str, Any]) -> Any:
    """Large random weights, so that answers vary; float64 where experts allow it, so that rounding does not decide."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **sizes})
    model = AutoModelForCausalLM.from_config(config).eval()
    if "num_experts_per_tok" not in sizes:
        model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def prompts(model: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Embeddings (B, S, D) and their mask (B, S), padded on the left."""
    width = model.get_input_embeddings().weight.shape[1]
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return torch.randn(len(lengths), max(lengths), width, dtype=model.dtype), mask


def settings(num_beams: int, max_new_tokens: int = 40) -> dict[str, Any]:
    config = GenerationConfig(num_beams=num_beams, max_new_tokens=max_new_tokens, eos_token_id=2, pad_token_id=0)
    return {"generation_config": config}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    ("model_type", "sizes", "shared"),
    [(name, sizes, True) for name, sizes in SHARED.items()]
    + [(name, sizes, False) for name, sizes in FALLING_BACK.items()],
)
def test_ids_are_those_of_plain_generate(model_type: str, sizes: dict[str, Any], shared: bool, num_beams: int) -> None:
    model = new_model(model_type, sizes)
    assert shares_prompts(model) == shared
    embeds, mask = prompts(model)
    for rows in (slice(0, 4), slice(2, 3)):  # a batch, and a single prompt
        plain = model.generate(inputs_embeds=embeds[rows], attention_mask=mask[rows], **settings(num_beams))
        assert torch.equal(generate(model, embeds[rows], mask[rows], **settings(num_beams)), plain)
    assert model.config._attn_implementation != generation.SHARED


def test_prompts_read_together_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those read together are padded on the right."""
    model = new_model("llama", {})
    embeds, mask = prompts(model)
    plain = model.generate(inputs_embeds=embeds, attention_mask=mask, **settings(3))
    for most in (1, 46, 10_000):
        monkeypatch.setitem(generation.PREFILL_POSITIONS, "cpu", most)
        assert torch.equal(generate(model, embeds, mask, **settings(3)), plain)


def test_a_prompt_is_read_once_and_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama", {})
    embeds, mask = prompts(model, (17, 9))
    read: list[tuple[int, ...]] = []

    def watch(_: object, __: object, named: dict[str, Any]) -> None:
        given = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        read.append(tuple(given.shape[:2]))

    model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    seen: set[tuple[int, int]] = set()
    reorder = PromptLayer.reorder_cache

    def watched(self: PromptLayer, beam_idx: Tensor) -> None:
        reorder(self, beam_idx)
        assert self.prompt_keys is not None and self.prompt_keys.shape[:3] == (2, 2, 16)
        seen.add((self.prompt_keys.data_ptr(), self.prompt_keys._version))

    monkeypatch.setattr(PromptLayer, "reorder_cache", watched)
    generate(model, embeds, mask, **settings(3))
    assert read[0] == (2, 16)  # both prompts at once, without a row a beam and without their last tokens
    assert set(read[1:]) == {(6, 1)} and len(read) > 5
    assert len(seen) == SMALL["num_hidden_layers"]


def test_an_architecture_that_changes_its_keys_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama", {})
    embeds, mask = prompts(model)
    plain = model.generate(inputs_embeds=embeds, attention_mask=mask, **settings(3))
    update = PromptLayer.update
    monkeypatch.setattr(PromptLayer, "update", lambda *args, **named: tuple(x + 0 for x in update(*args, **named)))
    with pytest.raises(NotShared), generation.shared_attention(model):
        generation._prefill(model, embeds, list(LENGTHS), generation.new_cache(model, list(LENGTHS)))
    assert torch.equal(generate(model, embeds, mask, **settings(3)), plain)
    assert model.config._attn_implementation == "sdpa"
