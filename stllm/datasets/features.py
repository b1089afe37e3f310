"""Precomputed features of a data set: written in safetensors shards once, read in place of the media in training.

A folder holds `features-<rank>-<number>.safetensors`, one tensor a clip under the clip's key, and `index.json`, which
says what the features are and lists the keys. `distinct_clips` and `ClipDataset` give what is to be extracted: each
medium and part of it once, decoded in batches.
Letters: B clips of a batch, T frames, S the model's image size, P patches, C encoder width, K tokens a frame,
Q Q-Former width.
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

STAGES = ("vit", "qformer")  # (T, 1+P, C) of the frozen encoder; (T, K, Q) of a Q-Former that reads no text
INDEX = "index.json"
SHARD_BYTES = 2**30


def feature_key(record: Record, media_dir: str | Path) -> str:
    """The key of a record's features: its medium (or its own key) relative to the media folder, and its bounds."""
    assert record.media is not None  # text alone has no features
    folder = os.path.join(media_dir, "")
    return clip_key((record.key or record.media).removeprefix(folder), record.bounds)


def clip_key(media: str, bounds: Bounds | None) -> str:
    """`some/video.mp4`, or `some/video.mp4[2,7.5]` for a bounded part."""
    return media if bounds is None else f"{media}[{bounds[0]!r},{bounds[1]!r}]"


@runtime_checkable
class FeatureSource(Corpus, Protocol):
    """A data set of the mixture whose media can be precomputed.

    features: what is read in place of the media, if anything. frame_settings: which frames make a clip's features.
    """

    features: "FeatureStore | None"

    @property
    def frame_settings(self) -> dict[str, Any]: ...

    def key_of(self, index: int) -> str:
        """The key of the features of a sample's medium. Raises MediaError or AnnotationError."""
        ...


class FeatureWriter:
    """A writer of features, shard by shard. Each shard is written whole or not at all, so an interrupted run goes on.

    stage: "vit" or "qformer". settings: what the features depend on (a digest of the weights, frames, sampling, image
        size, dtype), as plain JSON. rank: of this process; each writes shards of its own, and begins before any of
        them writes.
    Raises UserError when the folder holds features made with other settings.
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
            for partial in self.folder.glob(".features-*.partial"):  # of a process that was killed while it wrote
                partial.unlink()
            write_text(self.folder / INDEX, json.dumps({**self.header, "complete": False}))

    def __contains__(self, key: str) -> bool:
        """Check whether these features are there already, written or waiting to be."""
        return key in self._done or key in self._waiting

    @property
    def num_clips(self) -> int:
        """The number of clips whose features are there already, written by any process or waiting to be."""
        return len(self._done) + len(self._waiting)

    def add(self, key: str, features: Tensor) -> None:
        """features: (T, 1+P, C) or (T, K, Q), of any dtype, which is kept. Writes a shard when enough are waiting."""
        self._waiting[key] = features.detach().cpu().contiguous()
        self._waiting_bytes += features.nbytes
        if self._waiting_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard."""
        if not self._waiting:
            return
        taken = [int(path.stem.rsplit("-", 1)[1]) for path in self.folder.glob(f"features-{self.rank:05d}-*")]
        number = max(taken, default=-1) + 1
        with replacing(self.folder / f"features-{self.rank:05d}-{number:05d}.safetensors") as partial:
            save_file(self._waiting, partial)
        self._done.update(self._waiting)
        self._waiting, self._waiting_bytes = {}, 0

    def finish(self) -> None:
        """Write the index over all shards of all ranks. Call it on one process, when every one has flushed."""
        self.flush()
        write_text(self.folder / INDEX, json.dumps({**self.header, "complete": True, "shards": _shards(self.folder)}))


class FeatureStore:
    """A finished folder of features, to be read.

    expected: what the settings must say, as far as they are given here. stage, settings: what the folder holds.
    Raises UserError for a folder without features, unfinished ones, and settings other than expected.
    """

    def __init__(self, folder: str | Path, *, expected: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder, expected or {})
        self.stage: str = index["stage"]
        self.settings: dict[str, Any] = index["settings"]
        if not index["complete"]:
            raise UserError(f"{self.folder}: the features are not complete: run the same `stllm extract` again")
        self._shards = list(index["shards"])
        # Sorted digests, not a dict of millions of texts, which every worker would come to copy.
        digests = np.array([_digest(key) for keys in index["shards"].values() for key in keys], np.uint64)
        shards = np.repeat(np.arange(len(self._shards)), [len(keys) for keys in index["shards"].values()])
        order = digests.argsort()
        self._digests, self._shard_of = digests[order], shards[order]

    def __len__(self) -> int:
        return len(self._digests)

    def load(self, key: str) -> Tensor:
        """The features of a clip, (T, 1+P, C) or (T, K, Q), as they were written. Raises MediaError."""
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
        """Put the features of a clip into the field that the model reads. Raises MediaError."""
        if self.stage == "vit":
            sample.vision_features = self.load(key)
        else:
            sample.query_features = self.load(key)


@lru_cache(maxsize=64)
def _opened(shard: Path, changed: int) -> Any:
    """An open shard. Its header lists every clip: reading it for each clip took 16 ms with 20,000 clips.

    changed: the time of the file's last change, so that a replaced shard is opened anew.
    """
    return safe_open(shard, framework="pt")


def _digest(key: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))


def _read_index(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The index of a folder. Raises UserError when there is none, and for settings other than expected."""
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
    """The keys in each finished shard."""
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
    """The number of its data set, a sample that shows it, and what its features are stored under."""

    corpus: int
    sample: int
    key: str


class ClipBatch(NamedTuple):
    """Clips of one data set and their frames, (B, T, 3, S, S), None without a clip; and what could not be read."""

    clips: list[DistinctClip]
    pixel_values: Tensor | None
    failures: list[Failure]


def distinct_clips(corpus: FeatureSource, number: int, *, done: FeatureWriter) -> Iterator[DistinctClip | None]:
    """For each sample the clip that it shows, where it is a new one; else None. done: what need not be made again.

    A sample whose record cannot be used shows none: training counts it.
    """
    seen: set[str] = set()
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
    """Batches of clips by number; every batch is of one data set, so that its clips have equal shapes.

    corpora: prepared as for evaluation, nothing random in them. media_seconds: the limit on reading a clip; 0: none.
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
        """A decoded batch; clips that cannot be read are listed in `failures`."""
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
