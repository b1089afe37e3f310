"""`stllm convert`: both formats, merging LoRA, complete targets only, and errors."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.models.build import build_audited
from stllm.models.checkpoints import convert as convert_module
from stllm.models.checkpoints.convert import convert, released_state, save_released
from stllm.models.checkpoints.infer_config import open_model
from stllm.models.checkpoints.load import load_model, load_pretrained, processor_of
from stllm.models.lora import inject_lora
from tests.helpers.tiny import tiny_model
from tests.models.checkpoints.conftest import FOLDERS, FOREIGN, GOLDEN, HEADS, change_json, golden_weights

NAME = "instructblip_residual_mvm"


@pytest.mark.parametrize("name", FOLDERS)
def test_ours_to_released_gives_the_published_keys_and_values(name: str) -> None:
    state = released_state(load_model(GOLDEN / name, device="cpu"))
    published = golden_weights(name)
    computed = {key for key in published if "inv_freq" in key or "position_ids" in key or "residual_index" in key}
    assert set(state) == set(published) - computed
    for key, tensor in state.items():
        assert torch.equal(tensor, published[key]), key


def test_released_shards_have_an_index_and_load_without_a_configuration(tmp_path: Path) -> None:
    model, processor = load_pretrained(GOLDEN / NAME, device="cpu")
    save_released(model, tmp_path, shard_bytes=300_000)
    processor.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert len(files) > 2 and files[0] == f"pytorch_model-00001-of-{len(files):05d}.bin"
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"]["model.stllm_model.embed_tokens.weight"]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "st_llm_hf"
    again = load_model(tmp_path, device="cpu")
    assert again.config.to_dict() == model.config.to_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_the_prompts_are_the_same_after_conversion(tmp_path: Path) -> None:
    convert([GOLDEN / NAME], tmp_path / "ours")
    convert([tmp_path / "ours"], tmp_path / "released", format="released")
    from stllm.processors.templates import Turn

    ids = [
        processor_of(open_model(place)).prompt_ids([Turn("what moves first?", "the red circle"), Turn("and then?")])
        for place in (GOLDEN / NAME, tmp_path / "ours", tmp_path / "released")
    ]
    assert ids[0] == ids[1] == ids[2]
    for place in ("ours", "released"):
        assert (tmp_path / place / "tokenizer.model").is_file()
        assert (tmp_path / place / "qformer_tokenizer").is_dir()


def test_separate_weight_files_become_one_checkpoint(
    vicuna: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [FOREIGN / "eva_vit_g.pth", FOREIGN / "instruct_blip_vicuna7b_trimmed.pth", vicuna("instructblip")]
    bert = FOREIGN / "bert" / "vocab.txt"
    arguments = [*pieces, "--to", tmp_path / "ours", "--options", *HEADS, f"model.qformer_tokenizer={bert}"]
    assert main(["convert", *(str(argument) for argument in arguments)]) == 0
    out = capsys.readouterr().out
    assert "grows from 512 to 513 rows" in out and "head.weight" in out
    model, processor = load_pretrained(tmp_path / "ours", device="cpu")
    assert processor.vocab_size == model.config.text_config.vocab_size == 513


def test_the_configuration_may_name_the_separate_weight_files(vicuna: Callable[[str], Path], tmp_path: Path) -> None:
    cfg = tmp_path / "model.yaml"
    cfg.write_text(f"""
model:
  model_type: minigpt4_vicuna0
  image_size: 28
  vision: {{num_heads: 4}}
  qformer: {{num_attention_heads: 4}}
  num_query_token: 4
  vit_ckpt: {FOREIGN / "eva_vit_g.pth"}
  q_former_model: {FOREIGN / "blip2_pretrained_flant5xxl.pth"}
  llama_model: {vicuna("minigpt4")}
""")
    convert([FOREIGN / "pretrained_minigpt4.pth"], tmp_path / "ours", cfg_path=cfg)
    assert load_model(tmp_path / "ours", device="cpu").config.template == "minigpt4"


def test_lora_is_merged_into_the_released_layout() -> None:
    settings = {"ckpt": str(GOLDEN / "minigpt4_plain_all"), "image_size": 28, "lora_r": 2, "qformer_text_input": False}
    model, _ = build_audited(settings, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    layer: Any = model.get_submodule("language_model.model.layers.0.self_attn.q_proj")
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    key = "model.layers.0.self_attn.q_proj.weight"
    expected = golden_weights("minigpt4_plain_all")[key] + update.detach()
    state = released_state(model)
    torch.testing.assert_close(state[key], expected)
    assert not any("lora" in name or "base_layer" in name for name in state)


def test_the_released_format_refuses_other_models_than_llama(tmp_path: Path) -> None:
    opt = {"model_type": "opt", "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(UserError, match="LLaMA models only, but this one's is opt"):
        save_released(tiny_model(text_config={**opt, "ffn_dim": 64, "word_embed_proj_dim": 48}), tmp_path)


def test_a_target_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "ours"
    target.mkdir()
    convert([GOLDEN / NAME], target)  # an empty folder is accepted
    before = sorted(path.name for path in target.iterdir())
    with pytest.raises(UserError, match="holds files already, expected a new or an empty folder"):
        convert([GOLDEN / NAME], target, format="released")
    assert sorted(path.name for path in target.iterdir()) == before
    with pytest.raises(UserError, match="is a file already"):
        convert([GOLDEN / NAME], target / "config.json")


def test_repeating_a_finished_conversion_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This is the situation after a kill between the last rename and the end of the process."""
    shutil.copytree(GOLDEN / NAME, tmp_path / "source")
    shutil.copytree(FOREIGN / "bert", tmp_path / "foreign" / "bert")
    target = tmp_path / "source" / "ours"
    words = ["convert", str(tmp_path / "source"), "--to", str(target)]
    assert main(words) == 0
    written = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    capsys.readouterr()
    assert main(words) == 0
    assert "holds the result of this command already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == written
    for more in (["--dtype", "float16"], ["--format", "released"], ["--options", "model.video_input=mean"]):
        assert main([*words, *more]) == 1
    capsys.readouterr()
    weights = target / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size - 1)
    assert main(words) == 1
    assert "holds files already" in capsys.readouterr().err
    shutil.rmtree(target)
    assert main(words) == 0
    change_json(tmp_path / "source" / "config.json", lambda config: config.update(more="another source"))
    assert main(words) == 1
    (target / convert_module.RECORD).write_text("[]")
    assert main(words) == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object, folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"0" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert_module, "save_released", fail)
    with pytest.raises(UserError, match=r"no space left on the disk .*nothing was written"):
        convert([GOLDEN / NAME], tmp_path / "new", format="released")
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = convert_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"GiB are needed, 0\.00 GiB are free"):
        convert([GOLDEN / NAME], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_saving_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object, folder: Path) -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(convert_module, "save_released", fail)
    with pytest.raises(RuntimeError, match="of another kind"):
        convert([GOLDEN / NAME], tmp_path / "new", format="released")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_language_model_loads_in_transformers_and_gives_the_same_answers(tmp_path: Path) -> None:
    model, processor = load_pretrained(GOLDEN / NAME, device="cpu")
    model.config.lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    inject_lora(model.language_model, model.config.lora)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), "--to", str(tmp_path / "lm"), "--format", "language-model"]) == 0

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm", local_files_only=True)
    assert len(tokenizer) == plain.config.vocab_size == processor.vocab_size
    embeds = model.get_input_embeddings()(torch.tensor([processor.tokenizer.encode("a red circle moves")]))
    expected = model.language_model(inputs_embeds=embeds).logits
    torch.testing.assert_close(plain(inputs_embeds=embeds).logits, expected, rtol=1e-5, atol=1e-5)
