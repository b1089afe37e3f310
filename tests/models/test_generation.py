"""Generation: prompts are read once, prefixes are shared, and the ids are those of transformers' `generate`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from stllm.models import generation
from stllm.models.generation import NotShared, Prefix, PromptLayer, generate, shares_prompts, weights_state
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
    """Return a model with scaled-up weights, so that answers vary, and in float64 if possible, against rounding."""
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
    """Return random embeddings (B, S, D), padded on the left, and their attention mask (B, S)."""
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


def test_prompts_read_in_a_batch_give_the_same_ids_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of a batch are padded on the right."""
    model = new_model("llama", {})
    embeds, mask = prompts(model)
    plain = model.generate(inputs_embeds=embeds, attention_mask=mask, **settings(3))
    for most in (1, 46, 10_000):
        monkeypatch.setitem(generation.PREFILL_POSITIONS, "cpu", most)
        assert torch.equal(generate(model, embeds, mask, **settings(3)), plain)


def test_a_prompt_is_read_once_and_its_keys_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert self.rest_keys is not None and self.rest_keys.shape[:3] == (2, 2, 16)
        seen.add((self.rest_keys.data_ptr(), self.rest_keys._version))

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
    rows = [row[-length:-1] for row, length in zip(embeds, LENGTHS, strict=True)]
    with pytest.raises(NotShared), generation.shared_attention(model):
        parts = generation._share(rows, None, share=True)
        generation._prefill(model, rows, parts, generation.new_cache(model, parts))
    assert torch.equal(generate(model, embeds, mask, **settings(3)), plain)
    assert model.config._attn_implementation == "sdpa"


# ---- prompts with a common beginning --------------------------------------------------------------------------------


def alike(model: Any, *, common: int = 12, rests: tuple[int, ...] = (5, 1, 9, 3)) -> tuple[Tensor, Tensor]:
    """Return two pairs of prompts, padded on the left. The prompts of a pair share their first `common` positions."""
    embeds, mask = prompts(model, tuple(common + rest for rest in rests))
    for first in (0, 2):
        begins = [embeds.shape[1] - common - rest for rest in rests[first : first + 2]]
        embeds[first + 1, begins[1] : begins[1] + common] = embeds[first, begins[0] : begins[0] + common]
    return embeds, mask


def watched_positions(model: Any) -> list[int]:
    """Return a list to which each forward pass over embeddings appends its number of positions."""
    read: list[int] = []

    def watch(_: object, __: object, named: dict[str, Any]) -> None:
        if named.get("inputs_embeds") is not None:
            read.append(named["inputs_embeds"].shape[:2].numel())

    model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    return read


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    ("model_type", "sizes"), [(name, sizes) for name, sizes in SHARED.items() if name != "deepseek_v3"]
)
def test_prompts_share_their_common_beginning(model_type: str, sizes: dict[str, Any], num_beams: int) -> None:
    """Prefixes are shared within a batch, with another call, and with a call with the same prompts."""
    model = new_model(model_type, sizes)
    embeds, mask = alike(model)
    plain = model.generate(inputs_embeds=embeds, attention_mask=mask, **settings(num_beams, 12))
    assert torch.equal(generate(model, embeds, mask, **settings(num_beams, 12)), plain)
    kept: list[Prefix] = []
    for rows in ([0], [1, 3], [0, 1, 2, 3], [2, 1, 0, 3]):
        shelves = [kept] * len(rows)
        ids = generate(model, embeds[rows], mask[rows], prefixes=shelves, **settings(num_beams, 12))
        answers = [row[: row.tolist().index(2) + 1 if 2 in row else len(row)].tolist() for row in ids]
        expected = [row[: row.tolist().index(2) + 1 if 2 in row else len(row)].tolist() for row in plain[rows]]
        assert answers == expected
    assert [len(prefix.embeds) for prefix in kept].count(16) == 1


def test_only_the_differing_rest_of_a_prompt_is_read() -> None:
    model = new_model("llama", {})
    embeds, mask = alike(model)
    kept: list[Prefix] = []
    read = watched_positions(model)
    generate(model, embeds[:1], mask[:1], prefixes=[kept], **settings(1, 1))
    assert read == [16, 1]  # `generate` reads the last token
    assert [len(prefix.embeds) for prefix in kept] == [16]
    width = SMALL["hidden_size"]
    per_token = (width + 3 * 2 * 2 * (width // 4)) * 8  # bytes: embedding; keys and values of 3 layers, 2 heads of 4
    assert kept[0].nbytes == 16 * per_token
    read.clear()
    generate(model, embeds[:1], mask[:1], prefixes=[kept], **settings(1, 1))
    assert read == [1]
    read.clear()
    generate(model, embeds[2:], mask[2:], prefixes=[kept] * 2, **settings(1, 1))
    assert read == [20, 2, 2]  # the first one, the rest of the second, and their last tokens
    assert [len(prefix.embeds) for prefix in kept] == [16, 20]
    read.clear()
    generate(model, embeds, mask, prefixes=[kept] * 4, **settings(1, 1))
    assert read == [2, 4]


def test_a_longer_prompt_replaces_its_shorter_prefix() -> None:
    model = new_model("llama", {})
    embeds, mask = prompts(model, (40,))
    kept: list[Prefix] = []
    lengths = []
    for end in (20, 24, 31, 40):
        plain = model.generate(inputs_embeds=embeds[:, :end], attention_mask=mask[:, :end], **settings(3, 8))
        ids = generate(model, embeds[:, :end], mask[:, :end], prefixes=[kept], **settings(3, 8))
        assert torch.equal(ids, plain)
        lengths.append([len(prefix.embeds) for prefix in kept])
    assert lengths == [[19], [19], [30], [30]]  # 4 and 9 more positions are read again


def test_a_short_common_beginning_is_not_shared() -> None:
    model = new_model("llama", {})
    embeds, mask = alike(model, common=4, rests=(15, 20, 30, 16))
    plain = model.generate(inputs_embeds=embeds, attention_mask=mask, **settings(1, 8))
    kept: list[Prefix] = []
    assert torch.equal(generate(model, embeds, mask, prefixes=[kept] * 4, **settings(1, 8)), plain)
    assert len(kept) == 4


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("mistral", {"sliding_window": 8}), ("bloom", {}), ("deepseek_v3", ARCHITECTURES["deepseek_v3"])],
)
def test_architectures_that_fall_back_keep_no_prefixes(model_type: str, sizes: dict[str, Any]) -> None:
    model = new_model(model_type, sizes)
    embeds, mask = alike(model)
    kept: list[Prefix] = []
    plain = model.generate(inputs_embeds=embeds, attention_mask=mask, **settings(1, 4))
    assert torch.equal(generate(model, embeds, mask, prefixes=[kept] * 4, **settings(1, 4)), plain)
    assert kept == []


def test_keys_that_depend_on_the_prompt_length_are_not_shared() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = new_model("llama", {"rope_parameters": rope, "max_position_embeddings": 16})
    embeds, mask = alike(model)
    kept: list[Prefix] = []
    generate(model, embeds, mask, prefixes=[kept] * 4, **settings(1, 4))
    assert kept == []


def test_changed_weights_change_the_state() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), new_model("llama", {}))
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    states = [weights_state(model)]
    with torch.no_grad():
        model.get_decoder().norm.weight.mul_(2)
    states.append(weights_state(model))
    for layer in layers:
        layer.enable_adapters(False)
    states.append(weights_state(model))
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    states.append(weights_state(model))
    assert len(set(states)) == 4
    assert weights_state(model) == states[-1]
