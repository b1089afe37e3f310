"""Configuration: the shipped defaults, the user's YAML and `--options` are merged in that order and checked.

Each source of settings is a layer. A layer has a name, so that an error message can say where a mistake is. The keys of
each layer are checked before the merge, the values after it. A YAML can name another one in `base`: its own settings
then override those of the base. Overrides are read before the defaults are chosen, so that `--options
model.model_type=tiny` selects the defaults of `tiny`.
"""

import dataclasses
import logging
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stllm.common.errors import UserError, did_you_mean, nearest, unknown_name
from stllm.common.files import user_path, write_text
from stllm.common.logging import ONCE
from stllm.common.run_section import check_run, translate_run
from stllm.common.schema import (
    PRESETS,
    ROOTS,
    DatasetSettings,
    EvaluationSettings,
    ModelSettings,
    RunSettings,
    Where,
    benchmark_names,
    checked_values,
    keys_of,
)

log = logging.getLogger(__name__)

SECTIONS = ("model", "datasets", "run", "evaluation", "suite")
OPTIONS = "--options"  # name of the layer of overrides
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one OmegaConf uses; SafeLoader rejects `[Which?]`
MAX_VALUES = 100_000  # limit for one YAML; a few lines of aliases can expand to more values than fit in memory
BASE = "base"  # top-level key of a YAML: the file whose settings it overrides
UNUSED_SECTIONS = {"preprocess": "images are prepared by model.image_size alone"}  # found in published YAMLs
RUN_PATHS = ("deepspeed", "fsdp_config", "resume_from_checkpoint")  # output_dir is relative to the working directory
DATASET_PATHS = ("_root", "_path", "_dir")  # endings of the keys that hold paths
SHIPPED = Path(__file__).parent.parent / "configs" / "models"
DEFAULT_MODEL = "instructblip_vicuna0"
SHOWN = 6  # changed keys that a message lists


@dataclass
class Layer:
    """One source of settings.

    name: its name in error messages. folder: where its relative paths start. values: section -> settings.
    """

    name: str
    folder: Path
    values: dict[str, Any]


def load_config(
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    model_type: str | None = None,
    *,
    benchmark: str | None = None,
    command_line: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Return the checked, resolved configuration: sections `model`, `datasets` and `run` (empty if not given).

    cfg_path: the user's YAML. options: overrides, `key=value` with dots in the key.
    model_type: selects the shipped defaults when neither the YAML nor the options set `model.model_type`.
    benchmark: adds the section `evaluation`, with this benchmark's shipped settings as defaults.
    command_line: keys of `evaluation` set by other options of the command; they override everything else.
    checkpoint: keys of `evaluation` set by the checkpoint; the user's settings override them.

    Raises UserError for a file that is missing or not YAML, an unknown key or name, a value of a wrong type, an option
    without `=`, or an environment variable that is not set. The message names the file and the nearest known key or
    value.
    """
    given = read_layers(cfg_path, options)
    if command_line:
        given.append(Layer("the command line", Path.cwd(), {"evaluation": dict(command_line)}))
    return merge_layers(given, model_type, benchmark=benchmark, checkpoint=checkpoint)


def load_evaluation(
    benchmark: str,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    command_line: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> EvaluationSettings:
    """Return the settings of one evaluation; arguments and errors as in `load_config`.

    The YAML need not name a model: its architecture is read from the checkpoint later.
    """
    cfg = load_config(
        cfg_path, options, DEFAULT_MODEL, benchmark=benchmark, command_line=command_line, checkpoint=checkpoint
    )
    return typing.cast(EvaluationSettings, OmegaConf.to_object(cfg.evaluation))


def model_types() -> list[str]:
    """List the names that `model.model_type` may have."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically; `load_config` on this file returns an equal one."""
    write_text(path, OmegaConf.to_yaml(cfg, resolve=True))


# ---- reading --------------------------------------------------------------------------------------------------------


def read_layers(cfg_path: str | Path | None, options: Sequence[str] = ()) -> list[Layer]:
    """Read the user's YAML (after its bases) and the options, in increasing priority, and check the keys.

    Raises UserError as `load_config` does.
    """
    layers = [] if cfg_path is None else yaml_layers(cfg_path)
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UserError(f"--options: found {option!r}, expected key=value, e.g. model.video_input=residual")
    if options:
        try:
            values = OmegaConf.to_container(OmegaConf.from_dotlist(list(options)))
        except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
            raise UserError(f"--options: {' '.join(options)!r} has a value that is not valid YAML") from error
        layers.append(Layer(OPTIONS, Path.cwd(), typing.cast(dict[str, Any], values)))
    for layer in layers:
        _check_layer(layer)
    return layers


def yaml_layers(path: str | Path) -> list[Layer]:
    """Read a YAML file and its chain of `base` files, the lowest base first. A base's path is relative to its YAML.

    Raises UserError as `yaml_layer` does, for a base that is not a file, and for a circular chain.
    """
    layers, files = [yaml_layer(path)], [str(user_path(path))]
    while (base := layers[0].values.pop(BASE, None)) is not None:
        name = layers[0].name
        if not isinstance(base, str) or not base:
            raise UserError(f"{name}: '{BASE}' must be the path of a YAML file, found {base!r}")
        below = os.path.normpath(os.path.join(os.path.dirname(files[0]), os.path.expanduser(base)))
        if not os.path.isfile(below):
            raise UserError(f"{name}: '{BASE}' names {below}, which is no file: give its path relative to this YAML")
        if any(os.path.samefile(below, file) for file in files):
            raise UserError(f"{name}: '{BASE}' names {below}, which is based on this file in turn: drop one of the two")
        layers.insert(0, yaml_layer(below))
        files.insert(0, below)
    return layers


def yaml_layer(path: str | Path) -> Layer:
    """Read the raw content of a YAML file. Raises UserError if it is missing, unreadable, or not a mapping of keys."""
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"{path}: {'a folder' if file.is_dir() else 'no such file'}, expected a YAML configuration")
    try:
        if _num_values(yaml.compose(file.read_text(encoding="utf-8"), Loader=LOADER), {}) > MAX_VALUES:
            raise UserError(f"{path}: its aliases (*name) stand for more than {MAX_VALUES:,} values: write fewer")
        values = OmegaConf.to_container(OmegaConf.load(file))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid YAML ({first_line(error)})") from error
    except OSError as error:  # OmegaConf raises this for a file that holds only a scalar
        raise UserError(f"{path}: cannot be read as a configuration ({first_line(error)})") from error
    return Layer(str(path), file.absolute().parent, _mapping(values, str(path), "the file"))


def _num_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Count the values in a YAML node after OmegaConf has expanded its aliases. known: node id -> count."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in inner)
    return known[id(node)]


def _mapping(value: Any, source: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{source}: {what} must be a mapping of keys, found {value!r}")
    return {str(key): entry for key, entry in value.items()}


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, so that it fits into a message of one sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- keys of a layer ------------------------------------------------------------------------------------------------


def _check_layer(layer: Layer) -> None:
    """Check the keys of one layer. Keys that have no effect are removed, and a note says so."""
    for section, content in list(layer.values.items()):
        if section in UNUSED_SECTIONS:
            log.info("%s: section %s has no effect: %s", layer.name, section, UNUSED_SECTIONS[section], extra=ONCE)
            del layer.values[section]
        elif section not in SECTIONS:
            hint = did_you_mean(section, {*SECTIONS, BASE} - {section})
            for home, schema in (("model", ModelSettings), ("run", RunSettings), ("evaluation", EvaluationSettings)):
                meant = nearest(section, [f.name for f in dataclasses.fields(schema)])
                hint = hint or (f"; did you mean '{home}.{meant}'?" if meant else "")
            raise UserError(f"{layer.name}: unknown section {section!r}, expected {', '.join(SECTIONS)}{hint}")
        elif content is None:  # `model:` with nothing under it
            del layer.values[section]
        else:
            layer.values[section] = _mapping(content, layer.name, f"'{section}'")
    values = layer.values
    _check_keys(values.get("model", {}), ModelSettings, "model", layer.name)
    _check_keys(values.get("evaluation", {}), EvaluationSettings, "evaluation", layer.name)
    suite = values.get("suite", {})
    for name, entry in suite.items():
        if name not in benchmark_names():
            raise UserError(f"{layer.name}: {unknown_name('benchmark in suite', name, benchmark_names())}")
        suite[name] = _mapping({} if entry is None else entry, layer.name, f"'suite.{name}'")
        _check_keys(suite[name], EvaluationSettings, f"suite.{name}", layer.name)
    entries = values.get("datasets", {})
    for name, entry in entries.items():
        if name in ROOTS:
            if not isinstance(entry, str):
                raise UserError(f"{layer.name}: 'datasets.{name}' must be the path of a folder, found {entry!r}")
            continue
        if isinstance(entry, str):
            hint = did_you_mean(name, ROOTS)
            raise UserError(f"{layer.name}: 'datasets.{name}' must be a mapping of keys, found {entry!r}{hint}")
        entries[name] = _mapping({} if entry is None else entry, layer.name, f"'datasets.{name}'")
        _check_keys(entries[name], DatasetSettings, f"datasets.{name}", layer.name)
    if values.get("run"):
        values["run"] = translate_run(values["run"], layer.name)


def _check_keys(values: dict[str, Any], schema: type, prefix: str, source: str) -> None:
    """Check a section's keys against its dataclass; remove keys without effect.

    source: the YAML or option that sets them.
    """
    fields = {f.name: f for f in dataclasses.fields(schema)}
    annotations = typing.get_type_hints(schema)
    for key, value in list(values.items()):
        dotted = f"{prefix}.{key}"
        if key not in fields:
            listed = "" if nearest(key, fields) else f"; known are {', '.join(sorted(fields))}"
            raise UserError(f"{source}: unknown key {dotted!r}{did_you_mean(key, fields)}{listed}")
        kind = typing.get_origin(annotations[key]) or annotations[key]
        if "unused" in fields[key].metadata:
            if value is not None:
                log.info("%s: %s has no effect: %s", source, dotted, fields[key].metadata["unused"], extra=ONCE)
            del values[key]
        elif dataclasses.is_dataclass(kind) or kind is dict:
            values[key] = _mapping({} if value is None else value, source, f"'{dotted}'")
            if kind is not dict:
                _check_keys(values[key], typing.cast(type, kind), dotted, source)
        elif kind is list and isinstance(value, dict):  # OmegaConf cannot merge the two
            raise UserError(f"{source}: '{dotted}' must be a list, found {value!r}")


# ---- merging --------------------------------------------------------------------------------------------------------


def merge_layers(
    given: Sequence[Layer],
    model_type: str | None = None,
    *,
    benchmark: str | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Merge the layers of `read_layers` over the shipped defaults, and check the values; see `load_config`."""
    shipped = [yaml_layer(SHIPPED / f"{_model_type(given, model_type)}.yaml")]
    schemas: dict[str, type] = {"model": ModelSettings}
    if benchmark is not None:
        given = [_for_benchmark(layer, benchmark) for layer in given]
        own = Layer("the checkpoint", Path.cwd(), {"evaluation": dict(checkpoint or {})})
        shipped[:0] = [yaml_layer(PRESETS / f"{benchmark}.yaml"), own]
        schemas["evaluation"] = EvaluationSettings
    for layer in shipped:
        _check_layer(layer)
    layers = [*shipped, *given]
    cfg = OmegaConf.create({name: dataclasses.asdict(schema()) for name, schema in schemas.items()})
    cfg.datasets, cfg.run = {}, {}
    for layer in layers:
        values = {name: section for name, section in layer.values.items() if name in cfg}
        kind = values.get("model", {}).get("llm", {}).get("model_type")
        if kind is not None and kind != cfg.model.llm.get("model_type"):
            cfg.model.llm = {}  # the layer changes the architecture: keys of the former one do not apply
        cfg = typing.cast(DictConfig, OmegaConf.merge(cfg, values))
    plain = typing.cast(dict[str, dict[str, Any]], OmegaConf.to_container(_resolved(cfg, layers)))

    def where(key: str) -> str:
        return source_of(layers, key).name

    for section, schema in schemas.items():
        values = checked_values(plain[section], *keys_of(schema), section, where, structured=True)
        try:
            cfg[section] = OmegaConf.merge(OmegaConf.structured(schema), values)
        except OmegaConfBaseException as error:  # a wrong entry in a list; `typed` does not check list entries
            key = f"{section}.{error.full_key}"
            raise UserError(f"{where(key.partition('[')[0])}: '{key}': {first_line(error)}") from error
    if cfg.model.mask_rate_min > cfg.model.mask_rate_max:
        found = f"{cfg.model.mask_rate_min} and {cfg.model.mask_rate_max}"
        fault = f"'model.mask_rate_min' must not exceed 'model.mask_rate_max', found {found}"
        raise UserError(f"{where('model.mask_rate_min')}: {fault}")
    for name, entry in plain["datasets"].items():
        if name not in ROOTS:
            cfg.datasets[name] = check_entry(name, entry, where)
    _make_paths_absolute(cfg, layers)
    if any(layer.values.get("run") for layer in layers):
        cfg.run = check_run(typing.cast(dict[str, Any], OmegaConf.to_container(cfg.run)), where)
    return cfg


def _for_benchmark(layer: Layer, benchmark: str) -> Layer:
    """Return the layer with its `suite.<benchmark>` keys merged over its `evaluation` keys."""
    entry = layer.values.get("suite", {}).get(benchmark, {})
    if not entry:
        return layer
    return dataclasses.replace(
        layer, values={**layer.values, "evaluation": {**layer.values.get("evaluation", {}), **entry}}
    )


def suite_of(cfg_path: str | Path | None, options: Sequence[str] = ()) -> list[str]:
    """List the benchmarks in section `suite`, in order. Raises UserError as `load_config` does, and if it is empty."""
    layers = read_layers(cfg_path, options)
    names = list(dict.fromkeys(name for layer in layers for name in layer.values.get("suite", {})))
    if not names:
        raise UserError(
            f"{cfg_path}: found no section suite, expected one of benchmarks, such as suite: {{tvbench: {{}}}}"
        )
    return names


def _model_type(given: Sequence[Layer], fallback: str | None) -> str:
    """Return `model.model_type` as the YAML and the options set it, or the fallback if they do not."""
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


def source_of(layers: Sequence[Layer], dotted: str) -> Layer:
    """Return the layer of highest priority that sets a key, or a layer named "the defaults"."""
    for layer in reversed(layers):
        found: Any = layer.values
        for part in dotted.replace("[", ".").replace("]", "").split("."):
            if not isinstance(found, Mapping) or part not in found:
                break
            found = found[part]
        else:
            return layer
    return Layer("the defaults", Path.cwd(), {})


def _resolved(cfg: Any, layers: Sequence[Layer]) -> DictConfig:
    """Resolve every `${...}` in the configuration. Raises UserError if this fails, or if a value is `???`."""
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        key = error.full_key or next(filter(lambda key: not _resolves(cfg, key), flat(OmegaConf.to_container(cfg))), "")
        unset = re.search(r"Environment variable '\w+' not found", str(error))
        reason = "e" + unset[0][1:] + ": set it, or write ${oc.env:NAME,default}" if unset else first_line(error)
        raise UserError(f"{source_of(layers, key).name}: '{key}': {reason}") from error
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{source_of(layers, missing[0]).name}: '{missing[0]}' is left open (???): give it a value")
    return typing.cast(DictConfig, cfg)


def _resolves(cfg: DictConfig, key: str) -> bool:
    """Check whether one key can be resolved. OmegaConf 2.3 does not name the key that failed."""
    try:
        OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return False
    return True


def _make_paths_absolute(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    """Make absolute those paths that are relative to their YAML's folder.

    A path is relative to its YAML if it begins with a dot, or if it exists beside the YAML. Other values stay: they are
    names on the hub, or relative to the working directory.
    """
    keys = [f"run.{key}" for key in RUN_PATHS]
    for section, schema in (("model", ModelSettings), ("evaluation", EvaluationSettings)):
        if section in cfg:
            keys += [f"{section}.{f.name}" for f in dataclasses.fields(schema) if "path" in f.metadata]
    keys += [f"datasets.{key}" for key in flat(OmegaConf.to_container(cfg.datasets)) if key.endswith(DATASET_PATHS)]
    for key in keys:
        value, layer = OmegaConf.select(cfg, key), source_of(layers, key)
        if not isinstance(value, str):
            continue
        path = os.path.expanduser(value)
        beside = os.path.abspath(layer.folder / path)
        marked = value in (".", "..") or value.startswith(("./", "../"))
        if value and not os.path.isabs(path) and (marked or os.path.exists(beside)):
            path = beside
        optional = key.startswith("model.") and not value
        OmegaConf.update(cfg, key, None if optional else path)


def check_entry(name: str, entry: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """Convert and check the settings of one data set. Null values are left out, so that the defaults apply.

    where: function that returns the name of the YAML or option that sets a dotted key.
    Raises UserError for a value of a wrong type or out of range.
    """
    checked = checked_values(entry, *keys_of(DatasetSettings), f"datasets.{name}", where)
    return {key: value for key, value in checked.items() if value is not None}


# ---- comparing ------------------------------------------------------------------------------------------------------


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {
        dotted: value
        for key, entry in values.items()
        for dotted, value in flat(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describe the differences: "a.b was 1 and is now 2 (and 1 more: c)", or "". A missing key counts as None."""
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if not changed:
        return ""
    key = changed[0]
    more = f" (and {len(changed) - 1} more: {', '.join(changed[1:SHOWN])})" if len(changed) > 1 else ""
    return f"{key} was {old.get(key)!r} and is now {new.get(key)!r}{more}"
