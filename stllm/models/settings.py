"""Translates the `model` section of a YAML, with its published key names, into fields of `STLLMConfig` and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllm.common.errors import UserError
from stllm.models.configuration import STLLMConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

Fields = dict[str, Any]

PIECES = ("vit_ckpt", "q_former_model", "llama_model", "ckpt")  # later files override earlier ones
GROUPS = ("vision_config", "qformer_config", "text_config", "mask_rate", "lora")  # fields that hold several keys
PUBLISHED = {"num_query_tokens": "num_query_token", "freeze_llm": "freeze_LLM"}  # other keys are named as their field
RENAMED = {PUBLISHED.get(name, name): name for name in STLLMConfig.__annotations__ if name not in GROUPS}
VISION_RENAMED = {"vit_model": "encoder", "image_size": "image_size", "drop_path_rate": "drop_path_rate"}


def settings_to_fields(settings: Mapping[str, Any]) -> Fields:
    """Return the settings of the `model` section as fields of `STLLMConfig`. Keys that are None are left out."""
    given = _set(settings)
    fields: Fields = {ours: given[theirs] for theirs, ours in RENAMED.items() if theirs in given}
    qformer = _set(given.get("qformer"))
    if "dropout" in qformer:
        qformer["hidden_dropout_prob"] = qformer["attention_probs_dropout_prob"] = qformer.pop("dropout")
    vision = {ours: given[theirs] for theirs, ours in VISION_RENAMED.items() if theirs in given}
    groups = {
        "vision_config": vision | _set(given.get("vision")),
        "qformer_config": qformer,
        "text_config": _set(given.get("llm")),
        "mask_rate": {
            name: given[key] for name in ("mean", "std", "min", "max") if (key := f"mask_rate_{name}") in given
        },
    }
    fields |= {name: group for name, group in groups.items() if group}
    if given.get("lora_r"):
        fields["lora"] = {
            "r": given["lora_r"],
            "alpha": given.get("lora_alpha", 16),
            "dropout": given.get("lora_dropout", 0.05),
            "target_modules": list(given.get("lora_target_modules", ("q_proj", "v_proj"))),
        }
    elif "lora_r" in given:
        fields["lora"] = None
    return fields


def _set(values: Mapping[str, Any] | None) -> Fields:
    return {str(key): value for key, value in (values or {}).items() if value is not None}


def published_settings(config: STLLMConfig) -> Fields:
    """Return a configuration as `model` settings, under the published key names. Sizes and LoRA are left out."""
    settings: Fields = {theirs: config.vision_config[ours] for theirs, ours in VISION_RENAMED.items()}
    settings |= {theirs: getattr(config, ours) for theirs, ours in RENAMED.items()}
    return settings | {f"mask_rate_{name}": value for name, value in config.mask_rate.items()}


def model_section(cfg: "DictConfig | Mapping[str, Any]") -> Fields:
    """Return the `model` section as a plain dictionary, from a whole configuration or from the section itself."""
    from omegaconf import DictConfig, OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    assert isinstance(plain, dict)  # a configuration is a mapping
    section = plain.get("model", plain)
    return {str(key): value for key, value in section.items()}


def quantization_of(settings: Mapping[str, Any]) -> str | None:
    """Return the quantization set in the `model` section: 4bit, 8bit or None.

    Raises UserError if `quantization` contradicts `low_resource`.
    """
    asked = settings.get("quantization")
    if not settings.get("low_resource"):
        return asked
    if asked not in (None, "8bit"):
        raise UserError(
            f"model.quantization is {asked}, but model.low_resource is True, the published name of 8bit: leave one out"
        )
    return "8bit"


def piece_paths(settings: Mapping[str, Any]) -> list[str]:
    """List the weight files named in the `model` section, in reading order. A file that is named twice appears once."""
    named = [settings[name] for name in PIECES if settings.get(name)]
    return [path for place, path in enumerate(named) if path not in named[place + 1 :]]


def explicit_settings(cfg_path: str | Path | None = None, options: Sequence[str] = ()) -> Fields:
    """Return only those `model` settings that the user's YAML and options set, without the shipped defaults.

    If the user sets `model_type`, the defaults of that type are included. Raises UserError as `load_config` does.
    """
    if cfg_path is None and not options:
        return {}
    from omegaconf import OmegaConf

    from stllm.common.config import DEFAULT_MODEL, SHIPPED, merge_layers, read_layers, yaml_layer

    layers = read_layers(cfg_path, options)
    cfg = merge_layers(layers, DEFAULT_MODEL)
    said = [layer.values.get("model", {}) for layer in layers]
    if any("model_type" in layer for layer in said):
        said.insert(0, yaml_layer(SHIPPED / f"{cfg.model.model_type}.yaml").values["model"])
    model = OmegaConf.to_container(cfg.model)
    assert isinstance(model, dict)  # the section is a mapping
    explicit: Fields = {}
    for layer in said:
        for key, value in layer.items():
            if key not in model:
                continue
            resolved = model[key]
            # `llm` has no defaults, so all of it was set by the user; of `vision` and `qformer`, only the named keys
            part = {name: resolved[name] for name in value} if isinstance(value, dict) and key != "llm" else None
            explicit[key] = resolved if part is None else {**explicit.get(key, {}), **part}
    return explicit
