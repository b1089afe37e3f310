"""Other checkpoints: separate weight files give the tokens of the whole model, BLIP models those of transformers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
)

from stllm.common.errors import UserError
from stllm.models.build import build_audited
from stllm.models.checkpoints.infer_config import EVA_URL, decide_config, open_model, open_sources
from stllm.models.checkpoints.load import assemble, load_model, processor_of
from stllm.models.st_llm import STLLM
from tests.models.checkpoints.conftest import FOREIGN, GOLDEN, golden_weights

HALF = 2e-2  # the encoder's file is float16
PIECES = {
    "instructblip": ("instructblip_residual_mvm", "instruct_blip_vicuna7b_trimmed.pth", None),
    "minigpt4": ("minigpt4_plain_all", "blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4.pth"),
}


def pieces_settings(family: str, vicuna: Path) -> dict[str, Any]:
    _, qformer, ckpt = PIECES[family]
    return {
        "vit_ckpt": str(FOREIGN / "eva_vit_g.pth"),
        "q_former_model": str(FOREIGN / qformer),
        "llama_model": str(vicuna),
        "ckpt": str(FOREIGN / ckpt) if ckpt else None,
        "qformer_text_input": family == "instructblip",
        "image_size": 28,
        "num_query_token": 4,
        "vision": {"num_heads": 4},
        "qformer": {"num_attention_heads": 4},
    }


def eva_file(name: str, path: Path) -> Path:
    """Write a golden folder's encoder in eva_vit_g.pth's format: keys without prefix, one more block, a classifier."""
    prefix = "model.stllm_model.visual_encoder."
    weights = {key.removeprefix(prefix): value for key, value in golden_weights(name).items() if key.startswith(prefix)}
    weights |= {key.replace("blocks.3.", "blocks.4."): value for key, value in weights.items() if "blocks.3." in key}
    torch.save({**weights, "norm.weight": torch.ones(32), "head.weight": torch.ones(16, 32)}, path)
    return path


@pytest.mark.parametrize("family", list(PIECES))
def test_separate_weight_files_give_the_golden_frame_tokens(
    family: str, vicuna: Callable[[str], Path], tmp_path: Path
) -> None:
    golden = GOLDEN / PIECES[family][0]
    settings, tolerance = pieces_settings(family, vicuna(family)), HALF
    texts = {}
    if family == "instructblip":
        questions = [
            "what moves first? the red circle or the blue square",
            "which object appears after the green triangle",
        ]
        texts = processor_of(open_model(golden)).qformer_inputs(questions)
    else:  # the published encoder file is instructblip_residual_mvm's
        settings |= {"vit_ckpt": str(eva_file(golden.name, tmp_path / "eva.pth"))}
        tolerance = 1e-4
    model, report = build_audited(settings, device="cpu", dtype="float32")
    expected = load_file(golden / "expected.safetensors")
    with torch.no_grad():
        frames = model.frame_tokens(model.encode_video(expected["video"]), **texts)
    torch.testing.assert_close(frames, expected["frame_tokens"], atol=tolerance, rtol=0)
    whole = load_model(golden, device="cpu")
    for key, tensor in whole.language_model.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[key][:512], tensor[:512]), key
    assert not report.keys("missing") and not report.keys("fresh") and not report.keys("unexpected")
    ignored = report.keys("ignored")
    assert {"head.weight", "norm.weight", "blocks.4.norm1.weight"} <= set(ignored)
    if family == "minigpt4":
        assert "t5_proj.weight" in ignored


def test_the_embedding_of_an_added_pad_token_is_the_mean(vicuna: Callable[[str], Path]) -> None:
    model, report = build_audited(pieces_settings("instructblip", vicuna("instructblip")), device="cpu")
    weights: list[Any] = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for weight in weights:
        assert weight.shape[0] == 513
        torch.testing.assert_close(weight[512], weight[:512].mean(0))
    assert sum("grows from 512 to 513 rows" in note for note in report.notes) == 2


def test_convert_takes_separate_weight_files_as_arguments(vicuna: Callable[[str], Path], tmp_path: Path) -> None:
    """Only the head counts are configured: all sizes are inferred from the files."""
    paths = [FOREIGN / "eva_vit_g.pth", FOREIGN / "instruct_blip_vicuna7b_trimmed.pth", vicuna("instructblip")]
    settings = {"vision": {"num_heads": 4}, "qformer": {"num_attention_heads": 4}}
    sources = open_sources(settings, *paths)
    config = decide_config(sources, settings)
    assert config.qformer_text_input and config.num_query_tokens == 4 and config.text_config.vocab_size == 513
    assemble(config, sources, device="cpu")


def test_a_missing_weight_file_is_named(vicuna: Callable[[str], Path]) -> None:
    settings = pieces_settings("instructblip", vicuna("instructblip"))
    for key, words in (("vit_ckpt", "model.vit_ckpt"), ("q_former_model", "model.q_former_model")):
        with pytest.raises(UserError, match=rf"missing that the configuration needs: .*{words}"):
            build_audited({**settings, key: None}, device="cpu")
    with pytest.raises(UserError, match="no language model is named"):
        build_audited({**settings, "llama_model": None}, device="cpu")


def test_the_published_encoder_is_read_from_the_cache_and_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Published YAMLs do not name the encoder; the published code has downloaded it into torch's cache."""
    torch.save({"Qformer.bert.x": torch.ones(1), "ln_vision.weight": torch.ones(1408)}, tmp_path / "qformer.pth")
    settings = {"q_former_model": str(tmp_path / "qformer.pth")}

    def download(url: str, path: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"the vision encoder's weights are not named: set model\.vit_ckpt"):
        build_audited(settings, device="cpu")
    with pytest.raises(UserError, match=r"eva_vit_g\.pth could not be downloaded \(no network\)"):
        build_audited({**settings, "vit_ckpt": EVA_URL}, device="cpu")
    (tmp_path / "cache" / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copy(FOREIGN / "eva_vit_g.pth", tmp_path / "cache" / "checkpoints")
    assert [source.path.name for source in open_sources(settings)] == ["eva_vit_g.pth", "qformer.pth"]


def test_a_projection_is_initialized_only_if_no_file_has_one(vicuna: Callable[[str], Path]) -> None:
    settings = {**pieces_settings("minigpt4", vicuna("minigpt4")), "ckpt": None}
    _, report = build_audited(settings, device="cpu")
    assert report.keys("fresh") == ["projection.weight", "projection.bias"]


def test_position_embeddings_are_interpolated(vicuna: Callable[[str], Path]) -> None:
    settings = {**pieces_settings("minigpt4", vicuna("minigpt4")), "image_size": 56}
    model, report = build_audited(settings, device="cpu")
    saved = torch.load(FOREIGN / "eva_vit_g.pth", weights_only=True)["pos_embed"].float()  # (1, 1+4, C)
    found: Any = model.vision_encoder.backbone.pos_embed
    assert found.shape == (1, 1 + 16, 32)
    assert torch.equal(found[:, 0], saved[:, 0])  # the class token is kept
    grid = saved[:, 1:].reshape(1, 2, 2, 32).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found[:, 1:], expected.flatten(2).transpose(1, 2))
    assert any("interpolated from image size 28 to 56" in note for note in report.notes)


# ---- transformers ---------------------------------------------------------------------------------------------------

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
QFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "encoder_hidden_size": 32,
}
TEXT = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 48,
    },
    "t5": {"model_type": "t5", "d_model": 48, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 12},
}


def blip_model(kind: str, text: str) -> PreTrainedModel:
    """Return a tiny BLIP model of transformers with scaled-up weights. The biases of its attention keys are zero."""
    torch.manual_seed(0)
    config_class, model_class = {
        "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
        "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
    }[kind]
    text_config = {**TEXT[text], "vocab_size": 100}
    config = config_class(vision_config=VISION, qformer_config=QFORMER, text_config=text_config, num_query_tokens=4)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name and "norm" not in name.lower():
                parameter.normal_(std=0.2)
            if name.endswith("qkv.bias"):
                parameter[32:64] = 0
    return model


def their_tokens(model: PreTrainedModel, frames: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Return projected query tokens (T, K, D), computed as in `InstructBlipForConditionalGeneration.forward`."""
    parts: Any = model.model if hasattr(model, "model") and hasattr(model.model, "vision_model") else model
    features = parts.vision_model(pixel_values=frames).last_hidden_state
    queries = parts.query_tokens.expand(len(frames), -1, -1)
    more = {}
    if ids is not None:
        mask = torch.ones(len(frames), 4 + ids.shape[1], dtype=torch.long)
        more = {"input_ids": ids.expand(len(frames), -1), "attention_mask": mask}
    out = parts.qformer(query_embeds=queries, encoder_hidden_states=features, **more).last_hidden_state[:, :4]
    return parts.language_projection(out)


@pytest.mark.parametrize(("kind", "text"), [("instructblip", "llama"), ("blip-2", "opt")])
def test_blip_models_give_the_same_query_tokens_as_in_transformers(kind: str, text: str, tmp_path: Path) -> None:
    theirs = blip_model(kind, text)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu")
    assert ours.config.vision_config["ln_eps"] == 1e-6
    assert ours.config.qformer_text_input == (kind == "instructblip")
    frames = torch.randn(3, 3, 28, 28)
    ids = torch.randint(1, 50, (1, 6)) if kind == "instructblip" else None
    texts = {} if ids is None else {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found = ours.frame_tokens(ours.encode_video(frames[None]), **texts)[0]
        torch.testing.assert_close(found, their_tokens(theirs, frames, ids), atol=1e-5, rtol=1e-4)
        tokens = torch.randint(3, 99, (1, 7))
        mine = ours.language_model(input_ids=tokens).logits[..., :100]
        language_model: Any = theirs.get_submodule("language_model")
        torch.testing.assert_close(mine, language_model(input_ids=tokens).logits)
    if kind == "instructblip":  # [PAD] was added
        assert ours.config.text_config.vocab_size == 101


def test_a_blip_with_an_encoder_decoder_needs_a_language_model(tmp_path: Path, vicuna: Callable[[str], Path]) -> None:
    theirs = blip_model("blip-2", "t5")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no language model is named"):
        load_model(tmp_path, device="cpu")
    settings = {"llama_model": str(vicuna("minigpt4")), "ckpt": str(tmp_path), "qformer_text_input": False}
    model, report = build_audited(settings, device="cpu")
    assert report.keys("fresh") == ["projection.weight", "projection.bias"]
    assert "language_projection.weight" in report.keys("ignored")
    assert isinstance(model, STLLM)
    with pytest.raises(UserError, match=r"projection\.weight"):
        load_model(tmp_path, options=["model.model_type=minigpt4_vicuna0", f"model.llama_model={vicuna('minigpt4')}"])


def test_a_key_bias_is_refused(tmp_path: Path) -> None:
    theirs = blip_model("blip-2", "opt")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("qkv.bias"):
                parameter[40] = 0.3
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no key bias"):
        load_model(tmp_path, device="cpu")
