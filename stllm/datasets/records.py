"""Records of annotation files, one a medium: the common form of every format."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stllm.media.sampling import Bounds
from stllm.processors.templates import Turn


@dataclass(frozen=True)
class Record:
    """One medium and what is asked about it.

    turns: instruction, question and answer of each pair. media: absolute path; None for text alone.
    kind: "video" or "image". bounds: start and end in seconds, `math.inf` for an open end. where: file and place in
    it, for messages. num_frames: of a raw-frame folder, as annotated.
    """

    turns: tuple[Turn, ...]
    media: str | None
    kind: str
    where: str
    bounds: Bounds | None = None
    num_frames: int | None = None


class Records(Protocol):
    """An annotation file that was read: records by index, held compactly.

    kind: "video", "image" or "text", the same for all. media_dir: what their media are relative to.
    num_pairs: (records,) answered pairs of each.
    """

    kind: str
    media_dir: str
    num_pairs: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises AnnotationError for a record that cannot be used."""
        ...
