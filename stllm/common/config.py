"""Configuration: shipped defaults <- the user's YAML <- `--options`, merged in that order and checked.

A YAML's `base` comes right below it (layers.py). A configuration has three sections: `model` (schema.py), `datasets`
(datasets_section.py) and `run` (run_section.py); that of an evaluation has `evaluation` (evaluation_section.py), too.
The overrides are read before the defaults are chosen, so that `--options model.model_type=tiny` picks tiny's.
"""

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from stllm.common.datasets_section import ROOTS, check_entry
from stllm.common.errors import UserError, unknown_name
from stllm.common.evaluation_section import PRESETS, EvaluationSettings
from stllm.common.files import write_text
from stllm.common.layers import (
    OPTIONS,
    Layer,
    check_layer,
    first_line,
    options_layer,
    source_of,
    yaml_layer,
    yaml_layers,
)
from stllm.common.run_section import check_run, expected
from stllm.common.schema import ModelSettings, field_fault

RUN_PATHS = ("deepspeed", "fsdp_config", "resume_from_checkpoint")  # output_dir is relative to where one stands
DATASET_PATHS = ("_root", "_path", "_dir")  # endings of the keys that hold paths
EVALUATION_PATHS = ("anno_path", "answers_path", "video_dir")
SHIPPED = Path(__file__).parent.parent / "configs" / "models"
DEFAULT_MODEL = "instructblip_vicuna0"
_SCHEMAS: dict[str, type] = {"model": ModelSettings, "evaluation": EvaluationSettings}  # of the typed sections


def load_config(
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    model_type: str | None = None,
    *,
    benchmark: str | None = None,
    command_line: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> DictConfig:
    """The checked, resolved configuration with sections `model`, `datasets` and `run` (empty where none is given).

    cfg_path: the user's YAML. options: overrides, `key=value` with dots in the key.
    model_type: which shipped defaults to use when neither YAML nor options say `model.model_type`.
    benchmark: there is a section `evaluation`, over the shipped settings of that benchmark. command_line: its keys that
        options of the command's own give, over everything else. checkpoint: its keys that the checkpoint decides, over
        the shipped settings and below the user's.

    Raises UserError, naming the file and the nearest known key or value: a file that is missing or no YAML, an
    unknown key or name, a value of a wrong type, an option without `=`, an environment variable that is not set.
    """
    given = yaml_layers(cfg_path) if cfg_path is not None else []
    if options:
        given.append(options_layer(options))
    if command_line:
        given.append(Layer("the command line", Path.cwd(), {"evaluation": dict(command_line)}))
    for layer in given:
        check_layer(layer)
    layers = [_shipped_layer(SHIPPED, _model_type(given, model_type)), *given]
    if benchmark is None:
        for layer in layers:  # of no use to anything else
            layer.values.pop("evaluation", None)
    else:
        own = Layer("the checkpoint", Path.cwd(), {"evaluation": dict(checkpoint or {})})
        layers[:0] = [_shipped_layer(PRESETS, benchmark), own]
    cfg = _resolved(_merged(layers, ("model",) if benchmark is None else ("model", "evaluation")), layers)
    _check_values(cfg, layers)
    for name, entry in cfg.datasets.items():
        if name not in ROOTS:
            values = typing.cast(dict[str, Any], OmegaConf.to_container(entry))
            cfg.datasets[name] = check_entry(str(name), values, lambda key: source_of(layers, key).name)
    _absolute_paths(cfg, layers)
    if any(layer.values.get("run") for layer in layers):
        run = typing.cast(dict[str, Any], OmegaConf.to_container(cfg.run))
        cfg.run = check_run(run, lambda key: source_of(layers, key).name)
    return cfg


def model_settings(cfg: DictConfig) -> ModelSettings:
    """The `model` section as the typed dataclass."""
    return typing.cast(ModelSettings, OmegaConf.to_object(cfg.model))


def load_evaluation(
    benchmark: str,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    command_line: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> EvaluationSettings:
    """The settings of one evaluation; arguments and errors as for `load_config`.

    A model that the YAML says nothing of is no error: the checkpoint says what it is.
    """
    cfg = load_config(
        cfg_path, options, DEFAULT_MODEL, benchmark=benchmark, command_line=command_line, checkpoint=checkpoint
    )
    return typing.cast(EvaluationSettings, OmegaConf.to_object(cfg.evaluation))


def model_types() -> list[str]:
    """The names that `model.model_type` may have."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Writes the resolved configuration as YAML, whole or not at all; `load_config` reads it back equal."""
    write_text(path, OmegaConf.to_yaml(cfg, resolve=True))


def _shipped_layer(folder: Path, name: str) -> Layer:
    layer = yaml_layer(folder / f"{name}.yaml")
    check_layer(layer)
    return layer


def _model_type(given: Sequence[Layer], fallback: str | None) -> str:
    """The model type that the YAML and the options together ask for, or the fallback."""
    name, source = fallback, "model_type"
    for layer in given:
        asked = layer.values.get("model", {}).get("model_type")
        if asked is not None:
            name, source = asked, layer.name
    if name is None:
        files = [layer.name for layer in given if layer.name != OPTIONS] or [layer.name for layer in given]
        where = f"{files[-1]}: " if files else ""
        raise UserError(f"{where}model.model_type is not set: name one of {', '.join(model_types())}")
    if "${" in str(name):
        merged = OmegaConf.merge(*(OmegaConf.create(layer.values) for layer in given))
        name = OmegaConf.select(_resolved(merged, given), "model.model_type")
    if name not in model_types():
        raise UserError(f"{source}: {unknown_name('model.model_type', str(name), model_types())}")
    return str(name)


def _merged(layers: Sequence[Layer], typed: Sequence[str]) -> DictConfig:
    """The layers one over the other. typed: the sections that have a schema."""
    sections = {section: OmegaConf.structured(_SCHEMAS[section]) for section in typed}
    cfg = OmegaConf.create({**sections, "datasets": {}, "run": {}})
    for layer in layers:
        kind = layer.values.get("model", {}).get("llm", {}).get("model_type")
        if kind is not None and kind != cfg.model.llm.get("model_type"):
            cfg.model.llm = {}  # another architecture: the keys of the one below mean nothing to it
        try:
            cfg = typing.cast(DictConfig, OmegaConf.merge(cfg, layer.values))
        except OmegaConfBaseException as error:
            raise UserError(_wrong_value(error, error.full_key or "", layer)) from error
    return cfg


def _resolved(cfg: Any, layers: Sequence[Layer]) -> DictConfig:
    """The configuration with every `${...}` replaced."""
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        key = error.full_key or next(_unresolvable(cfg), "")  # OmegaConf 2.3 does not tell the key
        layer = source_of(layers, key)
        if isinstance(error, ValidationError):
            raise UserError(_wrong_value(error, key, layer)) from error
        unset = re.search(r"Environment variable '\w+' not found", str(error))
        reason = "e" + unset[0][1:] + ": set it, or write ${oc.env:NAME,default}" if unset else first_line(error)
        raise UserError(f"{layer.name}: '{key}': {reason}") from error
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{source_of(layers, missing[0]).name}: '{missing[0]}' is left open (???): give it a value")
    return typing.cast(DictConfig, cfg)


def _unresolvable(cfg: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys whose interpolation fails."""
    keys: Iterable[Any] = cfg if isinstance(cfg, DictConfig) else range(len(cfg))
    for key in keys:
        dotted = f"{prefix}.{key!s}" if prefix else str(key)
        try:
            value = cfg[key]
        except OmegaConfBaseException:
            yield dotted
        else:
            if isinstance(value, (DictConfig, ListConfig)):
                yield from _unresolvable(value, dotted)


def _check_values(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    """Enumerated values and ranges of the sections that have a schema."""
    for section in (name for name in _SCHEMAS if name in cfg):
        for f in dataclasses.fields(_SCHEMAS[section]):
            value, where = cfg[section][f.name], f"{section}.{f.name}"
            fault = field_fault(f, value, where)
            if fault:
                raise UserError(f"{source_of(layers, where).name}: {fault}")
    if cfg.model.mask_rate_min > cfg.model.mask_rate_max:
        found = f"{cfg.model.mask_rate_min} and {cfg.model.mask_rate_max}"
        where = source_of(layers, "model.mask_rate_min").name
        raise UserError(f"{where}: 'model.mask_rate_min' must not exceed 'model.mask_rate_max', found {found}")


def _absolute_paths(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    keys = [f"model.{f.name}" for f in dataclasses.fields(ModelSettings) if "path" in f.metadata]
    keys += [f"run.{key}" for key in RUN_PATHS]
    keys += [f"evaluation.{key}" for key in EVALUATION_PATHS if "evaluation" in cfg]
    for name, entry in cfg.datasets.items():
        names = [f".{key!s}" for key in entry] if isinstance(entry, DictConfig) else [""]
        keys += [f"datasets.{name!s}{key}" for key in names if f"{name!s}{key}".endswith(DATASET_PATHS)]
    for key in keys:
        value, layer = OmegaConf.select(cfg, key), source_of(layers, key)
        if isinstance(value, str):
            optional = key.startswith("model.") and not value and key != "model.qformer_tokenizer"
            OmegaConf.update(cfg, key, None if optional else _absolute(value, layer.folder))


def _absolute(value: str, folder: Path) -> str:
    """A path relative to `folder` made absolute; anything else (a hub name, a path relative to here) as it is."""
    path = os.path.expanduser(value)
    beside = os.path.abspath(folder / path)
    marked = value in (".", "..") or value.startswith(("./", "../"))
    return beside if value and not os.path.isabs(path) and (marked or os.path.exists(beside)) else path


def _wrong_value(error: OmegaConfBaseException, key: str, layer: Layer) -> str:
    found: Any = layer.values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    schema = _SCHEMAS.get(key.split(".")[0], ModelSettings)
    annotation: Any = None
    for part in key.split(".")[1:]:
        annotation = typing.get_type_hints(schema).get(part)
        schema = typing.cast(type, annotation) if dataclasses.is_dataclass(annotation) else schema
    words = expected(annotation) or ("a list" if typing.get_origin(annotation) is list else None)
    if words is None:
        return f"{layer.name}: '{key}': {first_line(error)}"
    return f"{layer.name}: '{key}' must be {words}, found {found!r}"
