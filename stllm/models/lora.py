"""LoRA on the language model, with peft: injecting, saving, loading and merging an adapter.

An adapter folder holds peft's two files, which `PeftModel.from_pretrained(language_model, folder)` can load, and
`trained.safetensors` with the other parts that were trained (the projection, the video input, ...). Source: LoRA (arXiv
2106.09685), `peft`.
"""

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from stllm.common.errors import UserError
from stllm.common.files import check_regular

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's name
OTHER_WEIGHTS = "trained.safetensors"
PEFT_PREFIX = "base_model.model."  # the language model's place inside a `PeftModel`; folders of old versions lack it
LORA = "lora_"


def inject_lora(model: PreTrainedModel, lora: dict[str, Any]) -> PreTrainedModel:
    """Add LoRA to a model's layers, in place. lora: {r, alpha, dropout, target_modules}.

    Raises UserError if the model has no layers of these names, or if peft refuses the settings.
    """
    try:
        adapted: Any = inject_adapter_in_model(lora_config(lora), model)
    except ValueError as error:
        targets = ", ".join(lora["target_modules"])
        if "not found" not in str(error):
            raise UserError(
                f"peft can't adapt {targets} (model.lora_target_modules) with these settings: {error}"
            ) from error
        names = {name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "in_features")}
        raise UserError(
            f"model.lora_target_modules names {targets}, but the language model's linear layers are "
            f"{', '.join(sorted(names))}: name some of these"
        ) from error
    for name, parameter in adapted.named_parameters():
        if LORA in name:  # peft has initialized it; transformers must not do so again
            parameter._is_hf_initialized = True
    return cast(PreTrainedModel, adapted)


def lora_config(lora: dict[str, Any], base_model: str | None = None) -> LoraConfig:
    """Return peft's LoraConfig for `STLLMConfig.lora`. base_model: the language model's folder or hub name."""
    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=list(lora["target_modules"]),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
    )


def save_adapter(model: Any, folder: str | Path, *, base_model: str | None = None) -> None:
    """Save an `STLLM`'s LoRA adapter and its other trainable weights. base_model: see `lora_config`."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    lora_config(model.config.lora, base_model).save_pretrained(str(target))
    adapter = {PEFT_PREFIX + key: value for key, value in get_peft_model_state_dict(model.language_model).items()}
    save_file(_contiguous(adapter), target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    others = {name: p.data for name, p in model.named_parameters() if p.requires_grad and LORA not in name}
    save_file(_contiguous(others), target / OTHER_WEIGHTS)


def load_adapter(model: Any, folder: str | Path) -> None:
    """Load a saved adapter into an `STLLM` of the same sizes. LoRA is injected first if the model has none.

    Raises UserError if the folder holds no adapter, or the adapter of another model.
    """
    source = Path(folder)
    check_regular(source, "a LoRA adapter")
    files = (ADAPTER_WEIGHTS, OTHER_WEIGHTS, "adapter_config.json")
    if missing := [name for name in files if not (source / name).is_file()]:
        raise UserError(f"{source} is no LoRA adapter of a run: it lacks {', '.join(missing)}")
    if model.config.lora is None:
        saved = LoraConfig.from_pretrained(str(source))
        model.config.lora = {
            "r": saved.r,
            "alpha": saved.lora_alpha,
            "dropout": saved.lora_dropout,
            "target_modules": sorted(saved.target_modules or ()),
        }
        inject_lora(model.language_model, model.config.lora)
    own = dict(model.named_parameters())
    others = load_file(source / OTHER_WEIGHTS)
    adapter = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(source / ADAPTER_WEIGHTS).items()}
    try:
        found: Any = set_peft_model_state_dict(model.language_model, adapter)
        if unexpected := [*found.unexpected_keys, *(name for name in others if name not in own)]:
            raise UserError(f"{source} was trained on another model: this one has no {', '.join(unexpected[:3])}")
        if missing := [key for key in found.missing_keys if LORA in key]:
            raise UserError(f"{source} does not hold the whole adapter: missing are {', '.join(missing[:3])}")
        with torch.no_grad():
            for name, tensor in others.items():
                own[name].copy_(tensor)
    except RuntimeError as error:  # a tensor has another shape
        cause = str(error).splitlines()[-1].strip()
        raise UserError(f"{source} was trained on a model of other sizes ({cause}): name its own model") from None


def merge_lora(model: Any) -> None:
    """Add an `STLLM`'s LoRA adapter to the weights that it adapts, in place. The model then has no LoRA layers.

    Raises UserError for a quantized language model.
    """
    language_model = model.language_model
    layers = [(name, layer) for name, layer in language_model.named_modules() if isinstance(layer, LoraLayer)]
    bases: list[Any] = [layer.get_base_layer() for _, layer in layers if hasattr(layer, "weight")]
    if any(not base.weight.is_floating_point() for base in bases):
        raise UserError("LoRA can't be merged into quantized weights: load the model without quantization")
    for name, layer in reversed(layers):  # peft wraps the experts of a mixture once per parameter: inner layers first
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(language_model.get_submodule(parent), child, layer.base_layer)
    model.config.lora = None


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
