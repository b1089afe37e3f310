"""The composition: one conformance test over everything registered, and the equalities that make it lean."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.common.errors import UserError
from stllm.common.registry import video_inputs, vision_encoders
from stllm.models import language_model as lm
from stllm.models.masking import draw_token_mask
from stllm.models.st_llm import STLLM
from tests.helpers.tiny import VISION, tiny_batch, tiny_config, tiny_model

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


def batch_for(model: STLLM, **options: Any) -> dict[str, torch.Tensor]:
    return tiny_batch(text_input=model.config.qformer_text_input, **options)


def mask_for(model: STLLM, batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    frames = batch["pixel_values"].shape[1]
    count = model.video_input.num_tokens(frames, model.config.tokens_per_frame)
    generator = torch.Generator().manual_seed(seed)
    return draw_token_mask(len(batch["input_ids"]), count, **model.config.mask_rate, generator=generator)


def train_without_dropout(model: STLLM) -> STLLM:
    """Training mode, but nothing is dropped at random."""
    model.train()
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    return model


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_conformance(changes: dict[str, Any], tmp_path: Path) -> None:
    """Finite loss, a gradient for every trainable parameter and for no other, save -> load equality."""
    model = train_without_dropout(tiny_model(**changes))
    batch = batch_for(model)
    output = model(**batch, mask_generator=torch.Generator().manual_seed(3))
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
        batch = batch_for(model)
        model(**batch, token_mask=mask_for(model, batch)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_teacher_prefix_equals_the_full_pass() -> None:
    model = tiny_model(**TRAINING)
    batch = batch_for(model)
    with torch.no_grad():
        encoded = model.encode_video(batch["pixel_values"])
        frames = model.frame_tokens(encoded, batch["qformer_input_ids"], batch["qformer_attention_mask"])
        visual = model.video_input(frames)
        lean = model.teacher_hidden_states(visual, batch["input_ids"], batch["attention_mask"])
        full = model.join(list(visual), batch["input_ids"], batch["attention_mask"])
        hidden = lm.last_hidden_states(model.language_model, full.inputs_embeds, full.attention_mask)
    assert torch.allclose(lean, hidden[:, 2 : 2 + visual.shape[1]], atol=1e-6)


def test_the_teacher_stops_at_the_last_visual_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**TRAINING).train()
    batch = batch_for(model)
    lengths = []
    real = lm.last_hidden_states

    def spy(language_model: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        lengths.append(inputs_embeds.shape[1])
        return real(language_model, inputs_embeds, attention_mask)

    monkeypatch.setattr(lm, "last_hidden_states", spy)
    output = model(**batch)
    assert lengths == [11 + output.kept_visual_tokens, 2 + 6 * 4]
    assert output.logits.shape == (2 * 3, 64)


def test_masking_alone_is_the_language_loss_on_the_kept_tokens() -> None:
    model = train_without_dropout(tiny_model(**TRAINING))
    batch = batch_for(model)
    mask = mask_for(model, batch)
    both = model(**batch, token_mask=mask)
    model.config.use_mvm = False
    alone = model(**batch, token_mask=mask)
    assert alone.loss_mvm is None and both.loss_mvm > 0
    assert alone.loss == alone.loss_lm == both.loss_lm
    assert alone.kept_visual_tokens == both.kept_visual_tokens < 6 * 4


def test_an_image_is_never_masked() -> None:
    model = tiny_model(**TRAINING).train()
    output = model(**batch_for(model, num_frames=1))
    assert output.kept_visual_tokens == 4
    assert output.loss_mvm is None


def test_evaluation_is_never_masked() -> None:
    model = tiny_model(**TRAINING)
    assert model(**batch_for(model)).kept_visual_tokens == 6 * 4


def test_the_mask_follows_its_generator() -> None:
    model = tiny_model(**TRAINING).train()
    losses = [
        model(**batch_for(model), mask_generator=torch.Generator().manual_seed(seed)).loss.item() for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_text_alone_trains_the_language_model() -> None:
    model = tiny_model().train()
    batch = batch_for(model)
    text = {key: batch[key][:, 3:] for key in ("input_ids", "attention_mask", "labels")}
    output = model(**text)
    assert output.kept_visual_tokens is None
    assert output.loss.isfinite()


def test_precomputed_features_equal_pixels() -> None:
    for text_input in (True, False):
        model = tiny_model(qformer_text_input=text_input)
        batch = batch_for(model)
        features = model.vision_features(batch["pixel_values"])
        rest = {key: value for key, value in batch.items() if key != "pixel_values"}
        assert torch.equal(model(**rest, vision_features=features).loss, model(**batch).loss)
    queries = model.qformer(features)
    assert torch.equal(model(**rest, query_features=queries).loss, model(**batch).loss)


def test_the_loss_does_not_depend_on_how_a_step_is_divided() -> None:
    """Answers of different lengths: the rows' losses, each over all labelled tokens, add up to the batch's."""
    model = tiny_model()
    batch = batch_for(model)
    batch["labels"][1, :-1] = -100
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in (0, 1)]
    divided = sum(model(**row, num_items_in_batch=4).loss for row in rows)
    torch.testing.assert_close(divided, model(**batch).loss)


def test_a_batch_is_its_rows() -> None:
    """Right padding, different texts, one loss a row: nothing leaks between samples."""
    model = tiny_model()
    batch = batch_for(model)
    batch["attention_mask"][1, 10:] = 0
    batch["labels"][1] = -100
    batch["labels"][1, 7:10] = batch["input_ids"][1, 7:10]
    both = model(**batch).logits
    rows = [model(**{key: value[i : i + 1] for key, value in batch.items()}).logits for i in (0, 1)]
    assert torch.allclose(both, torch.cat(rows), atol=1e-5)


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


def test_lora_trains_alone_in_the_language_model(tmp_path: Path) -> None:
    lora = {"r": 2, "alpha": 4, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    model = tiny_model(lora=lora).train()
    names = {name for name, p in model.language_model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    model(**batch_for(model)).loss.backward()
    model.eval().save_pretrained(tmp_path)
    again = STLLM.from_pretrained(tmp_path).eval()
    batch = batch_for(model)
    assert torch.equal(again(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_generation_equals_one_at_a_time(num_beams: int) -> None:
    model = tiny_model()
    ids = torch.tensor([[5, -200, 6, 7, 8], [0, 0, -200, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    visual = [torch.randn(4, 48), torch.randn(9, 48)]
    options = {"max_new_tokens": 8, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}
    both = model.generate(input_ids=ids, attention_mask=mask, visual_tokens=visual, **options)
    first = model.generate(input_ids=ids[:1], attention_mask=mask[:1], visual_tokens=visual[:1], **options)
    second = model.generate(input_ids=ids[1:, 2:], attention_mask=mask[1:, 2:], visual_tokens=visual[1:], **options)
    for row, single in zip(both, (first[0], second[0]), strict=True):
        assert torch.equal(row[: len(single)], single)
        assert not row[len(single) :].any()  # padding after an answer that ended earlier


@pytest.mark.parametrize(
    ("image_size", "has_qformer", "sentence"),
    [(30, True, "no multiple of patch_size 14"), (42, False, "has 9 patches; without a Q-Former every 4")],
)
def test_images_divide_into_patches(image_size: int, has_qformer: bool, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tiny_config(has_qformer=has_qformer, vision_config={**VISION, "image_size": image_size})


def test_a_fresh_lora_changes_nothing_yet() -> None:
    model = STLLM(tiny_config(lora={"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}))
    started = {name: p.any().item() for name, p in model.named_parameters() if "lora_" in name}
    assert started == {name: "lora_A" in name for name in started}


def test_a_mask_of_another_length_is_an_error() -> None:
    model = tiny_model(video_input="all").train()
    message = "the video input all gives 24 tokens, but the token mask has 23: make its num_tokens and its forward"
    with pytest.raises(UserError, match=message):
        model(**tiny_batch(), token_mask=torch.zeros(2, 23, dtype=torch.bool))
