"""Configuration: shipped defaults <- the user's YAML <- `--options`, merged in that order and checked.

Each source of settings is a layer with a name, so that a message can say where a mistake is. A layer's keys are checked
before anything is merged, and the values of the whole after it (`schema.typed`). A YAML's `base` is the layer right
below it: what recipes share is written once. The overrides are read before the defaults are chosen, so that `--options
model.model_type=tiny` picks tiny's.
"""

import dataclasses
import logging
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stllm.common.errors import UserError, did_you_mean, nearest, unknown_name
from stllm.common.files import user_path, write_text
from stllm.common.logging import ONCE
from stllm.common.run_section import check_run, translate_run
from stllm.common.schema import (
    PRESETS,
    ROOTS,
    TEXTS,
    DatasetSettings,
    EvaluationSettings,
    ModelSettings,
    RunSettings,
    expected,
    field_fault,
    kinds_of,
    texts,
    typed,
)

log = logging.getLogger(__name__)

SECTIONS = ("model", "datasets", "run", "evaluation")
OPTIONS = "--options"  # the name of that layer
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as OmegaConf; the slow one refuses `[Which?]`
MAX_VALUES = 100_000  # of a YAML; a few lines of aliases can stand for more than memory holds
BASE = "base"  # top-level key of a YAML: the file below it
UNUSED_SECTIONS = {"preprocess": "images are prepared by model.image_size alone"}  # of published YAMLs
RUN_PATHS = ("deepspeed", "fsdp_config", "resume_from_checkpoint")  # output_dir is relative to where one stands
DATASET_PATHS = ("_root", "_path", "_dir")  # endings of the keys that hold paths
EVALUATION_PATHS = ("anno_path", "answers_path", "video_dir")
SHIPPED = Path(__file__).parent.parent / "configs" / "models"
DEFAULT_MODEL = "instructblip_vicuna0"
EMPTY: dict[str, Any] = {"datasets": {}, "run": {}}
SHOWN = 6  # keys in a sentence about changes


@dataclass
class Layer:
    """One source of settings: its name in messages, what its relative paths are relative to, its raw values."""

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
    """The checked, resolved configuration with sections `model`, `datasets` and `run` (empty where none is given).

    cfg_path: the user's YAML. options: overrides, `key=value` with dots in the key.
    model_type: which shipped defaults to use when neither YAML nor options say `model.model_type`.
    benchmark: there is a section `evaluation`, over the shipped settings of that benchmark. command_line: its keys that
        options of the command's own give, over everything else. checkpoint: its keys that the checkpoint decides, over
        the shipped settings and below the user's.

    Raises UserError, naming the file and the nearest known key or value: a file that is missing or no YAML, an
    unknown key or name, a value of a wrong type, an option without `=`, an environment variable that is not set.
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
    """The settings of one evaluation; arguments and errors as for `load_config`.

    A model that the YAML says nothing of is no error: the checkpoint says what it is.
    """
    cfg = load_config(
        cfg_path, options, DEFAULT_MODEL, benchmark=benchmark, command_line=command_line, checkpoint=checkpoint
    )
    return typing.cast(EvaluationSettings, OmegaConf.to_object(cfg.evaluation))


def model_settings(cfg: DictConfig) -> ModelSettings:
    """The `model` section as the typed dataclass."""
    return typing.cast(ModelSettings, OmegaConf.to_object(cfg.model))


def model_types() -> list[str]:
    """The names that `model.model_type` may have."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML, whole or not at all; `load_config` reads it back equal."""
    write_text(path, OmegaConf.to_yaml(cfg, resolve=True))


# ---- reading --------------------------------------------------------------------------------------------------------


def read_layers(cfg_path: str | Path | None, options: Sequence[str] = ()) -> list[Layer]:
    """Read what the user gives, lowest first, the options last; their keys are checked.

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
    """Read a YAML file after the file that its `base` names (relative to it), that one's base, and so on.

    Raises UserError as `yaml_layer` does, for a base that is no file, and for files that name each other in a circle.
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
    """The raw content of a YAML file. Raises UserError when it is missing, unreadable, or no mapping of keys."""
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
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not valid YAML ({first_line(error)})") from error
    except OSError as error:  # OmegaConf's word for a file that holds a bare value
        raise UserError(f"{path}: cannot be read as a configuration ({first_line(error)})") from error
    return Layer(str(path), file.absolute().parent, _mapping(values, str(path), "the file"))


def _num_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a YAML node holds once its aliases are written out, as OmegaConf writes them."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in inner)
    return known[id(node)]


def _check_layer(layer: Layer) -> None:
    """Checks the keys of one layer, and leaves out those without an effect, with a note."""
    for section in list(layer.values):
        if section in UNUSED_SECTIONS:
            log.info("%s: section %s has no effect: %s", layer.name, section, UNUSED_SECTIONS[section], extra=ONCE)
            del layer.values[section]
        elif section not in SECTIONS:
            hint = did_you_mean(section, {*SECTIONS, BASE} - {section})
            for home, schema in (("model", ModelSettings), ("run", RunSettings), ("evaluation", EvaluationSettings)):
                meant = nearest(section, [f.name for f in dataclasses.fields(schema)])
                hint = hint or (f"; did you mean '{home}.{meant}'?" if meant else "")
            raise UserError(f"{layer.name}: unknown section {section!r}, expected {', '.join(SECTIONS)}{hint}")
        elif layer.values[section] is None:  # `model:` with nothing under it
            del layer.values[section]
        else:
            layer.values[section] = _mapping(layer.values[section], layer.name, f"'{section}'")
    _check_keys(layer.values.get("model", {}), ModelSettings, "model", layer)
    _check_keys(layer.values.get("evaluation", {}), EvaluationSettings, "evaluation", layer)
    _check_datasets(layer)
    if layer.values.get("run"):
        layer.values["run"] = translate_run(layer.values["run"], layer.name)


def _check_datasets(layer: Layer) -> None:
    """The keys of each data set's entry; an entry without any has its defaults."""
    entries = layer.values.get("datasets", {})
    for name, entry in entries.items():
        if name not in ROOTS:
            if isinstance(entry, str):
                hint = did_you_mean(name, ROOTS)
                raise UserError(f"{layer.name}: 'datasets.{name}' must be a mapping of keys, found {entry!r}{hint}")
            entries[name] = _mapping({} if entry is None else entry, layer.name, f"'datasets.{name}'")
            _check_keys(entries[name], DatasetSettings, f"datasets.{name}", layer)
        elif not isinstance(entry, str):
            raise UserError(f"{layer.name}: 'datasets.{name}' must be the path of a folder, found {entry!r}")


def _check_keys(values: dict[str, Any], schema: type, prefix: str, layer: Layer) -> None:
    fields = {f.name: f for f in dataclasses.fields(schema)}
    types = typing.get_type_hints(schema)
    for key in list(values):
        dotted, value = f"{prefix}.{key}", values[key]
        if key not in fields:
            listed = "" if nearest(key, fields) else f"; known are {', '.join(sorted(fields))}"
            raise UserError(f"{layer.name}: unknown key {dotted!r}{did_you_mean(key, fields)}{listed}")
        if "unused" in fields[key].metadata:
            if value is not None:
                log.info("%s: %s has no effect: %s", layer.name, dotted, fields[key].metadata["unused"], extra=ONCE)
            del values[key]
        elif dataclasses.is_dataclass(types[key]) or typing.get_origin(types[key]) is dict:
            values[key] = _mapping({} if value is None else value, layer.name, f"'{dotted}'")
            if dataclasses.is_dataclass(types[key]):
                _check_keys(values[key], typing.cast(type, types[key]), dotted, layer)
        elif typing.get_origin(types[key]) is list and isinstance(value, dict):  # OmegaConf cannot merge the two
            raise UserError(f"{layer.name}: '{dotted}' must be a list, found {value!r}")


# ---- merging and values ---------------------------------------------------------------------------------------------


def merge_layers(
    given: Sequence[Layer],
    model_type: str | None = None,
    *,
    benchmark: str | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Merge the layers of `read_layers` over the shipped defaults, and check the values; see `load_config`."""
    layers = [_shipped_layer(SHIPPED, _model_type(given, model_type)), *given]
    schemas: dict[str, type] = {"model": ModelSettings}
    if benchmark is not None:
        own = Layer("the checkpoint", Path.cwd(), {"evaluation": dict(checkpoint or {})})
        layers[:0] = [_shipped_layer(PRESETS, benchmark), own]
        schemas["evaluation"] = EvaluationSettings
    cfg = OmegaConf.create({**{name: dataclasses.asdict(schema()) for name, schema in schemas.items()}, **EMPTY})
    for layer in layers:
        values = {name: section for name, section in layer.values.items() if name in cfg}
        kind = values.get("model", {}).get("llm", {}).get("model_type")
        if kind is not None and kind != cfg.model.llm.get("model_type"):
            cfg.model.llm = {}  # another architecture: the keys of the one below mean nothing to it
        cfg = typing.cast(DictConfig, OmegaConf.merge(cfg, values))
    plain = typing.cast(dict[str, dict[str, Any]], OmegaConf.to_container(_resolved(cfg, layers)))

    def where(key: str) -> str:
        return source_of(layers, key).name

    for section, schema in schemas.items():
        values = _converted(plain[section], schema, section, where)
        try:
            converted: Any = OmegaConf.merge(OmegaConf.structured(schema), values)
        except OmegaConfBaseException as error:  # an entry of a list, which `typed` does not look into
            key = f"{section}.{error.full_key}"
            raise UserError(f"{where(key.partition('[')[0])}: '{key}': {first_line(error)}") from error
        for f in dataclasses.fields(schema):
            if fault := field_fault(f, converted[f.name], f"{section}.{f.name}"):
                raise UserError(f"{where(f'{section}.{f.name}')}: {fault}")
        cfg[section] = converted
    if cfg.model.mask_rate_min > cfg.model.mask_rate_max:
        found = f"{cfg.model.mask_rate_min} and {cfg.model.mask_rate_max}"
        fault = f"'model.mask_rate_min' must not exceed 'model.mask_rate_max', found {found}"
        raise UserError(f"{where('model.mask_rate_min')}: {fault}")
    for name, entry in plain["datasets"].items():
        if name not in ROOTS:
            cfg.datasets[name] = check_entry(name, entry, where)
    _absolute_paths(cfg, layers)
    if any(layer.values.get("run") for layer in layers):
        cfg.run = check_run(typing.cast(dict[str, Any], OmegaConf.to_container(cfg.run)), where)
    return cfg


def check_entry(name: str, entry: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """Convert and check the values of a data set's entry; those that are null are left out.

    where: gives the file that a dotted key is in. Raises UserError for a value of a wrong type or out of range.
    """
    types = typing.get_type_hints(DatasetSettings)
    known = {f.name: f for f in dataclasses.fields(DatasetSettings)}
    result: dict[str, Any] = {}
    for key, value in entry.items():
        dotted = f"datasets.{name}.{key}"
        value = typed(value, types[key], dotted, where)
        if value is None:
            continue  # the shipped value or the default holds
        result[key] = value
        fault = field_fault(known[key], value, dotted)
        if key in TEXTS and not all(isinstance(text, str) for text in texts(value)):
            fault = f"'{dotted}' must be a text or a list of texts, found {value!r}"
        if fault:
            raise UserError(f"{where(dotted)}: {fault}")
    return result


def _converted(values: Mapping[str, Any], schema: type, prefix: str, where: Callable[[str], str]) -> dict[str, Any]:
    """Convert a section's values to the types of its schema. Raises UserError for one that cannot be converted."""
    result = {}
    for name, annotation in typing.get_type_hints(schema).items():
        value, key = values[name], f"{prefix}.{name}"
        if dataclasses.is_dataclass(annotation):
            result[name] = _converted(value, typing.cast(type, annotation), key, where)
            continue
        result[name] = typed(value, annotation, key, where)
        if result[name] is None and annotation is not Any and type(None) not in typing.get_args(annotation):
            raise UserError(f"{where(key)}: '{key}' must be {expected(*kinds_of(annotation))}, found {value!r}")
    return result


def _shipped_layer(folder: Path, name: str) -> Layer:
    layer = yaml_layer(folder / f"{name}.yaml")
    _check_layer(layer)
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


def source_of(layers: Sequence[Layer], dotted: str) -> Layer:
    """The last layer that sets the key."""
    for layer in reversed(layers):
        found: Any = layer.values
        for part in dotted.replace("[", ".").replace("]", "").split("."):
            if not isinstance(found, Mapping) or part not in found:
                break
            found = found[part]
        else:
            return layer
    return Layer("the defaults", Path.cwd(), {})


def _mapping(value: Any, source: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{source}: {what} must be a mapping of keys, found {value!r}")
    return {str(key): entry for key, entry in value.items()}


def first_line(error: BaseException) -> str:
    """A library's message cut to its first line: ours are one sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _resolved(cfg: Any, layers: Sequence[Layer]) -> DictConfig:
    """The configuration with every `${...}` replaced."""
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        key = error.full_key or next(_unresolvable(cfg), "")  # OmegaConf 2.3 does not tell the key
        layer = source_of(layers, key)
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


def _absolute_paths(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    """Make paths absolute that are relative to their YAML's folder; hub names and paths relative to here stay.

    A relative path is taken as relative to its YAML when it begins with a dot, or exists beside it.
    """
    keys = [f"model.{f.name}" for f in dataclasses.fields(ModelSettings) if "path" in f.metadata]
    keys += [f"run.{key}" for key in RUN_PATHS]
    keys += [f"evaluation.{key}" for key in EVALUATION_PATHS if "evaluation" in cfg]
    for name, entry in cfg.datasets.items():
        names = [f".{key!s}" for key in entry] if isinstance(entry, DictConfig) else [""]
        keys += [f"datasets.{name!s}{key}" for key in names if f"{name!s}{key}".endswith(DATASET_PATHS)]
    for key in keys:
        value, layer = OmegaConf.select(cfg, key), source_of(layers, key)
        if not isinstance(value, str):
            continue
        path = os.path.expanduser(value)
        beside = os.path.abspath(layer.folder / path)
        marked = value in (".", "..") or value.startswith(("./", "../"))
        if value and not os.path.isabs(path) and (marked or os.path.exists(beside)):
            path = beside
        optional = key.startswith("model.") and not value and key != "model.qformer_tokenizer"
        OmegaConf.update(cfg, key, None if optional else path)


# ---- comparing ------------------------------------------------------------------------------------------------------


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {
        dotted: value
        for key, entry in values.items()
        for dotted, value in flat(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def told_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """ "a.b was 1 and is now 2 (and 1 more: c)"; "" when nothing differs. A key that one side lacks is None there."""
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if not changed:
        return ""
    key = changed[0]
    more = f" (and {len(changed) - 1} more: {', '.join(changed[1:SHOWN])})" if len(changed) > 1 else ""
    return f"{key} was {old.get(key)!r} and is now {new.get(key)!r}{more}"
