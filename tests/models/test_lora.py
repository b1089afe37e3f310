"""LoRA: a saved adapter restores the trained model, and merging it does not change the output."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from stllm.common.errors import UserError
from stllm.models.lora import load_adapter, merge_lora, save_adapter
from stllm.models.st_llm import STLLM
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model
from tests.models.test_language_model import ARCHITECTURES

LORA = {"r": 2, "alpha": 4, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}


def trained(**changes) -> STLLM:
    """Return a model with LoRA whose adapter and projection are changed, as after training."""
    model = tiny_model(lora=LORA, video_input="residual", **changes).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**tiny_batch(model)).loss.backward()
    optimizer.step()
    return model.eval()


def loss(model: STLLM) -> float:
    with torch.no_grad():
        return float(model(**tiny_batch(model, seed=5)).loss)


def test_a_saved_adapter_loads_and_merges_with_equal_output(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    again = tiny_model(lora=None, video_input="residual")
    again.load_state_dict(
        {name.replace(".base_layer", ""): p for name, p in model.state_dict().items() if "lora_" not in name}
    )
    for part in (again.projection, again.video_input):  # these come from the adapter's folder
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    assert abs(loss(again) - loss(model)) > 1e-4
    load_adapter(again, tmp_path)
    assert loss(again.eval()) == loss(model)
    merge_lora(again)
    assert loss(again) == pytest.approx(loss(model), abs=1e-5)
    assert not any("lora" in name or "base_layer" in name for name in again.state_dict())
    assert again.config.lora is None
    again.save_pretrained(tmp_path / "merged")
    assert loss(STLLM.from_pretrained(tmp_path / "merged").eval()) == loss(again)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("gpt_neox", ["query_key_value"]),
        ("qwen3_moe", ["q_proj", "v_proj"]),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),  # of the experts, which peft wraps as parameters
    ],
)
@pytest.mark.filterwarnings("ignore:The following .* did not match")  # of peft, for the experts
def test_peft_loads_the_whole_adapter(name: str, modules: list[str], tmp_path: Path) -> None:
    text = {"model_type": name, **ARCHITECTURES[name]}
    model = tiny_model(text_config=text, lora={**LORA, "dropout": 0.0, "target_modules": modules}, has_qformer=False)
    save_adapter(model, tmp_path, base_model="a/name")
    weights = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    plain = tiny_model(seed=1, text_config=text, has_qformer=False)
    plain.load_state_dict({key.replace(".base_layer", ""): value for key, value in weights.items()})
    wrapped: Any = PeftModel.from_pretrained(plain.language_model, tmp_path)
    found = wrapped.load_adapter(tmp_path, adapter_name="again")
    assert not found.unexpected_keys and not [key for key in found.missing_keys if ".again." in key]
    saved = LoraConfig.from_pretrained(str(tmp_path))
    assert (saved.task_type, saved.base_model_name_or_path) == ("CAUSAL_LM", "a/name")
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        expected = model.language_model(input_ids=ids).logits
        assert torch.equal(wrapped.eval()(input_ids=ids).logits, expected)
        merge_lora(model)
        assert torch.allclose(model.language_model(input_ids=ids).logits, expected, atol=1e-5)
    assert not any("lora" in key or "base_layer" in key for key in model.state_dict())


def test_folders_of_old_versions_without_pefts_prefix_are_read(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}, path)
    again = tiny_model(lora=LORA, video_input="residual")
    load_adapter(again, tmp_path)
    assert loss(again) == loss(model)


def test_an_incomplete_adapter_is_refused(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "layers.1.self_attn.q_proj" not in key}, path)
    with pytest.raises(UserError, match=r"not hold the whole adapter: missing are .*layers\.1\.self_attn\.q_proj"):
        load_adapter(model, tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no LoRA adapter of a run: it lacks adapter_model\.safetensors"):
        load_adapter(tiny_model(), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    with pytest.raises(UserError, match="was trained on a model of other sizes"):
        load_adapter(
            tiny_model(
                text_config={
                    "model_type": "llama",
                    "vocab_size": 64,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                },
                video_input="residual",
            ),
            tmp_path,
        )
    with pytest.raises(UserError, match=r"this one has no video_input\."):
        load_adapter(tiny_model(video_input="all"), tmp_path)


def test_lora_on_missing_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"names query, but the language model's linear layers are .*q_proj"):
        STLLM(tiny_config(lora={**LORA, "target_modules": ["query"]}))
    experts = {"model_type": "qwen3_moe", **ARCHITECTURES["qwen3_moe"]}
    with pytest.raises(UserError, match=r"can't adapt gate_proj, up_proj .*dropout"):
        STLLM(tiny_config(text_config=experts, lora={**LORA, "target_modules": ["gate_proj", "up_proj"]}))
