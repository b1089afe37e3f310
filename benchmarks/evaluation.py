"""Evaluation: samples a second of `stllm evaluate` against one question at a time.

Ours answers in batches, decodes clips in advance and encodes each clip once. The baseline decodes and encodes the video
again for each question. There are two synthetic data sets: one like MSVD-QA (20 videos with 25 questions each, 64
frames, the video input residual) and one like MVBench (a clip for each question, one frame a second, the video input
all). The model has the published proportions at about an eightieth of the size. The memory of the process is also
measured, after each quarter of 2,000 questions.

    python -m benchmarks.evaluation [--quick]
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, report, resident_bytes
from benchmarks.reuse import new_chat, new_model
from stllm.common.device import resolve_device
from stllm.common.distributed import one_a_core
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Media
from stllm.evaluation.asking import Asker
from stllm.evaluation.benchmarks.base import Item
from tests.helpers.benchmarks import asking
from tests.helpers.videos import write_video

BATCH_SIZE = 8
NUM_FRAMES, IMAGE_SIZE = 64, 224
DECODING = Decoding(num_beams=1, max_new_tokens=8)  # answers are a few words
SIZE, FPS = (640, 360), 25
WORDS = ("circle", "square", "triangle", "object", "person")


def new_items(videos: Sequence[Path], num_questions: int, **media: Any) -> list[Item]:
    """Return items with `num_questions` questions about each video. Questions about one video are not adjacent."""
    items: list[Item] = []
    for question in range(num_questions):
        for video in videos:
            text = f"what does the {WORDS[question % 5]} do before the {WORDS[question // 5 % 5]} moves {question}"
            items.append(Item(str(len(items)), "", video.name, Media(str(video), **media), (text,), "it"))
    return items


def measure(name: str, chat: Chat, items: Sequence[Item], sample: Sequence[Item]) -> list[dict[str, Any]]:
    """Return two rows of the table: the baseline on the items in `sample`, and ours on all items.

    chat: must have no cache (cache_bytes 0).
    """
    loaded = asking(items)
    start = time.perf_counter()
    alone = {item.id: chat.answer(loaded.requests(item, chat.processor.template), DECODING)[0].text for item in sample}
    slow = (time.perf_counter() - start) / len(sample)
    asker = Asker(chat, loaded, decoding=DECODING, batch_size=BATCH_SIZE, num_workers=one_a_core(None))
    start = time.perf_counter()
    ours = {record["id"]: record["prediction"] for record in asker.records(items)}
    fast = (time.perf_counter() - start) / len(items)
    equal = f"{sum(ours[id_] == text for id_, text in alone.items())}/{len(alone)}"
    columns = ("set", "", "questions", "samples/s", "speed-up", "equal answers")
    slow_row = (name, "one at a time", len(sample), 1 / slow, 1.0, "")
    rows = (slow_row, (name, "ours", len(items), 1 / fast, slow / fast, equal))
    return [dict(zip(columns, row, strict=True)) for row in rows]


def memory(chat: Chat, items: Sequence[Item]) -> list[float]:
    """Return the memory of this process in MiB after each quarter of the items."""
    short = replace(DECODING, max_new_tokens=1)  # the length of the answers does not matter for memory
    asker = Asker(chat, asking(items), decoding=short, batch_size=BATCH_SIZE, num_workers=one_a_core(None))
    held = []
    for number, _ in enumerate(asker.records(items), start=1):
        if number % (len(items) // 4) == 0:
            held.append(resident_bytes("VmRSS") / 2**20)
    return held


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "")
    device = resolve_device(args.device)
    # --quick has fewer clips, not smaller ones: with smaller frames, encoding would take a smaller share of the time
    num_videos, num_clips, num_asked = (1, 4, 16) if args.quick else (20, 80, 2000)
    with tempfile.TemporaryDirectory() as folder:
        videos = [write_clip(Path(folder) / f"video{n}.mp4", seconds=10, seed=n) for n in range(num_videos)]
        clips = [write_clip(Path(folder) / f"clip{n}.mp4", seconds=6 + n % 9, seed=n) for n in range(num_clips)]
        msvd = new_items(videos, 25, num_frames=NUM_FRAMES)
        mvbench = new_items(clips, 1, num_frames=0, sampling="segment")
        residual = new_chat(new_model(IMAGE_SIZE, device), 0)
        joint = new_chat(new_model(IMAGE_SIZE, device, video_input="all"), 0)
        for chat, item in ((residual, msvd[0]), (joint, mvbench[0])):  # warm-up
            chat.answer(asking([item]).requests(item, chat.processor.template), DECODING)
        rows = measure("MSVD-like", residual, msvd, msvd[: 2 * num_videos])
        rows += measure("MVBench-like", joint, mvbench, mvbench)
        small = new_chat(new_model(56, device), 0)
        held = memory(small, new_items(clips, num_asked // num_clips, num_frames=16))
    report(
        "evaluation",
        "one question at a time, its video read and encoded again",
        rows,
        {
            "videos": num_videos,
            "frames": NUM_FRAMES,
            "clips": num_clips,
            "image": IMAGE_SIZE,
            "batch": BATCH_SIZE,
        },
        args.output_dir,
        device=device,
        also={
            "workers": one_a_core(None),
            f"MiB held after each quarter of {num_asked} questions": [round(value) for value in held],
        },
    )


def write_clip(path: Path, *, seconds: int, seed: int) -> Path:
    """Write a video of this length. The seed makes its number of frames unique."""
    return write_video(path, num_frames=seconds * FPS + seed, fps=FPS, size=SIZE, gop=50)


if __name__ == "__main__":
    main()
