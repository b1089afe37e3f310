"""LoRA on the language model (peft): put in, saved apart with whatever else trained, loaded again, merged.

An adapter folder holds peft's own two files, for the language model, and `trained.safetensors`: the projection, the
video input and every other part that trained beside it. Source: LoRA (arXiv 2106.09685), `peft`.
"""

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from stllm.common.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's name
OTHER_WEIGHTS = "trained.safetensors"
LORA = "lora_"


def inject_lora(model: PreTrainedModel, lora: dict[str, Any]) -> PreTrainedModel:
    """Adapts the layers in place. lora: {r, alpha, dropout, target_modules}. Raises UserError for layers not there."""
    try:
        adapted: Any = inject_adapter_in_model(lora_config(lora), model)
    except ValueError as error:
        names = sorted(
            {name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "in_features")}
        )
        raise UserError(
            f"model.lora_target_modules names {', '.join(lora['target_modules'])}, but the language model's linear "
            f"layers are {', '.join(names)}: name some of these"
        ) from error
    for name, parameter in adapted.named_parameters():
        if LORA in name:  # peft has started them; transformers' own start would undo that
            parameter._is_hf_initialized = True
    return cast(PreTrainedModel, adapted)


def lora_config(lora: dict[str, Any]) -> LoraConfig:
    """peft's configuration of ours."""
    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=list(lora["target_modules"]),
        task_type="CAUSAL_LM",
    )


def save_adapter(model: Any, folder: str | Path) -> None:
    """Writes the adapter of an `STLLM` with LoRA, and the other weights that trained."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    lora_config(model.config.lora).save_pretrained(str(target))
    save_file(_contiguous(get_peft_model_state_dict(model.language_model)), target / ADAPTER_WEIGHTS)
    others = {name: p.data for name, p in model.named_parameters() if p.requires_grad and LORA not in name}
    save_file(_contiguous(others), target / OTHER_WEIGHTS)


def load_adapter(model: Any, folder: str | Path) -> None:
    """Puts a saved adapter into an `STLLM` of the same sizes; LoRA is injected where the model has none.

    Raises UserError when the folder is no adapter, or one of another model.
    """
    source = Path(folder)
    missing = [
        name for name in (ADAPTER_WEIGHTS, OTHER_WEIGHTS, "adapter_config.json") if not (source / name).is_file()
    ]
    if missing:
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
    try:
        found: Any = set_peft_model_state_dict(model.language_model, load_file(source / ADAPTER_WEIGHTS))
        unexpected = [*found.unexpected_keys, *(name for name in others if name not in own)]
        if unexpected:
            raise UserError(f"{source} was trained on another model: this one has no {', '.join(unexpected[:3])}")
        with torch.no_grad():
            for name, tensor in others.items():
                own[name].copy_(tensor)
    except RuntimeError as error:  # of another shape
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{source} was trained on a model of other sizes ({reason}): name the one that it goes on"
        ) from None


def merge_lora(model: Any) -> None:
    """Adds the adapter to the weights it adapts, so that a plain model is left. In place, on an `STLLM`."""
    for name, layer in list(model.language_model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.language_model.get_submodule(parent), child, layer.get_base_layer())
    model.config.lora = None


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
