"""Checks of single things: a record of training data, a medium, an image-text shard, a folder of features."""

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.schema import DatasetSettings, texts
from stllm.datasets.annotations import (
    EXPECTED,
    AnnotationError,
    Fields,
    fields_beside,
    question_fault,
    text_of,
    turns_of,
)
from stllm.datasets.faults import Fault, Finding, Medium, Pairs, check_bounds, check_name, records_of
from stllm.datasets.features import FeatureStore
from stllm.datasets.image_text import caption_of
from stllm.datasets.samples import TOO_LONG, LengthCheck, Sample, SampleKey
from stllm.datasets.shards.index import ABSENT, SampleSpan, open_index
from stllm.datasets.shards.reader import Content, ShardClips, ShardReader
from stllm.datasets.shards.sources import ShardCache
from stllm.media import info as media_info
from stllm.media.images import decode_image
from stllm.media.info import MediaError
from stllm.media.open import open_media
from stllm.media.sampling import Bounds, sample_indices
from stllm.media.time_bound import keep_reading, read_within

MEDIA_KEYS = ("video", "image")
SUFFIXES = {"image": "jpg, png or webp", "video": "mp4, webm, mkv, avi or mov"}  # extensions in shards, for messages
VICUNA_POSITIONS = 2048  # positions of the published language model, Vicuna 7B
SECONDS_OPTION = "--media-seconds"
SLACK = 1.0  # seconds by which an annotated end may exceed the video's end, because annotations are rounded


# ---- records of training data ---------------------------------------------------------------------------------------


def training_findings(settings: DatasetSettings, check: LengthCheck) -> Iterator[Finding]:
    """Yield the faults and media of an annotation file (VideoChat2-IT, captions or JSONL).

    settings: the data set's settings, with `anno_path`. If they set `media`, records of another kind are skipped.
    check: check of the samples' lengths, the model's or `at_least_words`.
    """
    file = user_path(settings.anno_path or "")
    found: set[str | None] = set()
    for where, fields in records_of(file, EXPECTED, ("QA", "caption")):
        for finding in [fields] if isinstance(fields, Fault) else _record_findings(fields, where, settings, check):
            found.add(finding.expects if isinstance(finding, Medium) else None)
            yield finding
    if not found:
        sentence = f"found no {settings.media} record; name another file or medium"
        yield Fault("annotation", str(file), "file", sentence)
    if len(found - {None}) > 1:
        sentence = "found videos and images in one file; name it in two entries, one with media: video, one with image"
        yield Fault("annotation", str(file), "file", sentence)


def _record_findings(fields: Fields, where: str, settings: DatasetSettings, check: LengthCheck) -> Iterator[Finding]:
    media = settings.media
    kind = next((key for key in MEDIA_KEYS if fields.get(key) is not None), None)
    if media is not None and kind is not None and kind != media:
        return
    pairs = yield from _training_pairs(fields, where)
    yield from _too_long(fields, where, None if media == "text" else kind, settings, check)
    bounds = yield from check_bounds(fields, where)
    if media == "text":
        yield Medium(where, "", "text", pairs=pairs)
        return
    name = yield from check_name(fields, where, MEDIA_KEYS if media is None else (media,))
    if name is not None:
        count = fields.get("num_frames")
        num_frames = count if isinstance(count, int) else None
        yield Medium(where, name, kind or "video", bounds=bounds, num_frames=num_frames, pairs=pairs)


def _training_pairs(fields: Fields, where: str) -> Generator[Finding, None, Pairs]:
    """Yield the faults of a record's question-answer pairs, and return (question, answer) of the others."""
    pairs = fields.get("QA")
    if pairs is None and "caption" in fields:
        captions = fields["caption"] if isinstance(fields["caption"], list) else [fields["caption"]]
        pairs = [{"a": caption} for caption in captions]
    if not isinstance(pairs, list) or not pairs:
        found = "is empty" if pairs == [] else "is missing" if pairs is None else "is no list"
        yield Fault("incomplete", where, "QA", f"QA {found}; expected a list of {{i, q, a}}, or a caption")
        return ()
    answered = []
    for number, pair in enumerate(pairs, start=1):
        subject = f"QA {number}" if "QA" in fields else "caption"
        if not isinstance(pair, dict):
            yield Fault("incomplete", where, subject, "found no mapping; expected {i, q, a}")
        elif fault := question_fault(pair.get("i"), pair.get("q")):
            yield Fault("annotation", where, subject, fault)
        elif text_of(pair.get("a")) is None:
            yield Fault(
                "empty answer", where, subject, f"found the answer {pair.get('a')!r}; give one, or drop the pair"
            )
        else:
            answered.append((text_of(pair.get("q")) or "", str(text_of(pair["a"]))))
    return tuple(answered)


def _too_long(
    fields: Fields, where: str, media: str | None, settings: DatasetSettings, check: LengthCheck
) -> Iterator[Fault]:
    """Yield a fault for each sample of the record that is too long. media: "video", "image" or None."""
    try:
        turns = [turn for turn in turns_of(fields, where) if turn.answer is not None]
    except AnnotationError:  # `_training_pairs` reports this error
        return
    longest = max(texts(settings.instruction), key=len, default="")  # training draws one of them, so check the longest
    turns = [turn if turn.instruction else replace(turn, instruction=longest) for turn in turns]
    if settings.qa_sampling == "together":
        turns = [replace(turn, instruction=turns[0].instruction) for turn in turns]
    later = [replace(turn, instruction="") for turn in turns[1:]]
    samples = [(turns[0], *later)] if settings.multi_turn else [(turn,) for turn in turns]
    num_frames = {"video": settings.num_frames, "image": 1}.get(media or "", 0)
    for number, sample in enumerate(samples, start=1):
        try:
            check(Sample(SampleKey(0, 0, 0, 0), where, sample, media), num_frames)
        except AnnotationError as error:  # noqa: PERF203
            subject = "QA" if settings.multi_turn else f"QA {number}"
            yield Fault(error.cause, where, subject, str(error).removeprefix(f"{where}: "))


def at_least_words(sample: Sample, num_frames: int) -> None:
    """Check a sample's length without a tokenizer (a `LengthCheck`): a question has at least one token per word.

    Answers are not counted, because training cuts them; neither are visual tokens. Raises AnnotationError.
    """
    found = sum(len(f"{turn.instruction} {turn.question}".split()) for turn in sample.turns)
    if found > VICUNA_POSITIONS:
        raise AnnotationError(
            f"{sample.name}: the question has {found} words, so at least as many tokens, but Vicuna has "
            f"{VICUNA_POSITIONS} positions for prompt, answer and visual tokens: shorten it, or check with --cfg-path, "
            "which counts tokens for your model",
            cause=TOO_LONG,
        )


# ---- media ----------------------------------------------------------------------------------------------------------


@dataclass
class Use:
    """A medium and what the records that use it expect.

    path: path of the medium. expects: "video", "image" or "frames". where: the first record. num_records: number of
    records.
    fps, num_frames: as for the record. clips: (start and end, record) of each part. rule: a benchmark's sampling rule
    (sampling.py); "" for training data.
    """

    path: str
    expects: str
    where: str
    fps: float | None = None
    num_frames: int | None = None
    num_records: int = 1
    rule: str = ""
    clips: list[tuple[Bounds, str]] = field(default_factory=list)

    def fault(self, kind: str, sentence: str) -> Fault:
        """Return a fault of the medium that affects all its records."""
        whose = self.where if self.num_records == 1 else f"{self.where} and {self.num_records - 1} more"
        return Fault(kind, whose, self.path, sentence)


def check_use(use: Use, decode: str, media_seconds: float = 0) -> list[Fault]:
    """Check an existing medium. decode: "none" checks only its size, "first" its first frame, "all" all frames.

    media_seconds: time limit for reading; 0: no limit. Raises StorageError.
    """
    with _notes() as notes:
        try:
            faults = read_within(media_seconds, partial(_look, use, decode), medium=use.path, setting=SECONDS_OPTION)
        except MediaError as error:
            faults = [use.fault("unreadable", str(error).removeprefix(f"{use.path}: "))]
    if any(fault.kind == "unreadable" for fault in faults):  # the notes would repeat them
        return faults
    return faults + [use.fault("unreadable", note) for note in notes]


def _look(use: Use, decode: str) -> list[Fault]:
    """Check an existing medium, without a time limit; see `check_use`. Raises MediaError if it is unreadable."""
    try:
        if not os.path.isdir(use.path) and os.path.getsize(use.path) == 0:
            return [use.fault("empty file", "the file holds 0 bytes; copy or download it again")]
    except OSError as error:
        return [use.fault("unreadable", f"it cannot be read ({error.strerror}); check disk and link")]
    if decode == "none":
        return []
    faults = []
    with open_media(use.path, fps=use.fps) as medium:
        info = medium.info
        found = {"image": "an image", "video": "a video", "frames": "a folder"}.get(info.kind)
        if (use.expects, info.kind) in (("video", "image"), ("image", "video"), ("image", "frames")):
            expected = "a video" if use.expects == "video" else "an image"
            faults.append(use.fault("wrong medium", f"found {found}, expected {expected}: correct the record's key"))
        for bounds, where in use.clips if info.kind != "image" else ():
            try:
                rule = use.rule or "middle"
                sample_indices(rule, num_frames=1, total_frames=info.num_frames, fps=info.fps, bounds=bounds)
            except UserError as error:
                faults.append(Fault("bounds", where, use.path, str(error)))
                continue
            if info.duration + SLACK < bounds[1] < float("inf"):
                todo = "it is clamped, as in the official script" if use.rule else "correct it"
                sentence = f"end is {bounds[1]:g} s, but the video lasts {info.duration:.2f} s: {todo}"
                faults.append(Fault("bounds", where, use.path, sentence, note=bool(use.rule)))
        if info.kind == "frames" and use.num_frames is not None and info.num_frames < use.num_frames:
            sentence = f"found {info.num_frames} frames, but the record says {use.num_frames}: extract them again"
            faults.append(Fault("unreadable", use.where, use.path, sentence))
        indices = range(info.first_index, info.first_index + info.num_frames)
        medium.times(indices[-1:])  # raises when the file ends before its last frame
        for _ in medium.frames(indices if decode == "all" else indices[:1]):
            keep_reading()
    return faults


@contextmanager
def _notes() -> Iterator[list[str]]:
    """Collect the warnings that readers log within the block, such as damage that the decoder can repair, in a list."""
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(str(record.args[1]))  # type: ignore[method-assign, index]
    logger = media_info.logger
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    media_info.warn_once.cache_clear()
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


# ---- shards and features --------------------------------------------------------------------------------------------


def check_shard(
    shard: str,
    *,
    kind: str | None,
    decode: str,
    cache_dir: str | Path | None,
    cache_gb: float | None,
    media_seconds: float,
) -> list[Fault]:
    """Check one shard. decode: "none" checks only headers, "first" also the first sample, "all" all samples.

    kind: the kind of media to check, "image" or "video"; None: the kind of most of them. media_seconds: time limit for
    reading a sample; 0: no limit.
    """
    reader = ShardReader(ShardCache(cache_dir, cache_gb))
    try:
        index = open_index(shard, reader.cache)
    except UserError as error:
        return [Fault("missing", shard, shard, str(error).removeprefix(f"{shard}: "))]
    faults = [Fault("unreadable", shard, shard, index.fault.removeprefix(f"{shard}: "))] if index.fault else []
    if kind is None:  # beside clips, there may be thumbnails
        offsets = (index.rows[:][:, SampleSpan._fields.index(name)] for name in SUFFIXES)
        num_images, num_videos = (np.count_nonzero(of_kind != ABSENT) for of_kind in offsets)
        kind = "video" if num_videos and num_videos >= num_images else "image"
    if not index.num_samples and not index.fault:
        sentence = f"found no {kind} or caption in it; expected {SUFFIXES[kind]} with txt or json of the same name"
        faults.append(Fault("incomplete", shard, shard, sentence))

    def read(sample: int) -> Content:
        content = reader.read(shard, sample, kind)
        if content.image is not None:
            decode_image(content.image, content.name)
        if content.video is not None:
            with open_media(content.video) as medium:
                for _ in medium.frames(range(medium.info.num_frames)):
                    keep_reading()
        return content

    num_read = {"none": 0, "first": min(1, index.num_samples), "all": index.num_samples}[decode]
    for sample in range(index.num_samples):
        where, entry = f"{shard}, sample {sample + 1}", index.entry(sample)
        if (entry.image if kind == "image" else entry.video) == ABSENT:
            sentence = f"the caption has no {kind} beside it; add it, or leave the sample out"
            faults.append(Fault("incomplete", where, kind, sentence))
        if entry.caption[0] == ABSENT:
            sentence = f"the {kind} has no txt or json beside it; add it, or leave it out"
            faults.append(Fault("incomplete", where, "caption", sentence))
        elif entry.caption[1] == 0:
            sentence = "the caption holds 0 bytes; write one, or leave the sample out"
            faults.append(Fault("empty answer", where, "caption", sentence))
        if sample >= num_read:
            continue
        try:
            content = read_within(media_seconds, partial(read, sample), medium=where, setting=SECONDS_OPTION)
        except MediaError as error:
            faults.append(Fault("unreadable", where, kind, str(error)))
            continue
        if not content.text and not content.json:  # reported above
            continue
        try:
            if kind == "video":
                turns_of(fields_beside(content.text, content.json, content.name), content.name)
            else:
                caption_of(content, content.name)
        except AnnotationError as error:
            faults.append(Fault("empty answer", where, content.name, str(error).removeprefix(f"{content.name}: ")))
    reader.close()
    return faults


def check_clips(settings: DatasetSettings, names: dict[str, str], *, decode: str, media_seconds: float) -> list[Fault]:
    """Check the clips in `settings.shards` that an annotation file names.

    names: name of each clip -> the first record that uses it. decode: "none" checks only that the shards have each clip
    exactly once, "first" also reads its first frame, "all" reads all its frames. media_seconds: time limit for reading
    a clip; 0: no limit.
    """
    clips = ShardClips.of(str(settings.anno_path), settings)

    def look(name: str) -> None:
        member = clips(name)
        if decode != "none":
            with open_media(member) as medium:
                for _ in medium.frames(range(medium.info.num_frames if decode == "all" else 1)):
                    keep_reading()

    faults = []
    for name, where in names.items():
        try:
            read_within(media_seconds, partial(look, name), medium=name, setting=SECONDS_OPTION)
        except MediaError as error:  # noqa: PERF203
            kind = "missing" if error.cause == "missing" else "unreadable"
            faults.append(Fault(kind, where, name, str(error).removeprefix(f"{name}: ")))
    return faults


def check_features(folder: str, keys: list[tuple[str, str]], *, decode: str, media_seconds: float) -> list[Fault]:
    """Check a folder of precomputed features. keys: (key, record) of each clip that it must have.

    decode: "none" reads no tensors; "first" and "all" read all of them, because they are small. media_seconds: time
    limit for one file; 0: no limit.
    """
    try:
        store = FeatureStore(folder)
    except UserError as error:
        return [Fault("missing", folder, folder, str(error).removeprefix(f"{folder}: "))]
    faults = []
    for key, where in keys if decode != "none" else ():
        try:
            read_within(media_seconds, partial(store.load, key), medium=key, setting=SECONDS_OPTION)
        except MediaError as error:  # noqa: PERF203
            kind = "missing" if error.cause == "missing" else "unreadable"
            faults.append(Fault(kind, where, key, str(error)))
    return faults
