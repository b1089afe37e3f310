"""Checkpoints and configurations that contradict each other: each case gives its own sentence and exit code 1."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.models.build import build_audited
from stllm.models.checkpoints.load import load_model, load_pretrained
from tests.models.checkpoints.conftest import FOREIGN, GOLDEN, change_json, change_weights

Copy = Callable[[str], Path]
CONVERSATION, QA, PLAIN = "instructblip_residual_mvm", "instructblip_bta_mean", "minigpt4_plain_all"


def refuses(words: str, path: Path, *options: str, cfg: Path | None = None) -> None:
    with pytest.raises(UserError, match=words):
        load_pretrained(path, cfg, options=options, device="cpu")


def test_a_missing_key_is_named(golden_copy: Copy) -> None:
    folder = golden_copy(CONVERSATION)
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refuses(
        r"1 weight is missing that the configuration needs: language_model\.model\.layers\.1\.mlp\.up_proj\.weight;",
        folder,
    )


def test_a_missing_part_is_named(golden_copy: Copy) -> None:
    folder = golden_copy(PLAIN)
    change_weights(folder, lambda weights: [weights.pop(key) for key in list(weights) if "llama_proj" in key])
    refuses(r"2 weights are missing .*projection\.weight, projection\.bias; .*model\.ckpt", folder)


def test_a_wrong_shape_is_named(golden_copy: Copy) -> None:
    folder = golden_copy(PLAIN)
    key = "model.stllm_model.ln_vision.bias"
    change_weights(folder, lambda weights: weights.update({key: torch.zeros(33)}))
    refuses(r"1 weight is of another size .*ln_vision\.bias: found \(33,\), expected \(32,\)", folder)


def test_7b_weights_with_a_13b_config_json_are_refused(golden_copy: Copy) -> None:
    folder = golden_copy(PLAIN)
    change_json(folder / "config.json", lambda config: config.update(hidden_size=5120))
    refuses(r"hidden size 48 by the weights in .*, but 5120 \(13B\) by .*config\.json: use weights", folder)


def test_7b_weights_with_a_13b_language_model_are_refused(
    vicuna: Callable[[str], Path], tmp_path: Path, golden_copy: Copy
) -> None:
    other = tmp_path / "vicuna-13b"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama", "hidden_size": 5120}')
    refuses(r"hidden size 48 by .*5120 \(13B\) by model\.llama_model", GOLDEN / PLAIN, f"model.llama_model={other}")
    refuses(r"hidden size 48 by .*4096 \(7B\) by model\.llm", GOLDEN / PLAIN, "model.llm.hidden_size=4096")
    change_json(other / "config.json", lambda config: config.update(hidden_size=64, vocab_size=512))
    torch.save({"model.embed_tokens.weight": torch.zeros(512, 64)}, other / "pytorch_model.bin")
    torch.save(
        {"model": {"llama_proj.weight": torch.zeros(48, 32), "llama_proj.bias": torch.zeros(48)}}, tmp_path / "p.pth"
    )
    settings = {"llama_model": str(vicuna("minigpt4")), "ckpt": str(tmp_path / "wide.pth"), "qformer_text_input": False}
    torch.save({"llama_proj.weight": torch.zeros(64, 32), "llama_proj.bias": torch.zeros(64)}, tmp_path / "wide.pth")
    settings |= {
        "q_former_model": str(FOREIGN / "blip2_pretrained_flant5xxl.pth"),
        "qformer": {"num_attention_heads": 4},
    }
    with pytest.raises(UserError, match=r"hidden size 48 by .*64 by the projection in .*wide\.pth"):
        build_audited({**settings, "vision": {"num_heads": 4}}, device="cpu")


@pytest.mark.parametrize("key", ["num_hidden_layers", "intermediate_size"])
def test_a_whole_checkpoint_with_a_language_model_of_another_size_is_refused(key: str, tmp_path: Path) -> None:
    """The width is the same, because another test compares it."""
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 96}
    config = {"model_type": "llama", **sizes, key: 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"model.embed_tokens.weight": torch.zeros(512, 48)}, tmp_path / "pytorch_model.bin")
    words = rf"llama_model \({tmp_path}\) has {key} 1, but the whole checkpoint .*{PLAIN} \d+, .*llama_model=null"
    refuses(words, GOLDEN / PLAIN, f"model.llama_model={tmp_path}")
    with pytest.raises(UserError, match=words):
        build_audited({"llama_model": str(tmp_path), "ckpt": str(GOLDEN / PLAIN)}, device="cpu")


def test_a_note_says_that_the_checkpoint_s_language_model_is_used(vicuna: Callable[[str], Path]) -> None:
    language = vicuna("minigpt4")
    note = f"the language model's weights are those of {GOLDEN / PLAIN}: none is from {language}"
    _, report = build_audited({"llama_model": str(language), "ckpt": str(GOLDEN / PLAIN)}, device="cpu")
    assert report.notes == [note]
    _, report = build_audited({"ckpt": str(GOLDEN / PLAIN)}, device="cpu")
    assert report.notes == []


@pytest.mark.parametrize(
    ("layers", "words"), [(2, r"layers\.2: found, but .* fewer layers"), (4, r"missing .*layers\.3\.")]
)
def test_another_number_of_layers_in_config_json_is_refused(golden_copy: Copy, layers: int, words: str) -> None:
    folder = golden_copy(PLAIN)
    change_json(folder / "config.json", lambda config: config.update(num_hidden_layers=layers))
    refuses(words, folder)


def test_an_instructblip_checkpoint_without_pad_is_refused(golden_copy: Copy) -> None:
    folder = golden_copy(CONVERSATION)

    def cut(weights: dict[str, torch.Tensor]) -> None:
        for key in ("model.embed_tokens.weight", "lm_head.weight", "model.stllm_model.embed_tokens.weight"):
            weights[key] = weights[key][:512].clone()

    change_weights(folder, cut)
    words = r"vocabulary of 512 tokens .*MiniGPT-4 family.* of the InstructBLIP family, expect 513 \(with the added"
    refuses(words, folder)
    change_json(folder / "config.json", lambda config: config.update(vocab_size=512))
    refuses(words, folder)  # config.json agrees with the weights; the tokenizer does not


def test_a_minigpt4_checkpoint_with_pad_is_refused(golden_copy: Copy) -> None:
    folder = golden_copy(PLAIN)

    def grow(weights: dict[str, torch.Tensor]) -> None:
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[key] = torch.cat([weights[key], weights[key][:1]])

    change_weights(folder, grow)
    words = r"vocabulary of 513 tokens .*InstructBLIP family.* of the MiniGPT-4 family, expect 512 \(without"
    refuses(words, folder)
    change_json(folder / "config.json", lambda config: config.update(vocab_size=513))
    refuses(words, folder)


def test_the_vocabulary_of_config_json_is_compared(golden_copy: Copy) -> None:
    folder = golden_copy(PLAIN)
    change_json(folder / "config.json", lambda config: config.update(vocab_size=32000))
    refuses("vocabulary of 512 tokens, but .*expect 32000", folder)


def test_a_qa_checkpoint_with_a_conversation_configuration_is_refused(tmp_path: Path) -> None:
    cfg = tmp_path / "conversation.yaml"
    cfg.write_text("model: {model_type: instructblip_vicuna0, vit_model: eva_clip_g}")
    refuses(r"is a QA checkpoint .*eva_clip_g.*: set model\.vit_model=eva_btadapter_g", GOLDEN / QA, cfg=cfg)


def test_a_conversation_checkpoint_with_a_qa_configuration_is_refused(tmp_path: Path) -> None:
    cfg = tmp_path / "qa.yaml"
    cfg.write_text("model: {model_type: instructblip_vicuna0_btadapter}")
    refuses(r"is a conversation checkpoint .*set model\.vit_model=eva_clip_g", GOLDEN / CONVERSATION, cfg=cfg)


@pytest.mark.parametrize(
    ("name", "text", "family"), [(CONVERSATION, False, "InstructBLIP"), (PLAIN, True, "MiniGPT-4")]
)
def test_weights_of_the_other_family_are_refused(name: str, text: bool, family: str) -> None:
    option = f"model.qformer_text_input={text}"
    refuses(rf"is of the {family} family .*set model\.qformer_text_input={not text}", GOLDEN / name, option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model.vision.depth=3", "model.vision.depth is 3 in the configuration, but 4 in the weights"),
        ("model.num_query_token=32", "model.num_query_token is 32 in the configuration, but 4 in the weights"),
        (
            "model.qformer.hidden_size=768",
            "model.qformer.hidden_size is 768 in the configuration, but 32 in the weights",
        ),
        ("model.has_qformer=False", "model.has_qformer is False in the configuration, but True in the weights"),
        ("model.vision.num_heads=5", "model.vision.num_heads is 5, which does not divide the width 32"),
        ("model.video_input=residual", r"weights are missing .*video_input\.down_proj.*\(model\.video_input=all\)"),
        ("model.mvm_decode=True", r"weights are missing .*mvm_decoder\.head.*\(model\.mvm_decode=False\)"),
        ("model.visoin.depth=3", "unknown key 'model.visoin'; did you mean 'vision'"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(option: str, words: str) -> None:
    refuses(words, GOLDEN / PLAIN, option)


def test_a_missing_tokenizer_is_reported(golden_copy: Copy) -> None:
    folder = golden_copy(PLAIN)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    load_model(folder, device="cpu")  # loading only the model needs no tokenizer
    refuses("has no tokenizer: name the language model's folder with model.llama_model", folder)


def test_a_missing_language_model_configuration_is_reported(golden_copy: Copy) -> None:
    folder = golden_copy(PLAIN)
    (folder / "config.json").unlink()
    refuses("no language model is named", folder)
    assert (
        load_model(folder, options=[f"model.llm.{key}" for key in LLM], device="cpu").config.text_config.vocab_size
        == 512
    )


LLM = (
    "model_type=llama",
    "hidden_size=48",
    "intermediate_size=96",
    "num_hidden_layers=3",
    "num_attention_heads=4",
    "vocab_size=512",
)


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_the_commands_print_the_error_as_one_sentence(
    command: str, golden_copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden_copy(PLAIN)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    arguments: dict[str, list[Any]] = {
        "inspect": ["inspect", folder],
        "convert": ["convert", folder, "--to", tmp_path / "new"],
    }
    assert main([str(argument) for argument in arguments[command]]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "shard 1 of 2, pytorch_model-00001-of-00002.bin, is missing" in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "new").exists()
