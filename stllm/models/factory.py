"""From a configuration's `model` section to a model: the only place that reads the section's published key names.

`build_model` puts pieces together: weights named by `vit_ckpt`, `q_former_model`, `llama_model` and `ckpt` are streamed
in, later ones over earlier ones; what no file gives starts fresh only where training is meant to start it fresh.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from stllm.models.checkpoints.audit import AuditReport
    from stllm.models.configuration import STLLMConfig
    from stllm.models.st_llm import STLLM

log = logging.getLogger(__name__)

Fields = dict[str, Any]

PIECES = ("vit_ckpt", "q_former_model", "llama_model", "ckpt")  # later ones over earlier ones
# published names -> ours; `vision`, `qformer`, `llm`, LoRA and the mask rate are grouped in `settings_to_fields`
RENAMED = {
    "arch": "arch",
    "has_qformer": "has_qformer",
    "qformer_text_input": "qformer_text_input",
    "num_query_token": "num_query_tokens",
    "video_input": "video_input",
    "residual_size": "residual_size",
    "residual_bottleneck": "residual_bottleneck",
    "num_frames": "num_frames",
    "use_mask": "use_mask",
    "use_mvm": "use_mvm",
    "mvm_decode": "mvm_decode",
    "freeze_vit": "freeze_vit",
    "freeze_qformer": "freeze_qformer",
    "freeze_LLM": "freeze_llm",
    "vit_chunk_size": "vit_chunk_size",
    "template": "template",
    "system": "system",
    "max_txt_len": "max_txt_len",
    "end_sym": "end_sym",
}
VISION_RENAMED = {"vit_model": "encoder", "image_size": "image_size", "drop_path_rate": "drop_path_rate"}


def settings_to_fields(settings: Mapping[str, Any]) -> Fields:
    """The `model` section's settings as fields of `STLLMConfig`; an unset key (None or absent) settles nothing."""
    given = {key: value for key, value in settings.items() if value is not None}
    fields: Fields = {ours: given[theirs] for theirs, ours in RENAMED.items() if theirs in given}
    vision = {ours: given[theirs] for theirs, ours in VISION_RENAMED.items() if theirs in given}
    groups = {
        "vision_config": {**vision, **_set(given.get("vision"))},
        "qformer_config": _qformer(given.get("qformer")),
        "text_config": _set(given.get("llm")),
        "mask_rate": {
            name: given[f"mask_rate_{name}"] for name in ("mean", "std", "min", "max") if f"mask_rate_{name}" in given
        },
    }
    fields |= {name: group for name, group in groups.items() if group}
    if "lora_r" in given:
        fields["lora"] = _lora(given) if given["lora_r"] else None
    return fields


def published_settings(config: "STLLMConfig") -> Fields:
    """A configuration under the published key names: what `settings_to_fields` reads, sizes and LoRA left out."""
    settings: Fields = {theirs: config.vision_config[ours] for theirs, ours in VISION_RENAMED.items()}
    settings |= {theirs: getattr(config, ours) for theirs, ours in RENAMED.items()}
    return settings | {f"mask_rate_{name}": value for name, value in config.mask_rate.items()}


def piece_paths(settings: Mapping[str, Any]) -> list[str]:
    """The weights that the section names, in the order in which they are read; a file named twice is read once."""
    named = [settings[name] for name in PIECES if settings.get(name)]
    return [path for place, path in enumerate(named) if path not in named[place + 1 :]]


def explicit_settings(cfg_path: str | Path | None = None, options: Sequence[str] = ()) -> Fields:
    """What the user's YAML and options say about the model, checked, without the defaults below them.

    The shipped defaults of a `model_type` that the user names count as said. Raises UserError as `load_config` does.
    """
    from omegaconf import OmegaConf

    from stllm.common.config import DEFAULT_MODEL, SHIPPED, load_config, yaml_layer, yaml_layers

    if cfg_path is None and not options:
        return {}
    cfg = load_config(cfg_path, options, model_type=DEFAULT_MODEL)
    raw: list[Any] = [layer.values for layer in yaml_layers(cfg_path)] if cfg_path is not None else []
    raw.append(OmegaConf.to_container(OmegaConf.from_dotlist(list(options))))
    said = [layer.get("model") or {} for layer in raw]
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
            # `llm` is free-form, so all of it was said; of `vision` and `qformer`, the named sizes
            part = {name: resolved[name] for name in value} if isinstance(value, dict) and key != "llm" else None
            explicit[key] = resolved if part is None else {**explicit.get(key, {}), **part}
    return explicit


def config_from_settings(settings: Mapping[str, Any]) -> "STLLMConfig":
    """The configuration that the section and the weights it names ask for. Raises UserError."""
    from stllm.models.checkpoints.deciding import decide_config, open_named

    return decide_config(open_named(settings), settings)


def build_model(cfg: "DictConfig | Mapping[str, Any]", *, device: str = "auto", dtype: str = "auto") -> "STLLM":
    """The model of a configuration, weights from the files that it names, in evaluation mode.

    cfg: what `load_config` returns, or its `model` section.
    Fresh may be: the temporal adapter, the global-local module, the MVM decoder, LoRA; the projection when no named
    file is of a kind that has one; what `model.fresh` names; everything when no file is named. Raises UserError for
    anything else.
    """
    model, report = build_audited(cfg, device=device, dtype=dtype)
    for line in report.details():
        log.info(line)
    return model


def build_audited(
    cfg: "DictConfig | Mapping[str, Any]",
    *,
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    trained_dtype: "torch.dtype | None" = None,
) -> tuple["STLLM", "AuditReport"]:
    """As `build_model`, with the audit. trained_dtype: of what trains, where it is another than the rest's."""
    from stllm.models.checkpoints.assembly import assemble
    from stllm.models.checkpoints.deciding import decide_config, open_named
    from stllm.models.checkpoints.placing import place

    settings = model_section(cfg)
    sources = open_named(settings)
    config = decide_config(sources, settings)
    if settings.get("low_resource"):
        gpu = f"cuda:{settings.get('device_8bit', 0)}"
        name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
        model, report = place(config, sources, device=gpu, dtype=name, quantization="8bit", training=True)
    else:
        model, report = assemble(
            config,
            sources,
            device=device,
            dtype=dtype,
            training=True,
            fresh=settings.get("fresh") or (),
            trained_dtype=trained_dtype,
        )
    if settings.get("use_grad_checkpoint"):
        # newer releases of transformers have renamed it, and warn at the old name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, report


def build_encoder(cfg: "DictConfig | Mapping[str, Any]", *, device: "torch.device", dtype: "torch.dtype") -> "STLLM":
    """As `build_model`, with nothing in the language model's place: what a clip is encoded by."""
    from stllm.models.checkpoints.assembly import assemble
    from stllm.models.checkpoints.deciding import decide_config, open_named

    settings = model_section(cfg)
    sources = open_named(settings)
    model, report = assemble(
        decide_config(sources, settings),
        sources,
        device=device,
        dtype=dtype,
        training=True,
        fresh=settings.get("fresh") or (),
        with_language_model=False,
    )
    encoder = ("vision encoder", "ln_vision", "qformer")
    if fresh := [part for part, audit in report.parts.items() if audit.fresh and part in encoder]:
        log.warning("from random weights, as no file gives them: %s", ", ".join(fresh))
    return model


def model_section(cfg: "DictConfig | Mapping[str, Any]") -> Fields:
    """The `model` section as a plain dictionary, from a whole configuration or from the section itself."""
    from omegaconf import DictConfig, OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    assert isinstance(plain, dict)  # a configuration is a mapping
    section = plain.get("model", plain)
    return {str(key): value for key, value in section.items()}


def _set(values: Mapping[str, Any] | None) -> Fields:
    return {str(key): value for key, value in (values or {}).items() if value is not None}


def _qformer(group: Mapping[str, Any] | None) -> Fields:
    sizes = _set(group)
    if "dropout" in sizes:
        sizes["hidden_dropout_prob"] = sizes["attention_probs_dropout_prob"] = sizes.pop("dropout")
    return sizes


def _lora(given: Mapping[str, Any]) -> Fields:
    return {
        "r": given["lora_r"],
        "alpha": given.get("lora_alpha", 16),
        "dropout": given.get("lora_dropout", 0.05),
        "target_modules": list(given.get("lora_target_modules", ("q_proj", "v_proj"))),
    }
