"""`stllm doctor --overlap`: finds test clips of a benchmark in the training data, by three signs.

    name     equal file name, ignoring extension and case (weak evidence, because short names recur)
    content  equal bytes of the file
    frames   similar perceptual hashes (imagehash.phash, 64 bits) of frames spread over the clip; they hardly change
             when a video is encoded or scaled again

Frames of a single colour are left out, because they all have the same hash. A test clip is found by its frames if at
least half of its other frames, and at least two, differ from a frame of a training clip by a few bits at most.
Training clips may also be in tars (`shards`).
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stllm.common.config import load_config
from stllm.common.distributed import mapping, one_a_core
from stllm.common.errors import UserError
from stllm.common.schema import MEDIA_SECONDS, DatasetSettings, EvaluationSettings, texts
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.corpora import resolved_settings
from stllm.datasets.faults import Fault, Medium
from stllm.datasets.shards.reader import ShardClips
from stllm.datasets.video_text import ShardRecords
from stllm.doctor.checks import training_findings
from stllm.evaluation.benchmarks.base import load_benchmark
from stllm.media.info import MediaError, Member
from stllm.media.open import open_media
from stllm.media.sampling import sample_indices
from stllm.media.time_bound import keep_reading, read_within

NUM_FRAMES = 8  # frames hashed per clip
NEAR = 6  # bits, of 64, by which two hashes of the same picture may differ
SHARE, LEAST = 0.5, 2  # share and number of a test clip's frames that must be found in a training clip
PLAIN = 6.0  # a frame whose grey levels have a smaller standard deviation counts as a single colour
MAX_WORKERS = 8
SHOWN = 20
BITS = np.array([bin(value).count("1") for value in range(256)], np.uint8)

Clip = tuple[str, "tuple[float, float] | None"]  # a file, and its part as (start, end) in seconds
InTar = Callable[[], Member]  # opens a clip in a tar; picklable


@dataclass
class Found:
    """A test clip. items: ids of the benchmark's items about it. train: sign -> matching training files."""

    video: str
    items: list[str]
    train: dict[str, list[str]] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Run the check, and return the exit code: 1 if a test clip was found in the training data. Raises UserError."""
    report = overlap(args)
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        for note in report["notes"]:
            print(note)
        for one in report["found"] if args.all else report["found"][:SHOWN]:
            signs = "; ".join(f"{sign}: {', '.join(paths[:3])}" for sign, paths in one["train"].items())
            print(f"  {one['video']} ({', '.join(one['items'][:3])}): {signs}")
        if not args.all and len(report["found"]) > SHOWN:
            print(f"  ... and {len(report['found']) - SHOWN} more (--all lists them)")
    counts = f"{report['num_test']} test clips and {report['num_train']} training clips"
    if not report["found"]:
        if not args.json:
            print(f"no overlap found between {counts}")
        return 0
    sys.stdout.flush()
    print(f"found {len(report['found'])} test clips in the training data, between {counts}", file=sys.stderr)
    return 1


def overlap(args: argparse.Namespace) -> dict[str, Any]:
    """Return `found` (fields of `Found` per clip), `num_test`, `num_train`, and `notes` on what was not compared."""
    notes: list[str] = []
    train: dict[Clip, InTar | None] = {}
    corpora = resolved_settings(load_config(args.overlap, args.options, model_type="instructblip_vicuna0"))
    for name, corpus in corpora.items():
        found = _training_clips(name, corpus, notes)
        train |= tqdm(found, desc=name, unit=" records", disable=None, delay=1, leave=False)
    if not train:
        why = notes[0] if notes else "name the training configuration"
        raise UserError(f"{args.overlap}: found no video in its data sets: {why}")
    in_tars = {path: member for (path, _), member in train.items() if member is not None}
    asked = {"anno_path": args.anno_path, "answers_path": args.answers_path, "video_dir": args.video_dir}
    loaded = load_benchmark(args.benchmark, EvaluationSettings(**asked, sampling="segment", num_frames=1))
    test: dict[Clip, Found] = {}
    for item in loaded.items:
        if item.media is not None:
            clip = os.path.normpath(item.media.path), item.media.bounds
            test.setdefault(clip, Found(item.video, [])).items.append(item.id)
    if missing := [item.error for item in loaded.items if item.media is None]:
        notes.append(f"{len(missing)} items of {args.benchmark} have no medium to compare ({missing[0]})")
    if absent := [path for path, _ in train if path not in in_tars and not os.path.exists(path)]:
        notes.append(f"{len(absent)} training clips are not there ({absent[0]}): only their names were compared")
    by_stem: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for path, _ in train):
        by_stem.setdefault(_stem(path), []).append(path)
    same = _same_content([path for path, _ in train], [path for path, _ in test], in_tars)
    for (path, _), one in test.items():
        signs = {"name": by_stem.get(_stem(path)), "content": same.get(path)}
        one.train |= {sign: paths for sign, paths in signs.items() if paths}
    if find_spec("imagehash") is None:
        notes.append("frames were not compared, as imagehash is not installed: pip install 'stllm[overlap]'")
    else:
        notes += _by_frames(train, test, args)
    return {
        "found": [vars(one) for one in test.values() if one.train],
        "num_test": len(test),
        "num_train": len(train),
        "notes": notes,
    }


def _training_clips(name: str, corpus: DatasetSettings, notes: list[str]) -> Iterator[tuple[Clip, InTar | None]]:
    """Yield the clips of a data set, and how to open those in tars. Add to `notes` what cannot be compared."""
    if corpus.type == "video_text":
        records = ShardRecords(name, texts(corpus.shards), cache_dir=corpus.cache_dir, cache_gb=corpus.cache_gb)
        unusable: list[Exception] = []
        for index in range(len(records)):
            try:
                record = records[index]
            except (AnnotationError, MediaError) as error:
                unusable.append(error)
                continue
            assert record.media is not None and record.member is not None
            shard, member = records.samples.place(index)[0], record.member
            yield (record.media, record.bounds), partial(records.samples.reader.clip, shard, member.start, member.size)
        if unusable:
            notes.append(f"{name}: {len(unusable)} samples cannot be used ({unusable[0]})")
        return
    if corpus.anno_path is None:
        return
    clips = ShardClips.of(name, corpus) if corpus.shards else None
    for finding in training_findings(corpus, lambda sample, num_frames: None):
        if isinstance(finding, Medium) and finding.expects == "video":
            path = os.path.normpath(os.path.join(corpus.media_dir or "", finding.name))
            opened: InTar | None = None
            if clips is not None:
                with suppress(MediaError):  # not in the tars: absent
                    shard, offset, size = clips.place(finding.name)
                    path, opened = f"{shard}/{finding.name}", partial(clips.reader.clip, shard, offset, size)
            yield (path, finding.bounds), opened
        elif isinstance(finding, Fault) and finding.kind == "annotation":
            notes.append(f"{name}: {finding.in_words}")


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0].lower()


def _same_content(train: Sequence[str], test: Sequence[str], in_tars: dict[str, InTar]) -> dict[str, list[str]]:
    """Return test file -> training files with equal content. Only files with equal sizes are read."""

    def opened(path: str) -> Path | Member:
        return in_tars[path]() if path in in_tars else Path(path)

    def by_size(paths: Iterable[str]) -> dict[int, list[str]]:
        sizes: dict[int, list[str]] = {}
        for path in dict.fromkeys(paths):
            if path in in_tars or os.path.isfile(path):
                sizes.setdefault(opened(path).stat().st_size, []).append(path)
        return sizes

    def digest(path: str) -> bytes:
        content = hashlib.blake2b()
        with opened(path).open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        return content.digest()

    ours, theirs = by_size(test), by_size(train)
    found: dict[str, list[str]] = {}
    for size in ours.keys() & theirs.keys():
        known: dict[bytes, list[str]] = {}
        for path in theirs[size]:
            known.setdefault(digest(path), []).append(path)
        for path in ours[size]:
            if paths := known.get(digest(path)):
                found[path] = paths
    return found


def _by_frames(train: dict[Clip, InTar | None], test: dict[Clip, Found], args: argparse.Namespace) -> list[str]:
    """Compare frames, and add training clips with similar frames to `test`. Return notes on unreadable clips."""
    seconds = MEDIA_SECONDS if args.media_seconds is None else args.media_seconds
    present = {clip: opened for clip, opened in train.items() if opened is not None or os.path.exists(clip[0])}
    clips = list({**present, **dict.fromkeys(test)}.items())
    died = "a process died while it decoded: run again with --num-workers 0 --debug to see on which"
    with (
        tqdm(total=len(clips), desc="frames", disable=None, delay=1, leave=False) as bar,
        mapping(one_a_core(args.num_workers, MAX_WORKERS), died=died) as each,
    ):
        hashes: dict[Clip, np.ndarray | str] = {}
        for (clip, _), of_clip in zip(clips, each(partial(frame_hashes, media_seconds=seconds), clips), strict=True):
            hashes[clip] = of_clip
            bar.update()
    unread = [error for error in hashes.values() if isinstance(error, str)]
    read = {clip: codes for clip, codes in hashes.items() if not isinstance(codes, str)}
    known = [(clip, read[clip]) for clip in train if clip in read and len(read[clip])]
    if known:
        whose = np.repeat(np.arange(len(known)), [len(found) for _, found in known])  # (N,) index of each hash's clip
        codes = np.concatenate([found for _, found in known])  # (N, 8) uint8, 64 bits per hash
        for clip, one in test.items():
            ours = read.get(clip, ())
            if len(ours) < LEAST:
                continue
            near = np.zeros(len(known), int)  # per training clip, the number of the test clip's frames found in it
            for code in ours:
                near[np.unique(whose[BITS[codes ^ code].sum(axis=1) <= NEAR])] += 1
            hits = np.flatnonzero(near >= max(LEAST, SHARE * len(ours)))
            if len(hits):
                ordered = sorted(hits, key=lambda hit: -near[hit])
                one.train["frames"] = [f"{known[hit][0][0]} ({near[hit]} of {len(ours)})" for hit in ordered]
    return [f"{len(unread)} clips could not be read ({unread[0]})"] if unread else []


def frame_hashes(clip: tuple[Clip, InTar | None], media_seconds: float = 0) -> "np.ndarray | str":
    """Hash frames spread over a clip, except single-coloured ones. Return the hashes, (T, 8) uint8, or an error
    message.

    clip: the clip, and the function that opens it in a tar (None if it is a file on disk). media_seconds: time limit
    for reading it; 0: no limit.
    """
    import imagehash
    from PIL import Image

    (path, bounds), in_tar = clip

    def read() -> list[np.ndarray]:
        found = []
        with open_media(path if in_tar is None else in_tar()) as medium:
            info = medium.info
            indices = sample_indices(
                "segment",
                num_frames=NUM_FRAMES,
                total_frames=info.num_frames,
                fps=info.fps,
                bounds=bounds,
                first_index=info.first_index,
            )
            for frame in medium.frames(sorted(set(indices))):
                keep_reading()
                picture = Image.fromarray(frame).convert("L")
                if np.asarray(picture).std() >= PLAIN:
                    found.append(np.packbits(imagehash.phash(picture).hash))
        return found

    try:
        hashes = read_within(media_seconds, read, medium=path, setting="--media-seconds")
    except (MediaError, UserError) as error:
        return str(error)
    return np.array(hashes, np.uint8).reshape(-1, 8)
