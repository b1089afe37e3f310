"""Annotated videos for tests. Each frame carries the number of its video and its own number."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from stllm.datasets.annotations import JsonRecords
from stllm.datasets.instruction import InstructionCorpus
from stllm.processors.transforms import EvalTransform
from tests.helpers.videos import frame_code, read_code, write_video

FRAMES = 20  # a video, at 10 frames a second
FPS = 10


def write_numbered_videos(folder: Path, numbers: Iterable[int]) -> None:
    """Write `<number>.mp4`, whose frame f carries number * 100 + f."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        codes = (frame_code(number * 100 + frame) for frame in range(FRAMES))
        write_video(folder / f"{number}.mp4", fps=FPS, frames=codes)


def numbered_record(number: int, **fields: Any) -> dict[str, Any]:
    """Return a record whose two questions and answers name its video."""
    pairs = [{"i": f"video {number}", "q": f"pair {pair}?", "a": f"{number} {pair}"} for pair in range(2)]
    return {"video": f"{number}.mp4", "QA": pairs, **fields}


def corpus_of(path: Path, records: list[dict[str, Any]], **options: Any) -> InstructionCorpus:
    """Write these records to `path`, and return their instruction data set, with media beside it and centre crops."""
    path.write_text(json.dumps(records), encoding="utf-8")
    read = JsonRecords(path, media_dir=path.parent, kind=options.pop("kind", None))
    defaults = {"name": "numbered", "num_frames": 4, "transform": EvalTransform(32)}
    return InstructionCorpus(records=read, **{**defaults, **options})


def codes_of(pixel_values: Tensor) -> list[int]:
    """Return the numbers in the frames of a prepared clip, (T, 3, S, S)."""
    return [read_code(frame.permute(1, 2, 0).numpy()) for frame in pixel_values]
