"""Precomputed features: they equal the model's, and have a digest of the weights that they depend on."""

import pytest
import torch
from torch import nn

from stllm.common.registry import vision_encoders
from stllm.models import precomputed
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model


@pytest.mark.parametrize("stage", ["vit", "qformer"])
def test_stored_features_equal_the_models(stage: str) -> None:
    model = tiny_model(qformer_text_input=False)
    pixels = tiny_batch(num_clips=2, num_frames=3)["pixel_values"]
    features = precomputed.encode(model, pixels, stage)
    expected = model.vision_features(pixels)
    expected = expected if stage == "vit" else model.qformer(expected)
    torch.testing.assert_close(features, expected, atol=0, rtol=0)
    assert features.shape[1:] == precomputed.shape(tiny_config(qformer_text_input=False), stage, 3)


def changed(model: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] += 1
    return model


def test_the_digest_changes_only_with_what_the_stage_depends_on() -> None:
    digests = {stage: precomputed.weights_digest(tiny_model(), stage) for stage in ("vit", "qformer")}
    assert len({*digests.values()}) == 2
    assert precomputed.weights_digest(tiny_model().bfloat16(), "vit") == digests["vit"]
    cases = {
        "vision_encoder.backbone.blocks.0.mlp.fc1.weight": {"vit", "qformer"},
        "vision_encoder.ln_vision.bias": {"vit", "qformer"},
        "qformer.query_tokens": {"qformer"},
        "projection.weight": set(),
    }
    for name, stages in cases.items():
        model = tiny_model()
        changed(model, name)
        found = {stage for stage in digests if precomputed.weights_digest(model, stage) != digests[stage]}
        assert found == stages, name
    others = tiny_model(vision_config={**tiny_config().vision_config, "ln_eps": 1e-6})
    assert precomputed.weights_digest(others, "vit") != digests["vit"]


def test_a_registered_encoder_has_its_own_digest_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder with an adapter is refused. An encoder that computes something else has another digest."""
    entries = vision_encoders._entries
    with_adapter, plain = vision_encoders.get("eva_btadapter_g"), vision_encoders.get("eva_clip_g")
    monkeypatch.setattr(vision_encoders, "_entries", {**entries, "mine": with_adapter, "other": plain})
    assert "model.vit_model: mine" in str(precomputed.fault(tiny_config(encoder="mine"), "vit"))
    assert precomputed.fault(tiny_config(encoder="other"), "vit") is None
    model = tiny_model()
    digest = precomputed.weights_digest(model, "vit")
    model.config.vision_config["encoder"] = "other"
    assert precomputed.weights_digest(model, "vit") != digest
