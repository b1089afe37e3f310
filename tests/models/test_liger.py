"""Liger's kernels in the language model: which model is patched, which loss is fused, and what is refused.

Most tests use a stand-in for the package, since Liger needs a GPU. Where Liger is installed, one test trains with the
kernels under Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.models.language_model import language_loss, last_hidden_states, use_liger
from tests.helpers.training import ROOT, losses, write_recipe
from tests.models.test_language_model import build

LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "gate_proj"]}


class FakeNorm(nn.Module):
    """An RMSNorm of another class with the same output."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, states: Tensor) -> Tensor:
        return F.rms_norm(states, self.weight.shape, self.weight, self.eps)


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PreTrainedModel, dict[str, Any]]]:
    """Replace Liger by a stand-in. Returns a list of the models to patch, with the settings."""
    calls: list[tuple[PreTrainedModel, dict[str, Any]]] = []

    def apply(model: PreTrainedModel, **settings: Any) -> None:
        calls.append((model, settings))
        if settings.get("rope") and model.config.model_type == "granite":
            raise NotImplementedError("no rope for Granite")
        decoder = model.get_decoder()
        if isinstance(decoder.norm, LlamaRMSNorm):
            decoder.norm = FakeNorm(decoder.norm)

    def fused(
        states: Tensor, weight: Tensor, targets: Tensor, *, bias: Any, reduction: str, softcap: Any, accum_dtype: Any
    ) -> Tensor:
        assert accum_dtype == torch.float32
        logits = F.linear(states, weight, bias).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, reduction=reduction)

    names = ("liger_kernel", "liger_kernel.transformers")
    modules: dict[str, Any] = {
        name: ModuleType(name) for name in (*names, *(f"{names[1]}.{last}" for last in ("functional", "monkey_patch")))
    }
    modules[names[1]]._apply_liger_kernel_to_instance = apply
    modules[f"{names[1]}.functional"].liger_fused_linear_cross_entropy = fused
    known = ("llama", "gemma2", "granite")
    modules[f"{names[1]}.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = dict.fromkeys(known, apply)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr("stllm.runners.arguments.is_liger_kernel_available", lambda: True)
    return calls


def loss_and_gradients(model: PreTrainedModel) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    torch.manual_seed(1)
    embeds = torch.randn(2, 7, 32, requires_grad=True)
    mask, labels = torch.ones(2, 7, dtype=torch.long), torch.randint(3, 64, (2, 7))
    model.zero_grad()
    hidden = last_hidden_states(model, embeds, mask)
    loss, logits = language_loss(model, hidden, labels, torch.tensor([1, 2, 8, 9, 11]), num_items=torch.tensor(9))
    loss.backward()
    trained = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    assert embeds.grad is not None
    return loss, logits, [embeds.grad, *trained]


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
@pytest.mark.parametrize(
    ("name", "fuses"), [("llama", True), ("gemma2", True), ("granite", False)], ids=lambda value: str(value)
)
def test_the_loss_is_fused_if_its_value_is_the_same(patched: list[Any], name: str, fuses: bool, lora: Any) -> None:
    model = build(name, lora=lora)
    model.resize_token_embeddings(66, mean_resizing=False)
    expected, logits, gradients = loss_and_gradients(model)
    assert logits is not None
    use_liger(model, {"swiglu": False})
    assert patched == [(model, {"swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": False})]
    loss, logits, found = loss_and_gradients(model)
    assert (logits is None) == fuses
    assert torch.allclose(loss, expected, atol=1e-6)
    assert len(found) == len(gradients) > 1
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, gradients, strict=True))


@pytest.mark.parametrize("why", ["switch", "sharded", "adapted"])
def test_the_loss_is_computed_by_torch(patched: list[Any], why: str) -> None:
    """This is so if it is configured, and if the logits are not the product with the head's weight alone."""
    model = build("llama", lora={**LORA, "target_modules": ["lm_head"]} if why == "adapted" else None)
    use_liger(model, {"fused_linear_cross_entropy": why != "switch"}, whole=why != "sharded")
    assert loss_and_gradients(model)[1] is not None
    assert not patched[0][1]["fused_linear_cross_entropy"]


def test_settings_that_liger_does_not_support_are_refused(patched: list[Any]) -> None:
    with pytest.raises(UserError, match=r"run\.use_liger_kernel is True, but Liger has no kernels for a opt language"):
        use_liger(build("opt"))
    with pytest.raises(UserError, match="cross_entropy must be False, found True"):
        use_liger(build("llama"), {"cross_entropy": True})
    with pytest.raises(UserError, match=r"Liger refuses GraniteForCausalLM .*no rope for Granite"):
        use_liger(build("granite"), {"rope": True})


def test_training_patches_the_language_model(
    patched: list[Any], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses equal those without Liger, a run without Liger can continue with it, and `STLLM` itself is not patched."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=3, save_steps=1)
    train = ["train", "--cfg-path", str(recipe), "--options"]
    liger = ["run.use_liger_kernel=true", "run.liger_kernel_config={rope: false}"]
    assert main([*train, f"run.output_dir={tmp_path / 'plain'}"]) == 0
    assert not patched
    assert main([*train, f"run.output_dir={tmp_path / 'liger'}", *liger]) == 0
    ((model, settings),) = patched
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model.get_decoder().norm, FakeNorm)
    assert settings == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert losses(tmp_path / "liger") == [pytest.approx(line, rel=1e-4) for line in losses(tmp_path / "plain")]
    (tmp_path / "plain" / "config.json").unlink()
    assert main([*train, f"run.output_dir={tmp_path / 'plain'}", *liger]) == 0
    assert len(patched) == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("model.lora_r=4",)], ids=["plain", "lora"])
def test_the_real_kernels_train_alike(toy: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Liger's norms, MLPs, rotary embedding and loss run in Triton's interpreter, which has no bfloat16."""
    pytest.importorskip("liger_kernel")
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=3, per_device_train_batch_size=2)
    for name in ("plain", "liger"):
        argv = ["train", "--cfg-path", str(recipe), "--options", f"run.output_dir={tmp_path / name}", *options]
        argv += ["run.use_liger_kernel=true"] if name == "liger" else []
        command = [sys.executable, "-m", "tests.helpers.interpreted", *argv]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
        assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "liger") == [pytest.approx(line, rel=1e-4) for line in losses(tmp_path / "plain")]
