"""Precomputed features of a data set, which training reads in place of the media.

A folder holds shards `features-<rank>-<number>.safetensors`, with one tensor per clip under the clip's key, and
`index.json`, which describes the features and lists the keys. `distinct_clips` lists the clips to extract, each once,
and `ClipDataset` decodes them in batches.
Letters in shapes: B clips of a batch, T frames, S image size, P patches, C encoder width, K tokens per frame, Q
Q-Former width.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from stllm.common.errors import UserError
from stllm.common.files import check_regular, replacing, write_text
from stllm.common.jsonl import loads
from stllm.datasets.annotations import AnnotationError, Record
from stllm.datasets.samples import Corpus, Failure, Sample, SampleKey, failure_of, load_within
from stllm.media.info import MediaError
from stllm.media.sampling import Bounds
from stllm.media.time_bound import now_reading

# vit: (T, 1+P, C), the output of the frozen encoder; qformer: (T, K, Q), that of a Q-Former that reads no text
STAGES = ("vit", "qformer")
INDEX = "index.json"
SHARD_BYTES = 2**30


def feature_key(record: Record, media_dir: str | Path) -> str:
    """Return the key of a record's features: its medium (or `record.key`) relative to the media folder, and bounds."""
    assert record.media is not None  # a text-only record has no features
    folder = os.path.join(media_dir, "")
    return clip_key((record.key or record.media).removeprefix(folder), record.bounds)


def clip_key(media: str, bounds: Bounds | None) -> str:
    """Return `some/video.mp4`, or `some/video.mp4[2,7.5]` for a part of a video. bounds: start and end in seconds."""
    return media if bounds is None else f"{media}[{bounds[0]!r},{bounds[1]!r}]"


@runtime_checkable
class FeatureSource(Corpus, Protocol):
    """A data set whose features can be precomputed.

    features: the features that replace the media, if any. frame_settings: the settings that choose a clip's frames.
    """

    features: "FeatureStore | None"

    @property
    def frame_settings(self) -> dict[str, Any]: ...

    def key_of(self, index: int) -> str:
        """Return the key under which a sample's features are stored. Raises MediaError or AnnotationError."""
        ...


class FeatureWriter:
    """A writer of features in shards. No shard is written in part, so an interrupted extraction can continue.

    stage: "vit" or "qformer". settings: what the features depend on (a digest of the weights, frames, sampling, image
        size, dtype), as plain JSON. rank: rank of this process. Each process writes its own shards; all writers must be
        made before the first one writes. shard_bytes: size at which a shard is written.
    Raises UserError if the folder holds features with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        stage: str,
        settings: Mapping[str, Any],
        rank: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        assert stage in STAGES
        self.folder, self.rank, self.shard_bytes = Path(folder), rank, shard_bytes
        self.header: dict[str, Any] = {"stage": stage, "settings": dict(settings)}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).exists():
            _read_index(self.folder, {**settings, "stage": stage})
        self._done = {key for keys in _shards(self.folder).values() for key in keys}
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        if rank == 0:
            for partial in self.folder.glob(".features-*.partial"):  # left by a process that was killed
                partial.unlink()
            write_text(self.folder / INDEX, json.dumps({**self.header, "complete": False}))

    def __contains__(self, key: str) -> bool:
        """Check whether the features of this key exist, in a shard or waiting to be written."""
        return key in self._done or key in self._waiting

    @property
    def num_clips(self) -> int:
        """The number of clips with features, in the shards found at the start or made by this process."""
        return len(self._done) + len(self._waiting)

    def add(self, key: str, features: Tensor) -> None:
        """Add the features of a clip, (T, 1+P, C) or (T, K, Q). Their dtype is kept. Full shards are written."""
        self._waiting[key] = features.detach().cpu().contiguous()
        self._waiting_bytes += features.nbytes
        if self._waiting_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the waiting features as a shard."""
        if not self._waiting:
            return
        taken = [int(path.stem.rsplit("-", 1)[1]) for path in self.folder.glob(f"features-{self.rank:05d}-*")]
        number = max(taken, default=-1) + 1
        with replacing(self.folder / f"features-{self.rank:05d}-{number:05d}.safetensors") as partial:
            save_file(self._waiting, partial)
        self._done.update(self._waiting)
        self._waiting, self._waiting_bytes = {}, 0

    def finish(self) -> None:
        """Write the index of the shards of all ranks. Call it on one process, after all processes called `flush`."""
        self.flush()
        write_text(self.folder / INDEX, json.dumps({**self.header, "complete": True, "shards": _shards(self.folder)}))


class FeatureStore:
    """A reader of a folder of features.

    expected: settings that the features must have. stage, settings: those of the folder.
    Raises UserError if the folder has no features, is incomplete, or has other settings.
    """

    def __init__(self, folder: str | Path, *, expected: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder, expected or {})
        self.stage: str = index["stage"]
        self.settings: dict[str, Any] = index["settings"]
        if not index["complete"]:
            raise UserError(f"{self.folder}: the features are not complete: run the same `stllm extract` again")
        self._shards = list(index["shards"])
        # Sorted digests: a dict of millions of texts would be copied into every worker.
        digests = np.array([_digest(key) for keys in index["shards"].values() for key in keys], np.uint64)
        shards = np.repeat(np.arange(len(self._shards)), [len(keys) for keys in index["shards"].values()])
        order = digests.argsort()
        self._digests, self._shard_of = digests[order], shards[order]

    def __len__(self) -> int:
        return len(self._digests)

    def load(self, key: str) -> Tensor:
        """Read the features of a clip, (T, 1+P, C) or (T, K, Q), in the dtype in which they were written.

        Raises MediaError if the folder has none for this key, or if the shard is damaged or missing.
        """
        place = int(np.searchsorted(self._digests, _digest(key)))
        if place == len(self) or self._digests[place] != _digest(key):
            raise MediaError(f"{self.folder}: found no features of {key}; run `stllm extract` again", cause="missing")
        shard = self.folder / self._shards[self._shard_of[place]]
        now_reading(shard)
        try:
            features: Tensor = _opened(shard, shard.stat().st_mtime_ns).get_tensor(key)
            return features
        except FileNotFoundError:
            raise MediaError(f"{shard}: the shard is gone; run `stllm extract` again", cause="missing") from None
        except (OSError, SafetensorError) as error:
            raise MediaError(f"{shard}: the shard is damaged ({error}); delete it and extract again") from error

    def fill(self, sample: Sample, key: str) -> None:
        """Set `vision_features` or `query_features` of a sample, depending on the stage. Raises MediaError."""
        if self.stage == "vit":
            sample.vision_features = self.load(key)
        else:
            sample.query_features = self.load(key)


@lru_cache(maxsize=64)
def _opened(shard: Path, changed: int) -> Any:
    """Open a shard and keep it open: its header lists every clip, and reading it took 16 ms with 20,000 clips.

    changed: modification time of the file, so that a replaced shard is opened again.
    """
    return safe_open(shard, framework="pt")


def _digest(key: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))


def _read_index(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read the index of a folder. Raises UserError if it is missing or damaged, or has settings other than expected."""
    check_regular(folder, "a folder of features")
    try:
        index: dict[str, Any] = loads((folder / INDEX).read_text(encoding="utf-8"))
        found = {**index["settings"], "stage": index["stage"]}
        for shard, keys in {**index["shards"]}.items() if index["complete"] else ():
            if not all(isinstance(name, str) for name in (shard, *keys)):
                raise TypeError(f"in shard {shard}")
    except FileNotFoundError:
        raise UserError(f"{folder}: found no features (no {INDEX}); write them with `stllm extract`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        sentence = f"{folder / INDEX}: the index is damaged ({error!r}); delete the folder, extract again"
        raise UserError(sentence) from None
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}: the features there were made with {key} {found.get(key)!r}, expected {value!r}: name "
                "another folder, or change the setting back"
            )
    return index


def _shards(folder: Path) -> dict[str, list[str]]:
    """List the keys of each shard in a folder. Raises UserError for a damaged shard."""
    keys = {}
    shard = folder
    try:
        for shard in sorted(folder.glob("features-*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                keys[shard.name] = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{shard}: the shard is damaged ({error}); delete it and extract again") from error
    return keys


class DistinctClip(NamedTuple):
    """A clip to extract. corpus: number of its data set; sample: index of a sample that shows it; key: feature key."""

    corpus: int
    sample: int
    key: str


class ClipBatch(NamedTuple):
    """Clips of one data set. pixel_values: (B, T, 3, S, S), or None if no clip could be read. failures: the others."""

    clips: list[DistinctClip]
    pixel_values: Tensor | None
    failures: list[Failure]


def distinct_clips(
    corpus: FeatureSource, number: int, *, done: FeatureWriter, seen: set[str]
) -> Iterator[DistinctClip | None]:
    """Yield for each sample its clip, or None if an earlier sample has the same clip.

    A sample whose record cannot be used also gives None; training will count it. number: number of the data set. done:
    the writer of features; clips whose features it already has also give None. seen: keys of earlier data sets of this
    writer; those of this data set are added.
    """
    for sample in range(len(corpus)):
        try:
            key = corpus.key_of(sample)
        except (AnnotationError, MediaError):
            yield None
            continue
        new = key not in seen and key not in done
        seen.add(key)
        yield DistinctClip(number, sample, key) if new else None


class ClipDataset(Dataset[ClipBatch]):
    """Batches of decoded clips. The clips of a batch come from one data set, so they have equal shapes.

    corpora: data sets without random choices, as for evaluation. media_seconds: time limit in seconds for reading one
    clip; 0: no limit.
    """

    def __init__(
        self, corpora: Sequence[Corpus], clips: Sequence[DistinctClip], *, batch_size: int, media_seconds: float
    ) -> None:
        self.corpora, self.media_seconds = corpora, media_seconds
        self.batches: list[Sequence[DistinctClip]] = []
        for _, group in groupby(clips, key=lambda clip: clip.corpus):
            same = list(group)
            self.batches += [same[first : first + batch_size] for first in range(0, len(same), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> ClipBatch:
        """Decode a batch. Clips that cannot be read are listed in `failures`."""
        read, frames, failures = [], [], []
        for clip in self.batches[number]:
            corpus = self.corpora[clip.corpus]
            try:
                key, generator = SampleKey(0, 0, clip.corpus, clip.sample), np.random.default_rng(0)
                sample = load_within(self.media_seconds, corpus, key, generator, setting="--media-seconds")
            except (MediaError, AnnotationError) as error:
                failures.append(failure_of(corpus.name, error))
                continue
            assert sample.pixel_values is not None  # the data sets were built without features
            read.append(clip)
            frames.append(sample.pixel_values)
        return ClipBatch(read, torch.stack(frames) if frames else None, failures)
