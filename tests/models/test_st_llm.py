"""`STLLM`: a conformance test of all registered parts, and the equalities that its shortcuts rely on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.common.errors import UserError
from stllm.common.registry import video_inputs, vision_encoders
from stllm.models import language_model as lm
from stllm.models.st_llm import STLLM, config_of
from stllm.models.video_inputs import num_visual_tokens
from stllm.processors.sequences import VISUAL_TOKEN_ID, pad_sequences, share_beginning, training_sequences
from tests.helpers.reads import DeviceReads
from tests.helpers.tiny import LLAMA, VISION, tiny_batch, tiny_config, tiny_model

CHOICES = (
    "vision_config",
    "video_input",
    "residual_bottleneck",
    "qformer_text_input",
    "has_qformer",
    "mask_rate",
    "lora",
)
TRAINING = {"use_mask": True, "mvm_decode": True}
COMBINATIONS = [
    {"encoder": encoder, "video_input": video_input, "qformer_text_input": text, **training}
    for encoder in vision_encoders.names()
    for video_input in video_inputs.names()
    for text in (True, False)
    for training in ({}, TRAINING)
] + [{"has_qformer": False, "video_input": "all", **TRAINING}]


def train_without_dropout(model: STLLM) -> STLLM:
    """Return the model in training mode with all dropout set to 0."""
    model.train()
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    return model


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_conformance(changes: dict[str, Any], tmp_path: Path) -> None:
    """Checks a finite loss, gradients for exactly the trainable parameters, and equality after saving and loading."""
    model = train_without_dropout(tiny_model(**changes))
    batch = tiny_batch(model)
    output = model(**tiny_batch(model, mask=3 if "use_mask" in changes else None))
    output.loss.backward()
    assert output.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None and "embed_tokens" not in name and "time_embed" not in name:
            assert parameter.grad.any(), f"{name} gets a gradient of zero"
    model.eval().save_pretrained(tmp_path)
    again = STLLM.from_pretrained(tmp_path).eval()
    assert {name: getattr(again.config, name) for name in CHOICES} == {
        name: getattr(model.config, name) for name in CHOICES
    }
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("encoder", ["eva_clip_g", "eva_btadapter_g"])
def test_gradient_checkpointing_changes_nothing(encoder: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(encoder=encoder, freeze_vit=False, freeze_qformer=False, **TRAINING)
        if checkpointing:
            # newer releases of transformers have renamed it
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert model.vision_encoder.gradient_checkpointing
        train_without_dropout(model)
        model(**tiny_batch(model, mask=0)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_the_shortened_teacher_pass_equals_the_full_pass() -> None:
    model = tiny_model(**TRAINING)
    whole, teacher = tiny_batch(), tiny_batch(mask=0)["teacher"]
    text = {name: whole[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    with torch.no_grad():
        frames = model.frame_tokens(model.encode_video(whole["pixel_values"]), **text)
        visual = model.video_input(frames).flatten(0, 1)
        lean = model.teacher_hidden_states(visual, **teacher)
        embeds = model.embed(whole["input_ids"], whole["visual_positions"], visual)
        hidden = lm.last_hidden_states(model.language_model, embeds, whole["attention_mask"])
    assert torch.allclose(lean.unflatten(0, (2, -1)), hidden[:, 2 : 2 + 24], atol=1e-6)


def test_the_teacher_stops_at_the_last_visual_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**TRAINING).train()
    lengths = []
    real = lm.last_hidden_states

    def spy(language_model: Any, inputs_embeds: torch.Tensor, *sequences: Any) -> torch.Tensor:
        lengths.append(inputs_embeds.shape[1])
        return real(language_model, inputs_embeds, *sequences)

    monkeypatch.setattr(lm, "last_hidden_states", spy)
    output = model(**tiny_batch(mask=0))
    assert lengths == [11 + output.kept_visual_tokens, 2 + 6 * 4]
    assert output.logits.shape == (2 * 3, 64)


def test_masking_alone_is_the_language_loss_on_the_kept_tokens() -> None:
    model = train_without_dropout(tiny_model(**TRAINING))
    batch = tiny_batch(mask=0)
    both = model(**batch)
    model.config.use_mvm = False
    alone = model(**batch)
    assert alone.loss_mvm is None and both.loss_mvm > 0
    assert alone.loss == alone.loss_lm == both.loss_lm
    assert alone.kept_visual_tokens == both.kept_visual_tokens < 6 * 4


def test_without_a_mask_all_tokens_enter() -> None:
    """The model itself draws no mask: the collator does, for training clips only."""
    model = tiny_model(**TRAINING).train()
    for num_frames in (1, 6):
        output = model(**tiny_batch(num_frames=num_frames))
        assert output.kept_visual_tokens == 4 * num_frames and output.loss_mvm is None


def test_the_loss_depends_on_which_tokens_are_dropped() -> None:
    model = tiny_model(**TRAINING).train()
    losses = [model(**tiny_batch(mask=seed)).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_text_only_batches_train_the_language_model() -> None:
    model = tiny_model().train()
    output = model(**pad_sequences([[3, 4, 5], [6, 7]], labels=[[-100, 4, 5], [-100, 7]], pad_id=0))
    assert output.kept_visual_tokens is None
    assert output.loss.isfinite()


def test_precomputed_features_equal_pixels() -> None:
    for text_input in (True, False):
        model = tiny_model(qformer_text_input=text_input)
        batch = tiny_batch(model)
        features = model.vision_features(batch["pixel_values"])
        rest = {key: value for key, value in batch.items() if key != "pixel_values"}
        assert torch.equal(model(**rest, vision_features=features).loss, model(**batch).loss)
    queries = model.qformer(features)
    assert torch.equal(model(**rest, query_features=queries).loss, model(**batch).loss)


def both_and_each(rows: list[list[int]], answers: list[int]) -> list[dict[str, Any]]:
    """Return a batch of two prompts and a batch of each, whose last ids are labelled."""
    labels = [[-100] * (len(row) - count) + row[-count:] for row, count in zip(rows, answers, strict=True)]
    media = {name: tensor for name, tensor in tiny_batch().items() if name.startswith(("pixel", "qformer"))}
    return [
        training_sequences(rows[part], labels[part], pad_id=0, num_visual=24)
        | {name: tensor[part] for name, tensor in media.items()}
        for part in (slice(0, 2), slice(0, 1), slice(1, 2))
    ]


def test_the_loss_does_not_depend_on_micro_batches() -> None:
    """Answers differ in length. The losses of the rows, each divided by all labelled tokens, add up to the batch's."""
    model = tiny_model()
    whole, *rows = both_and_each([[5, VISUAL_TOKEN_ID, 6, 7, 8], [5, VISUAL_TOKEN_ID, 9, 10, 11]], answers=[3, 1])
    divided = sum(model(**row, num_items_in_batch=4).loss for row in rows)
    torch.testing.assert_close(divided, model(**whole).loss)


def test_rows_of_a_batch_do_not_affect_each_other() -> None:
    """The rows have different texts and padding; the loss of each row is the same alone and in the batch."""
    model = tiny_model()
    whole, *rows = both_and_each([[5, VISUAL_TOKEN_ID, 6, 7, 8, 9, 10, 11], [VISUAL_TOKEN_ID, 12, 13]], answers=[3, 2])
    assert torch.allclose(model(**whole).logits, torch.cat([model(**row).logits for row in rows]), atol=1e-5)


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model = tiny_model(encoder="eva_btadapter_g", freeze_llm=True).train()
    assert not model.vision_encoder.backbone.training
    assert not model.qformer.training
    assert not model.language_model.training
    assert model.vision_encoder.adapter is not None
    assert model.vision_encoder.adapter.training
    assert model.video_input.training
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"vision_encoder", "projection"}


def test_only_lora_trains_in_the_language_model(tmp_path: Path) -> None:
    lora = {"r": 2, "alpha": 4, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    model = tiny_model(lora=lora).train()
    names = {name for name, p in model.language_model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    model(**tiny_batch(model)).loss.backward()
    model.eval().save_pretrained(tmp_path)
    again = STLLM.from_pretrained(tmp_path).eval()
    batch = tiny_batch(model)
    assert torch.equal(again(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("mask", [None, 0])
@pytest.mark.parametrize("attention", ["sdpa", "packed", "packed eager"])
@pytest.mark.parametrize("changes", COMBINATIONS[::2], ids=lambda c: "-".join(str(v) for v in c.values()))
def test_a_micro_batch_reads_nothing_from_the_device(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], attention: str, mask: int | None
) -> None:
    model = tiny_model(**{**changes, **TRAINING}).train()
    if "eager" in attention:
        model.language_model.set_attn_implementation("eager")
    batch = tiny_batch(model, mask=mask, shorter=4, packing="packed" in attention)
    with DeviceReads() as reads:
        model(**batch, num_items_in_batch=torch.tensor(6)).loss.backward()
    assert reads.found == []


LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
OTHER_MODELS = [
    {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 7},
    {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12},
    {**LLAMA, "model_type": "gpt_neox", "max_position_embeddings": 35},  # of a sample; the packed row is longer
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        *(
            ({"qformer_text_input": text, "video_input": video_input}, {"mask": 0})
            for text in (True, False)
            for video_input in ("all", "residual")
        ),
        ({}, {}),
        ({}, {"num_frames": 1}),
        ({"lora": LORA}, {"mask": 0}),
        *(({"text_config": other}, {"mask": 0}) for other in OTHER_MODELS),
    ],
)
def test_packed_samples_give_the_gradients_of_padded_ones(
    changes: dict[str, Any], sizes: dict[str, int], checkpointing: bool
) -> None:
    model = train_without_dropout(tiny_model(**{**TRAINING, **changes}))
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = []
    for packing in (False, True):
        batch = tiny_batch(model, num_clips=3, shorter=5, packing=packing, **sizes)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((output, gradients))
    (padded, expected), (packed, gradients) = found
    assert batch["input_ids"].numel() == sum(batch["packed"]["lengths"]) < 3 * max(batch["packed"]["lengths"])
    assert packed.kept_visual_tokens == padded.kept_visual_tokens
    assert (packed.loss_mvm is not None) == ("mask" in sizes)
    torch.testing.assert_close([packed.loss, packed.logits], [padded.loss, padded.logits])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("video_input", ["all", "residual"])
def test_questions_that_share_a_medium_give_the_loss_of_separate_prompts(video_input: str, mask: bool) -> None:
    """The gradients of all weights are equal, too: the MVM loss is the same, as a question comes after the video."""
    changes: dict[str, Any] = {**TRAINING, "qformer_text_input": False, "video_input": video_input}
    model = train_without_dropout(tiny_model(**changes))
    pixels = torch.rand(1, 3, 3, *[model.config.vision_config["image_size"]] * 2)
    num_visual = num_visual_tokens(config_of(model), 3)
    dropped = torch.arange(num_visual)[None] % 2 == 1 if mask else None
    texts = ([7, 8, 9], [4, 3], [6, 7, 8, 9, 3])
    prompts = [([2, 5, VISUAL_TOKEN_ID, 8, *ids], [-100] * 5 + ids[1:]) for ids in texts]  # they share the 8, too
    ids, labels, questions = share_beginning(prompts)
    options: dict[str, Any] = {"pad_id": 0, "num_visual": num_visual, "dropped": dropped}
    together = model(**training_sequences([ids], [labels], **options, questions=[questions]), pixel_values=pixels)
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apart = [
        model(**training_sequences([row], [targets], **options), pixel_values=pixels, num_items_in_batch=7)
        for row, targets in prompts
    ]
    loss = sum(one.loss_lm for one in apart)
    loss = loss if apart[0].loss_mvm is None else loss + apart[0].loss_mvm
    loss.backward()
    assert (together.loss_mvm is not None) == mask
    torch.testing.assert_close(together.loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-6, rtol=1e-4, msg=name)


def test_packed_text_gives_the_gradients_of_padded_text() -> None:
    model = tiny_model()
    rows = [[3, 4, 5], list(range(3, 43)), [6, 7]]
    labels = [[-100, *row[1:]] for row in rows]
    padded, packed = (
        model(**training_sequences(rows, labels, pad_id=0, num_visual=None, packing=packing))
        for packing in (False, True)
    )
    torch.testing.assert_close([packed.loss, packed.logits], [padded.loss, padded.logits])


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_recomputes_only_layers_with_gradients(frozen: bool) -> None:
    model = tiny_model(encoder="eva_clip_g", freeze_vit=frozen, freeze_llm=frozen).train()
    batch = tiny_batch(model, mask=0)
    parts = {
        "vision": model.vision_encoder.backbone.blocks[0].mlp,
        "language": model.language_model.model.layers[0].mlp,
    }
    calls = dict.fromkeys(parts, 0)
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    before = dict(calls)
    model.gradient_checkpointing_enable()
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)
    after = {name: calls[name] - before[name] for name in calls}
    assert after == {
        "vision": before["vision"] * (1 if frozen else 2),
        "language": before["language"] + 1,
    }  # no teacher


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_generation_equals_one_at_a_time(num_beams: int) -> None:
    model = tiny_model()
    rows, visual = [[5, VISUAL_TOKEN_ID, 6, 7, 8], [VISUAL_TOKEN_ID, 9, 10], [11, 12]], torch.randn(13, 48)
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}

    def generate(rows: list[list[int]], counts: list[int | None], visual: torch.Tensor | None) -> torch.Tensor:
        batch = pad_sequences(rows, pad_id=0, num_visual=counts, side="left")
        return model.generate(**batch, visual_tokens=visual, **options)

    both = generate(rows, [4, 9, None], visual)
    singles = [
        generate(rows[:1], [4], visual[:4]),
        generate(rows[1:2], [9], visual[4:]),
        generate(rows[2:], [None], None),
    ]
    for row, (single,) in zip(both, singles, strict=True):
        assert torch.equal(row[: len(single)], single)
        assert set(row[len(single) :].tolist()) <= {0, 2}  # padding, or with beams the end again, after an earlier end


@pytest.mark.parametrize(
    ("image_size", "has_qformer", "sentence"),
    [(30, True, "no multiple of patch_size 14"), (42, False, "has 9 patches; without a Q-Former every 4")],
)
def test_an_image_size_must_be_a_multiple_of_the_patch_size(image_size: int, has_qformer: bool, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tiny_config(has_qformer=has_qformer, vision_config={**VISION, "image_size": image_size})


def test_new_lora_weights_have_no_effect() -> None:
    model = STLLM(tiny_config(lora={"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}))
    started = {name: p.any().item() for name, p in model.named_parameters() if "lora_" in name}
    assert started == {name: "lora_A" in name for name in started}


@pytest.mark.parametrize("dropped", [None, torch.zeros(2, 23, dtype=torch.bool)])
def test_a_video_input_that_gives_another_number_of_tokens_is_an_error(dropped: torch.Tensor | None) -> None:
    model = tiny_model(video_input="all").train()
    rows = [[VISUAL_TOKEN_ID, 5], [VISUAL_TOKEN_ID, 6]]
    prompts = training_sequences(rows, [[-100, 5], [-100, 6]], pad_id=0, num_visual=23, dropped=dropped)
    message = (
        "the video input all gives 24 tokens, but the prompts have places for 23: make its num_tokens and its forward"
    )
    with pytest.raises(UserError, match=message):
        model(**tiny_batch() | prompts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            ["vision encoder | eva_clip_g", "`all`, from 4 tokens a frame", "training | none", "it reads the question"],
        ),
        ({"has_qformer": False}, ["Q-Former | none: every 4 patches"]),
        (
            {"lora": LORA, "num_frames": 8},
            ["with LoRA of rank 2", "; 8 frames of a video", "parts | LoRA, projection"],
        ),
        (TRAINING, ["0.1 to 0.7 of the visual tokens, 0.5 in the mean, with MVM"]),
    ],
    ids=["plain", "merger", "lora", "masking"],
)
def test_a_saved_model_has_a_card_that_is_kept(changes: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # saving does not change what is drawn next
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "$" not in card and f"| {model.num_parameters():,} |" in card
    assert not [words for words in said if words not in card]
    (tmp_path / "README.md").write_text("written by hand")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "written by hand"
