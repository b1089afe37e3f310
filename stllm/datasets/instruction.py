"""The data set type `instruction`: videos, images or text with questions and answers, from an annotation file.

Letters in shapes: T frames, S image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.common.registry import datasets
from stllm.common.schema import DatasetSettings, texts
from stllm.datasets.annotations import JsonRecords, Record, Records
from stllm.datasets.features import FeatureStore, feature_key
from stllm.datasets.samples import LengthCheck, Sample, SampleKey
from stllm.datasets.shards.reader import ShardClips
from stllm.media.clip import Media, MediaError, load_clip
from stllm.processors.transforms import ClipTransform


@datasets.register("instruction")
@dataclass(kw_only=True, eq=False)
class InstructionCorpus:
    """A data set of videos or images with questions and answers, or of text only.

    num_frames: T of every clip; a shorter clip is padded with its last frame. sampling: choice of frames, see
        sampling.py.
    transform: prepares the frames, with one crop for all frames of a clip.
    qa_sampling: "one": a random pair per record and epoch (as published); "all": one sample per pair;
        "together": one sample per record, in which each pair sees the medium but no other pair.
    multi_turn: make all pairs of a record one conversation instead. The pairs of such a conversation, as those that
        are trained together, have the instruction of the first pair.
    judge_options: train also to tell for each option whether it is the answer; see `PromptProcessor.training_ids`.
    instruction: texts of which a pair without an instruction, such as a caption, draws one.
    fps: frames per second of frame folders. max_samples: use only this many samples from the beginning.
    features: precomputed features that replace the media.
    """

    name: str
    records: Records
    num_frames: int
    transform: ClipTransform
    sampling: str = "rand"
    qa_sampling: str = "one"
    multi_turn: bool = False
    judge_options: bool = False
    instruction: Sequence[str] = ()
    reader: str = "auto"
    fps: float | None = None
    max_samples: int | None = None
    features: FeatureStore | None = None

    def __post_init__(self) -> None:
        self.media: str | None = None if self.records.kind == "text" else self.records.kind
        if self.media != "video":
            self.num_frames = 1
        # One past the last sample of each record. A record that cannot be used is one sample, so that it is counted.
        each_pair = self.qa_sampling == "all" and not self.multi_turn
        self.together = self.qa_sampling == "together" and not self.multi_turn
        self._ends = np.cumsum(np.maximum(self.records.num_pairs, 1)) if each_pair else None
        num_samples = len(self.records) if self._ends is None else int(self._ends[-1])
        self._num_samples = num_samples if self.max_samples is None else min(self.max_samples, num_samples)

    @classmethod
    def from_settings(cls, name: str, settings: DatasetSettings, *, transform: ClipTransform) -> "InstructionCorpus":
        """Build the data set from its settings in the YAML. Raises UserError for an unusable annotation file."""
        if settings.anno_path is None:
            raise UserError(f"data set {name}: no anno_path is given; name its annotation file")
        clips = ShardClips.of(name, settings) if settings.shards else None
        media_dir = settings.media_dir or ""
        records = JsonRecords(settings.anno_path, media_dir=media_dir, kind=settings.media, clips=clips)
        return cls.of_records(name, records, settings, transform=transform)

    @classmethod
    def of_records(
        cls, name: str, records: Records, settings: DatasetSettings, *, transform: ClipTransform
    ) -> "InstructionCorpus":
        """Build the data set from records and its settings in the YAML."""
        return cls(
            name=name,
            records=records,
            num_frames=settings.num_frames,
            transform=transform,
            sampling=settings.sampling,
            qa_sampling=settings.qa_sampling or "one",
            multi_turn=settings.multi_turn,
            judge_options=settings.judge_options,
            instruction=texts(settings.instruction),
            reader=settings.reader,
            fps=settings.fps,
            max_samples=settings.max_samples,
        )

    def __len__(self) -> int:
        return self._num_samples

    def load(self, key: SampleKey, generator: np.random.Generator, check: LengthCheck | None = None) -> Sample:
        """Prepare the sample `key.index`; see `samples.Corpus`."""
        number, pair = self._place(key.index)
        record = self.records[number]
        turns = [turn for turn in record.turns if turn.answer is not None]
        if not self.multi_turn and not self.together:
            turns = [turns[int(generator.integers(len(turns))) if pair is None else pair]]
        first = turns[0]
        if not first.instruction and self.instruction:
            first = replace(first, instruction=self.instruction[int(generator.integers(len(self.instruction)))])
        later = (replace(turn, instruction=first.instruction if self.together else "") for turn in turns[1:])
        name = record.where if record.media in (None, record.where) else f"{record.media} ({record.where})"
        sample = Sample(
            key, name, (first, *later), self.media, together=self.together, judge_options=self.judge_options
        )
        if check is not None:
            check(sample, 0 if self.media is None else self.num_frames)
        if record.media is None:
            return sample
        if self.features is None:
            sample.pixel_values = self.load_pixels(record, generator)
        else:
            self.features.fill(sample, feature_key(record, self.records.media_dir))
        return sample

    @property
    def frame_settings(self) -> dict[str, Any]:
        """The number and choice of frames; "middle" in place of training's "rand". See `FeatureSource`."""
        sampling = "middle" if self.sampling == "rand" else self.sampling
        return {"num_frames": self.num_frames, "sampling": sampling} if self.media == "video" else {}

    def key_of(self, index: int) -> str:
        """Return the key under which a sample's features are stored. Raises AnnotationError."""
        return feature_key(self.records[self._place(index)[0]], self.records.media_dir)

    def load_pixels(self, record: Record, generator: np.random.Generator) -> Tensor:
        """Read and prepare a record's frames, (T, 3, S, S); T is `num_frames`, or 1 for an image. Raises MediaError."""
        assert record.media is not None
        crops = torch.Generator().manual_seed(int(generator.integers(2**63)))
        start, end = record.bounds or (None, None)
        media = Media(
            record.media,
            self.num_frames,
            start,
            end,
            self.sampling,
            self.reader,
            self.fps,
            own_times=False,
            member=record.member,
        )
        clip = load_clip(media, self.transform.for_clip(crops), generator=generator)
        if (clip.info.kind == "image") != (self.media == "image"):
            found, wanted = ("an image", "a video") if clip.info.kind == "image" else ("a video", "an image")
            raise MediaError(
                f"{record.media}: found {found}, expected {wanted}, as in the rest of {self.name}: use separate "
                "entries for images and videos",
                cause="unreadable",
            )
        missing = self.num_frames - len(clip.frames)
        return torch.cat([clip.frames, clip.frames[-1:].expand(missing, -1, -1, -1)]) if missing else clip.frames

    def _place(self, index: int) -> tuple[int, int | None]:
        """Return the index of a sample's record, and the index of its pair in the record.

        The second is None if the sample is not one fixed pair, but a random one or all of the record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: sample {index} of {len(self)}")
        if self._ends is None:
            return index, None
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)
