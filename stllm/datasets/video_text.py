"""The data set type `video_text`: clips in webdataset shards, with captions or questions beside them.

A shard is a tar as webdataset and video2dataset write it. Beside each `key.mp4` is a `key.txt` with a caption, or a
`key.json` with a caption or with questions and answers (see `annotations.fields_beside`).
Letters in shapes: N samples in all shards.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stllm.common.errors import UserError
from stllm.common.registry import datasets
from stllm.common.schema import DatasetSettings, texts
from stllm.datasets.annotations import Record, bounds_of, fields_beside, turns_of
from stllm.datasets.instruction import InstructionCorpus
from stllm.datasets.shards.index import SampleSpan, ShardIndex
from stllm.datasets.shards.reader import Shards, sample_key
from stllm.media.info import MediaError
from stllm.media.time_bound import now_reading
from stllm.processors.transforms import ClipTransform

NUM_ANSWERS = SampleSpan._fields.index("num_answers")


class ShardRecords:
    """The records of clips in shards; see `annotations.Records`.

    name: the data set's name, used in error messages. shards, cache_dir, cache_gb: see `Shards`. media_dir: folder that
    the keys of features are relative to. num_pairs: (N,) number of answered pairs of each record.

    Raises the errors of `Shards`, and UserError if no shard holds a clip.
    """

    kind = "video"

    def __init__(
        self,
        name: str,
        shards: str | Sequence[str],
        *,
        media_dir: str = "",
        cache_dir: str | Path | None = None,
        cache_gb: float | None = None,
    ) -> None:
        self.media_dir = media_dir
        self.samples = Shards(name, shards, cache_dir=cache_dir, cache_gb=cache_gb, columns=_columns)
        self.num_pairs = np.concatenate([num_answers for num_answers, _ in self.samples.kept])
        if not any(num_clips for _, num_clips in self.samples.kept):
            found = f"found no video in {len(self.samples.names)} shards"
            raise UserError(f"{name}: {found}; expected mp4, webm, mkv, avi or mov with txt or json of the same name")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Record:
        """Read a record.

        Raises AnnotationError if its text is missing or invalid, MediaError if its clip is missing.
        """
        shard, number = self.samples.place(index)
        now_reading(shard)
        content = self.samples.reader.read(shard, number, self.kind)
        where = f"{shard}/{content.name}"
        fields = fields_beside(content.text, content.json, where)
        turns, bounds = turns_of(fields, where), bounds_of(fields, where)
        if content.video is None:
            raise MediaError(
                f"{where}: the text has no video beside it; expected an mp4, webm, mkv, avi or mov of the same name",
                cause="missing",
            )
        key = sample_key(shard, number, content.name, self.media_dir)
        return Record(turns, where, self.kind, where, bounds, content.video, key)


@datasets.register("video_text")
class VideoTextCorpus(InstructionCorpus):
    """A data set of clips in shards. Frames and questions are chosen as for other videos."""

    @classmethod
    def from_settings(cls, name: str, settings: DatasetSettings, *, transform: ClipTransform) -> InstructionCorpus:
        """Build the data set from its settings in the YAML. Raises the errors of `ShardRecords`."""
        records = ShardRecords(
            name,
            texts(settings.shards),
            media_dir=settings.media_dir or "",
            cache_dir=settings.cache_dir,
            cache_gb=settings.cache_gb,
        )
        return cls.of_records(name, records, settings, transform=transform)


def _columns(index: ShardIndex) -> tuple[np.ndarray, int]:
    """Return the number of answers of each sample, and the number of clips."""
    return index.rows[:][:, NUM_ANSWERS], len(index.clips[:])
