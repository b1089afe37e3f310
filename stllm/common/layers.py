"""One source of settings, a YAML file or `--options`: read, and its keys checked, before anything is merged.

Each layer keeps its name, so that a message can say where a mistake stands. A YAML may stand on another one, its
`base`: what recipes share is written once.
"""

import dataclasses
import logging
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stllm.common.datasets_section import ROOTS, DatasetSettings
from stllm.common.errors import UserError, did_you_mean, nearest
from stllm.common.evaluation_section import EvaluationSettings
from stllm.common.files import user_path
from stllm.common.logging import ONCE
from stllm.common.run_section import translate_run
from stllm.common.schema import ModelSettings, RunSettings

log = logging.getLogger(__name__)

SECTIONS = ("model", "datasets", "run", "evaluation")
OPTIONS = "--options"  # the name of that layer
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as OmegaConf; the slow one refuses `[Which?]`
MAX_VALUES = 100_000  # of a YAML; a few lines of aliases can stand for more than memory holds
BASE = "base"  # top-level key of a YAML: the file below it
UNUSED_SECTIONS = {"preprocess": "images are prepared by model.image_size alone"}  # of published YAMLs


@dataclass
class Layer:
    """One source of settings: its name in messages, what its relative paths are relative to, its raw values."""

    name: str
    folder: Path
    values: dict[str, Any]


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


def yaml_layers(path: str | Path) -> list[Layer]:
    """A YAML file after the file that its `base` names (relative to the file it stands in), that one's base, and so on.

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


def options_layer(options: Sequence[str]) -> Layer:
    """The raw values of `key=value` overrides. Raises UserError for one without `=` or whose value is no YAML."""
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UserError(f"--options: found {option!r}, expected key=value, e.g. model.video_input=residual")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(list(options)))
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"--options: {' '.join(options)!r} has a value that is not valid YAML") from error
    return Layer(OPTIONS, Path.cwd(), typing.cast(dict[str, Any], values))


def check_layer(layer: Layer) -> None:
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
