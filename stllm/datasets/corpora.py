"""Build the data sets of the `datasets` section: shipped ones by name (configs/datasets/), the user's own by files."""

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from stllm.common.distributed import is_main
from stllm.common.errors import UserError, did_you_mean
from stllm.common.registry import datasets, readers
from stllm.common.schema import ROOTS, DatasetSettings, texts
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.features import FeatureSource, FeatureStore
from stllm.datasets.mixture import MixturePart
from stllm.datasets.samples import Corpus
from stllm.media.info import MediaError
from stllm.media.sampling import sample_indices
from stllm.processors.transforms import EvalTransform, TrainTransform

SHIPPED = Path(__file__).parent.parent / "configs" / "datasets"


def build_corpora(
    cfg: DictConfig,
    *,
    image_size: int,
    train: bool = True,
    split: str | None = None,
    feature_settings: Mapping[str, Any] | None = None,
) -> list[MixturePart]:
    """Build the data sets that a checked configuration lists, with their weights, for a `Mixture`.

    image_size: height and width of the prepared frames, in pixels.
    train: True uses the crop of each entry. False uses centre crops, and the middle frame of an interval where training
        draws a random frame.
    split: "train" excludes the held-out samples; "val" gives only these (the list may be empty); None gives all.
    feature_settings: settings that precomputed features (`features_dir`) must have, beside image size and frames.
    Raises UserError if no data set is listed, for an unknown name without files, for missing files (all are listed),
    and for a file that cannot be used.
    """
    entries = resolved_settings(cfg, train=train)
    if split is not None:
        entries = {name: e for name, e in entries.items() if e.split == split or (split == "val" and e.val_fraction)}
        if split == "train" and not entries:
            raise UserError("every data set has split: val, so there is nothing to learn: leave it out of one at least")
    missing: dict[str, list[str]] = {}
    for name, settings in entries.items():
        reads_media = settings.type == "instruction" and settings.media != "text" and settings.features_dir is None
        for path in (settings.anno_path, settings.media_dir if reads_media else None):
            if path and not os.path.exists(path):
                missing.setdefault(path, []).append(name)
    if missing:
        listed = "; ".join(f"{path} ({', '.join(names)})" for path, names in missing.items())
        raise UserError(
            f"not found: {listed}; expected the annotation files and media folders of the data sets: set "
            "datasets.anno_root and datasets.media_root, or anno_path and media_dir of a data set"
        )
    transforms = {"random": TrainTransform(image_size), "center": EvalTransform(image_size)}
    expected = {"image_size": image_size, **(feature_settings or {})}
    sources = []
    # Reading millions of records takes a while.
    hidden = None if is_main() else True  # None: tqdm shows no bar if the output is not a terminal
    for name, settings in tqdm(entries.items(), desc="data sets", delay=1, leave=False, disable=hidden):
        transform = transforms[settings.crop if train else "center"]
        corpus = datasets.get(settings.type).from_settings(name, settings, transform=transform)
        if settings.features_dir is not None and corpus.media is not None and isinstance(corpus, FeatureSource):
            corpus.features = FeatureStore(settings.features_dir, expected={**expected, **corpus.frame_settings})
        indices = None
        if split is not None and settings.split == "train" and settings.val_fraction:
            held = held_out(corpus, settings.val_fraction)
            indices = np.flatnonzero(held if split == "val" else ~held)
        sources.append(MixturePart(corpus, settings.sample_ratio, indices))
    return sources


def held_out(corpus: Corpus, fraction: float) -> np.ndarray:
    """Choose the held-out samples: all samples of a fraction of the media (at least one medium). Returns (n,) bool.

    The choice depends only on the names of the media, so every run makes the same one. Text-only samples are chosen by
    their index. Raises UserError for a data set with a single medium.
    """

    def medium(index: int) -> str:
        if corpus.media is None or not isinstance(corpus, FeatureSource):
            return str(index)
        try:
            key = corpus.key_of(index)
        except (MediaError, AnnotationError):
            return str(index)  # this sample cannot be used
        return key.rpartition("[")[0] if key.endswith("]") else key  # the same name for all parts of a video

    names = [medium(index) for index in range(len(corpus))]
    order = sorted(set(names), key=lambda name: hashlib.blake2b(f"{corpus.name} {name}".encode()).digest())
    if len(order) < 2:
        raise UserError(
            f"data set {corpus.name}: val_fraction is {fraction}, but there is only one medium: leave val_fraction "
            "out, or add another entry with split: val"
        )
    chosen = set(order[: max(1, round(fraction * len(order)))])
    return np.array([name in chosen for name in names], dtype=bool)


def resolved_settings(cfg: DictConfig, *, train: bool = True) -> dict[str, DatasetSettings]:
    """Return each data set's settings: the shipped defaults of its name, overridden by the user's.

    Relative paths are joined to the root folders of the section (`ROOTS`). Raises UserError if no data set is listed,
    for an unknown name without files, for an unknown sampling rule, and for a reader that is unknown or not installed.
    """
    section = cast(dict[str, Any], OmegaConf.to_container(cfg.datasets, resolve=True))
    roots = {root: section.pop(root, None) for root in ROOTS}
    known = shipped_entries()
    if not section:
        raise UserError(f"no data set is named: list at least one under `datasets`, of {', '.join(known)}")
    result = {}
    for name, entry in section.items():
        entry = entry or {}
        if name not in known and not any(entry.get(key) for key in ("anno_path", "shards")):
            raise UserError(
                f"unknown data set {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}; a data set of "
                "your own needs anno_path (an annotation file) or shards"
            )
        settings = result[name] = DatasetSettings(**{**known.get(name, {}), **entry})
        try:
            sample_indices(settings.sampling, num_frames=1, total_frames=1, fps=1.0, generator=np.random.default_rng(0))
            if settings.reader != "auto":
                getattr(readers.get(settings.reader), "check_installed", lambda: None)()
        except UserError as error:
            raise UserError(f"data set {name}: {error}") from None
        settings.qa_sampling = settings.qa_sampling or cfg.run.get("qa_sampling")
        if not train and settings.sampling == "rand":
            settings.sampling = "middle"
        media_root = settings.media_root or roots["media_root"]
        settings.anno_path = _joined(settings.anno_root or roots["anno_root"], settings.anno_path)
        beside = os.path.dirname(settings.anno_path or "")  # default media folder: that of the annotation file
        settings.media_dir = _joined(media_root, settings.media_dir) or media_root or beside
        settings.shards = [_joined(media_root, shard) for shard in texts(settings.shards)]
        if roots["features_root"] is not None and settings.features_dir is None:
            settings.features_dir = os.path.join(roots["features_root"], settings.features_of or name)
    return result


@cache
def shipped_entries() -> dict[str, dict[str, Any]]:
    """Read the entries of the shipped data sets, by name."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(SHIPPED.glob("*.yaml")):
        entries.update(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))))
    return entries


def _joined(root: str | None, path: str | None) -> str | None:
    """Join a path to the root. An absolute path and a URL stay unchanged, as does any path without a root."""
    if path is None or "://" in path or path.startswith("pipe:"):
        return path
    return os.path.join(os.path.expanduser(root or ""), os.path.expanduser(path))
