"""The keys of `evaluation`: which part of a benchmark is asked, how, and where files lie.

The published settings of each benchmark are shipped (stllm/configs/evaluation/<benchmark>.yaml); a YAML's `evaluation`
goes over them, `--options evaluation.key=value` and the command's own options over both.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stllm.common.schema import MEDIA_SECONDS

PRESETS = Path(__file__).parent.parent / "configs" / "evaluation"


def benchmark_names() -> list[str]:
    """The names of the benchmarks: each has its shipped settings."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


@dataclass
class EvaluationSettings:
    """One evaluation; unset keys (None) are the model's or the benchmark's own."""

    # Files
    anno_path: str | None = None  # the ground truth: a file, or MVBench's folder
    answers_path: str | None = None  # the answers, where the questions have a file of their own
    video_dir: str | None = None  # the folder of the media
    output_dir: str = "output/eval"
    output_name: str | None = None  # of the files there; unset: the benchmark's name

    # What is asked
    tasks: list[str] = field(default_factory=list)  # of these alone
    limit: int | None = field(default=None, metadata={"low": 1})  # the first so many items of each task

    # Frames
    num_frames: int | None = field(default=None, metadata={"low": 0})  # 0: MVBench's one a second, 4 to 16
    sampling: str = "uniform"  # which frames: uniform, segment, middle or fps<x>
    reader: str = "auto"  # what decodes videos: auto, pyav or decord

    # Prompt and decoding
    system: Any = "template"  # the system sentence: "template" for the model family's own, "" for none, or a text
    num_beams: int | None = field(default=None, metadata={"low": 1})
    max_new_tokens: int | None = field(default=None, metadata={"low": 1})
    repetition_penalty: float | None = None
    context: str = field(default="published", metadata={"choices": ("published", "all")})  # conversation/context.py

    # Speed
    batch_size: int = field(default=8, metadata={"low": 1})  # questions answered at once
    num_workers: int | None = field(default=None, metadata={"low": 0})  # processes that decode; unset: one a core, to 8
    media_seconds: float = field(default=MEDIA_SECONDS, metadata={"low": 0})  # to read one medium; 0: no limit
