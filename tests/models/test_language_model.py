"""Separate calls of decoder and output head give the numbers of the whole model, for every architecture."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from stllm.common.errors import UserError
from stllm.models import language_model
from stllm.models.language_model import (
    build_language_model,
    language_loss,
    last_hidden_states,
    logits_of,
    packing_fault,
    set_attention,
)
from stllm.processors.sequences import VISUAL_TOKEN_ID, pad_sequences, share_beginning

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "gemma2": {**SMALL, "head_dim": 8, "final_logit_softcapping": 5.0},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "gemma": {**SMALL, "head_dim": 8},
    "falcon": SMALL,
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": SMALL,
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "phimoe": {**EXPERTS, "num_local_experts": 4},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "head_dim": 8},
    "granitemoe": {**EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "deepseek_v3": {
        **EXPERTS,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "jamba": {
        **EXPERTS,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
}


UNPACKABLE = {"falcon", "jamba"}
WINDOW: dict[str, Any] = {"sliding_window": 4}


def build(name: str, changes: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = ARCHITECTURES.get(name, SMALL) | (changes or {})
    return build_language_model(AutoConfig.for_model(name, **settings), **options).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_logits_equal_the_whole_model(name: str) -> None:
    model = build(name)
    embeds = torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    labels = torch.randint(3, 64, (2, 9)).masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    whole = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    hidden = last_hidden_states(model, embeds, mask)
    real = mask.bool()  # states at padded positions are not used
    assert torch.allclose(logits_of(model, hidden)[real], whole.logits[real], atol=1e-5)
    positions = (labels[:, 1:] != -100).nonzero() @ torch.tensor([9, 1])
    loss, logits = language_loss(model, hidden, labels, positions)
    assert torch.allclose(loss, whole.loss, atol=1e-5)
    assert logits is not None and logits.shape == ((labels[:, 1:] != -100).sum(), 64)


PACKABLE = [
    *((name, {}) for name in ARCHITECTURES if name not in UNPACKABLE),
    ("qwen3", {"head_dim": 8}),
    ("mistral", WINDOW),
    ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("name", "changes"), PACKABLE)
def test_questions_of_one_medium_have_the_states_of_separate_prompts(name: str, changes: dict[str, Any]) -> None:
    """Two media of three tokens, with three questions and one. No position exceeds those of the longest prompt."""
    model = build(name, {**changes, "max_position_embeddings": 8})
    medium, lengths = [5, VISUAL_TOKEN_ID], [[5, 1, 3], [2]]
    prompts = [[(medium + [6] * length, [-100] * (2 + length)) for length in row] for row in lengths]
    ids, _, questions = zip(*map(share_beginning, prompts), strict=True)
    shared = pad_sequences(ids, pad_id=0, num_visual=[2, 2], questions=questions)
    embeds = torch.randn(2, 12, 32)
    for attention in ("sdpa", "eager") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(attention)
        states = last_hidden_states(model, embeds, packed=shared["packed"])
        for row, many in enumerate(lengths):
            begin = 3
            for length in many:
                own = [*range(3), *range(begin, begin + length)]
                expected = last_hidden_states(model, embeds[row : row + 1, own])[0]
                torch.testing.assert_close(states[row, own], expected, atol=2e-6, rtol=1e-5)
                begin += length


@pytest.mark.parametrize(("name", "changes"), PACKABLE)
def test_packed_prompts_have_the_states_and_gradients_of_padded_ones(name: str, changes: dict[str, Any]) -> None:
    """The prompts have very different lengths. Positions must not exceed the length of the longest prompt."""
    lengths = [9, 1, 3, 3, 5, 1]
    model = build(name, {**changes, "max_position_embeddings": max(lengths)})
    packed = pad_sequences([[5] * length for length in lengths], pad_id=0, packing=True)["packed"]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    row = torch.randn(sum(lengths), 32)
    rows = torch.zeros(*mask.shape, 32).masked_scatter(mask.bool()[..., None], row)
    weights = torch.randn(sum(lengths), 32)

    def gradients(states: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (states * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for attention in ("sdpa", "eager") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(attention)
        expected = last_hidden_states(model, rows, mask)[mask.bool()]
        found = last_hidden_states(model, row[None], packed=packed)[0]
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        learned = gradients(expected)
        assert len(learned) > 10
        for part, gradient in gradients(found).items():
            torch.testing.assert_close(gradient, learned[part], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jamba", "jamba has other layers than attention"),
        ("falcon_mamba", "falcon_mamba has other layers than attention"),
        ("qwen3_next", "qwen3_next has other layers than attention"),
        ("falcon", "falcon computes attention by code of its own"),
        ("bloom", "bloom computes attention by code of its own"),
    ],
)
def test_architectures_that_cannot_keep_packed_prompts_apart_are_named(name: str, words: str) -> None:
    assert words in (packing_fault(AutoConfig.for_model(name)) or "")


def test_an_attention_without_packed_lengths_is_refused() -> None:
    model = build("nemotron")
    assert packing_fault(model.config) is None
    packed = pad_sequences([[5, 5], [5]], pad_id=0, packing=True)["packed"]
    with pytest.raises(
        UserError, match=r"NemotronAttention is not given the lengths .* model\.attn_implementation=eager"
    ):
        last_hidden_states(model, torch.randn(1, 3, 32), packed=packed)


def test_a_batch_without_labels_gives_a_zero_loss_with_a_graph() -> None:
    model = build("llama")
    hidden = last_hidden_states(model, torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.long))
    loss, _ = language_loss(model, hidden, torch.full((1, 5), -100), torch.empty(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()


def test_lora_starts_without_effect_and_adds_only_its_weights() -> None:
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    plain, adapted = build("llama"), build("llama", lora=lora)
    source = {name.replace(".base_layer", ""): value for name, value in adapted.state_dict().items()}
    plain.load_state_dict({name: value for name, value in source.items() if "lora_" not in name})
    ids = torch.randint(3, 64, (1, 6))
    assert torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-6)
    added = {name.split(".")[-4] for name in source if "lora_A" in name}
    assert added == {"q_proj", "v_proj"} or any("q_proj.lora_A" in name for name in source)


@pytest.mark.parametrize("name", [None, "auto", "sdpa", "eager"])
def test_an_attention_implementation_is_set(name: str | None) -> None:
    model = build_language_model(AutoConfig.for_model("llama", **SMALL))
    set_attention(model, name)
    assert model.config._attn_implementation == (name if name == "eager" else "sdpa")


@pytest.mark.parametrize(
    ("architecture", "name", "words"),
    [
        ("llama", "flash_attention_2", "but that needs a CUDA GPU, and the model is on cpu: take auto"),
        ("llama", "flex_attention", "but that needs a CUDA GPU, and the model is on cpu: take auto"),
        ("falcon_mamba", "sdpa", "has only eager: take auto|cannot have it"),
    ],
)
def test_an_unavailable_attention_implementation_is_refused(architecture: str, name: str, words: str) -> None:
    model = build_language_model(AutoConfig.for_model(architecture, **SMALL))
    with pytest.raises(UserError, match=f"model.attn_implementation is {name}.*({words})"):
        set_attention(model, name)


def test_flash_attention_needs_its_package_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_language_model(AutoConfig.for_model("llama", **SMALL))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(language_model, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(UserError, match="that has no float32: add --dtype bfloat16"):
        set_attention(model, "flash_attention_2")
    with pytest.raises(UserError, match="the package flash-attn is not installed"):
        set_attention(model.bfloat16(), "flash_attention_2")
