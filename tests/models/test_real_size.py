"""EVA-ViT-g and the Q-Former at their published sizes run on this machine (`pytest -m slow`)."""

import pytest
import torch

from stllm.models.st_llm import STLLM
from tests.helpers.tiny import LLAMA, tiny_config


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["eva_clip_g", "eva_btadapter_g"])
def test_vit_g_and_qformer_run_on_four_frames(encoder: str) -> None:
    """They have about 1.2 billion parameters in bfloat16, need 2.5 GB, and take less than a minute on two cores."""
    config = tiny_config(vision_config={"encoder": encoder}, qformer_config={}, num_query_tokens=32, text_config=LLAMA)
    with torch.device("meta"):
        model = STLLM(config)
    model.bfloat16()
    model.to_empty(device="cpu")
    model.initialize_weights()
    text = {"qformer_input_ids": torch.randint(1, 30000, (1, 12)), "qformer_attention_mask": torch.ones(1, 12).long()}
    with torch.inference_mode():
        encoded = model.eval().encode_video(torch.randn(1, 4, 3, 224, 224))
        tokens = model.frame_tokens(encoded, **text)
    assert encoded.shape == (1, 4, 257, 1408)
    assert tokens.shape == (1, 4, 32, 48)
    assert tokens.isfinite().all()
    width, hidden = 1408, 6144
    block = 4 * width**2 + 2 * width * hidden + 8 * width + hidden  # q and v have biases, k has none
    stem = (3 * 14 * 14 + 1) * width + (1 + 257) * width  # patches, class token, positions
    assert sum(p.numel() for p in model.vision_encoder.backbone.parameters()) == 39 * block + stem
