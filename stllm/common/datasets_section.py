"""The keys of `datasets`: one entry a data set, and two roots set once for all.

datasets:
  anno_root: /data/videochat2_it        # what annotation files are relative to
  media_root: ${oc.env:MEDIA_ROOT}      # what media folders are relative to
  caption_videochat: {num_frames: 64}   # a known data set (configs/datasets/), its defaults overridden
  mine: {anno_path: mine.jsonl, media_dir: videos}
"""

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from stllm.common.errors import UserError
from stllm.common.run_section import typed
from stllm.common.schema import field_fault

TEXTS = ("instruction", "shards")  # keys that take a text or a list
_PROCESSORS = "images are prepared by model.image_size, texts by model.template"
ROOTS = ("anno_root", "media_root", "features_root")  # texts directly under `datasets`


def _at_least(default: int | float | None, low: float) -> Any:
    return field(default=default, metadata={"low": low})


def _one_of(default: str | None, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass
class DatasetSettings:
    """One data set's entry; unset keys (None) are the shipped ones of a known name."""

    type: str = "instruction"  # how it is read, by its registered name (instruction, image_text)
    media: str | None = _one_of(None, "video", "image", "text")  # unset: what the annotation file names
    sample_ratio: float | None = _at_least(None, 0)  # its weight in the mixture; unset: its share of all samples
    instruction: Any = None  # a text, or a list to draw from, for records without one
    max_samples: int | None = _at_least(None, 1)  # use the first ones only

    # Files; a relative path is relative to the roots (a path that exists beside the YAML comes first)
    anno_path: str | None = None  # annotation file
    anno_root: str | None = None
    media_dir: str | None = None  # folder of the media that the annotation file names
    media_root: str | None = None
    features_dir: str | None = None  # precomputed features in place of the media (stllm extract); frames as there
    shards: Any = None  # image_text: tar files, URLs, braces, globs; a text or a list
    cache_dir: str | None = None  # image_text: where indexes and fetched shards are kept
    cache_gb: float | None = _at_least(None, 0)  # image_text: the most that fetched shards may take

    # Frames
    num_frames: int = _at_least(16, 1)  # frames of every clip; a shorter one is padded with its last frame
    sampling: str = "rand"  # which frames: rand, middle, uniform or fps<x>
    crop: str = _one_of("random", "random", "center")  # of a clip in training; center: as in evaluation
    fps: float | None = _at_least(None, 1e-3)  # of raw-frame folders and gifs
    reader: str = "auto"  # what decodes videos: auto, pyav or decord

    # Questions and answers
    qa_sampling: str | None = _one_of(None, "one", "all")  # unset: run.qa_sampling
    multi_turn: bool = False  # a record's pairs as one conversation, not a sample each

    # Keys of LAVIS without an effect here
    vis_processor: Any = field(default=None, metadata={"unused": _PROCESSORS})
    text_processor: Any = field(default=None, metadata={"unused": _PROCESSORS})


def check_entry(name: str, entry: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """An entry's values converted and checked, those that are null left out; its keys are known already (layers.py).

    where: gives the file that a dotted key is in. Raises UserError for a value of a wrong type or out of range.
    """
    types = typing.get_type_hints(DatasetSettings)
    known = {f.name: f for f in fields(DatasetSettings)}
    result: dict[str, Any] = {}
    for key, value in entry.items():
        dotted = f"datasets.{name}.{key}"
        value = typed(value, types[key], dotted, where)
        if value is None:
            continue  # the shipped value or the default holds
        result[key] = value
        fault = field_fault(known[key], result[key], dotted)
        if key in TEXTS and not all(isinstance(text, str) for text in texts(value)):
            fault = f"'{dotted}' must be a text or a list of texts, found {value!r}"
        if fault:
            raise UserError(f"{where(dotted)}: {fault}")
    return result


def texts(value: Any) -> tuple[Any, ...]:
    """A key that takes a text or a list of them, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
