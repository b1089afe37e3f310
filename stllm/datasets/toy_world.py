"""`stllm toy --output DIR`: a small rendered world to train and test on, in the layouts of the real data sets.

DIR/vc2/video/<kind>/<set>/train.json    VideoChat2-IT, media in DIR/vc2/media
DIR/vc2/image/<kind>/<set>/train.json    the same with pictures
DIR/mvbench/json/<task>.json             MVBench, media in DIR/mvbench/video/<MVBench's own folder>
DIR/images/{00000..}.tar                 image-text shards of the first stage
DIR/language_model, DIR/qformer_tokenizer    what stands for Vicuna and bert-base-uncased
DIR/benchmarks/{mvbench,vcgbench,...}    --benchmarks: a twin of every benchmark, see toy_benchmarks.py
"""

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stllm.common.files import check_new, new_folder
from stllm.datasets.toy_benchmarks import benchmark_bytes, num_benchmark_clips, write_benchmarks
from stllm.datasets.toy_clips import FPS, NUM_FRAMES, NUM_LONG_FRAMES, World
from stllm.datasets.toy_language import world_texts, write_language_model, write_qformer_tokenizer
from stllm.datasets.toy_media import write_json, write_png, write_shard, write_video
from stllm.datasets.toy_tasks import PICTURES, TASKS, Example, ToyTask, picture_caption

PER_SHARD = 500
PAIRS = replace(PICTURES, corpus="images")  # of the shards: drawn apart from the instruction set's
TESTED = tuple(task for task in TASKS if task.benchmark)

# Bytes, rounded up: a frame of a clip, a picture, the language model with both tokenizers
FRAME_BYTES, PICTURE_BYTES, LANGUAGE_BYTES = 1500, 12_000, 5_000_000


def run(args: argparse.Namespace) -> int:
    """The command: writes the world, says what is in it and what can be done with it."""
    target = Path(args.output).expanduser()
    write_world(
        target,
        num_train=args.num_train,
        num_test=args.num_test,
        seed=args.seed or 0,
        long=args.long,
        benchmarks=args.benchmarks,
    )
    num_train, num_test = sum(shares(args.num_train, TASKS)), sum(shares(args.num_test, TESTED))
    print(
        f"written to {target}: {num_train} training clips of {len(TASKS)} sets, {num_test} test clips of {len(TESTED)}"
    )
    if args.benchmarks:
        print(f"twins of the benchmarks, {args.benchmarks} items a task: {target / 'benchmarks'}")
    print(f"train on it: TOY_ROOT={shlex.quote(str(target))} stllm train --cfg-path configs/tiny/train.yaml")
    return 0


def write_world(
    target: Path, *, num_train: int, num_test: int, seed: int, long: bool = False, benchmarks: int = 0
) -> None:
    """Writes the whole world into the new folder `target`.

    num_train, num_test: clips in all, dealt out among the tasks, at least one of each. long: of 64 frames, not 16.
    benchmarks: items of each benchmark's tasks; 0: none of these.
    Raises UserError for a target that is not empty and for a full disk; the target is then as it was.
    """
    check_new(target, "--output")
    world = World(seed, NUM_LONG_FRAMES if long else NUM_FRAMES)
    num_clips = sum(shares(num_train, TASKS)) + sum(shares(num_test, TESTED))
    num_pictures = shares(num_train, TASKS)[0]
    needed = num_clips * world.num_frames * FRAME_BYTES + (num_train + num_pictures) * PICTURE_BYTES + LANGUAGE_BYTES
    needed += benchmark_bytes(benchmarks, world.num_frames)
    total = num_clips + num_pictures + num_train + num_benchmark_clips(benchmarks)
    with (
        new_folder(target, needed) as folder,
        tqdm(desc="toy world", total=total, disable=None, delay=1, leave=False) as bar,
    ):
        _write_language(folder, seed)
        for task, count in zip(TASKS, shares(num_train, TASKS), strict=True):
            _write_training_set(folder / "vc2", world, task, count, bar.update)
        for task, count in zip(TESTED, shares(num_test, TESTED), strict=True):
            _write_benchmark(folder / "mvbench", world, task, count, bar.update)
        _write_pictures(folder / "vc2", world, num_pictures, bar.update)
        _write_shards(folder / "images", world, num_train, bar.update)
        if benchmarks:
            write_benchmarks(folder / "benchmarks", world, count=benchmarks, done=bar.update)


def shares(total: int, tasks: tuple[ToyTask, ...]) -> list[int]:
    """How many of them each task gets: as even as can be, and at least one."""
    return [max(1, (total + number) // len(tasks)) for number in reversed(range(len(tasks)))]


def _write_language(folder: Path, seed: int) -> None:
    texts = list(world_texts())
    write_language_model(folder / "language_model", texts, seed)
    write_qformer_tokenizer(folder / "qformer_tokenizer", texts)


def _write_training_set(root: Path, world: World, task: ToyTask, count: int, done: Callable[[], Any]) -> None:
    media, name = root / "media", Path(task.corpus).name
    records = []
    for index in range(count):
        example, frames, bounds = world.clip(task, "train", index)
        file = f"{name}_{index:05d}.mp4"
        write_video(media / file, frames, FPS)
        records.append({"video": file, "QA": _qa(example), **bounds})
        done()
    write_json(root / "video" / task.corpus / "train.json", records)


def _write_benchmark(root: Path, world: World, task: ToyTask, count: int, done: Callable[[], Any]) -> None:
    media = root / "video" / task.media_dir
    items = []
    for index in range(count):
        example, frames, bounds = world.clip(task, "test", index)
        file = f"{task.benchmark}_{index:05d}.mp4"
        write_video(media / file, frames, FPS)
        question = example.turns[0]
        candidates = list(example.candidates)
        items.append(
            {
                "video": file,
                "question": question.question,
                "candidates": candidates,
                "answer": question.answer,
                **bounds,
            }
        )
        done()
    write_json(root / "json" / f"{task.benchmark}.json", items)


def _write_pictures(root: Path, world: World, count: int, done: Callable[[], Any]) -> None:
    media, name = root / "media", Path(PICTURES.corpus).name
    records = []
    for index in range(count):
        example, frame = world.picture(PICTURES, index)
        file = f"{name}_{index:05d}.png"
        write_png(media / file, frame)
        records.append({"image": file, "QA": _qa(example)})
        done()
    write_json(root / "image" / PICTURES.corpus / "train.json", records)


def _write_shards(folder: Path, world: World, count: int, done: Callable[[], Any]) -> None:
    def pairs(first: int) -> Iterator[tuple[str, np.ndarray, str]]:
        for index in range(first, min(first + PER_SHARD, count)):
            example, frame = world.picture(PAIRS, index)
            yield f"{index:06d}", frame, picture_caption(example.scene.things)
            done()

    for number, first in enumerate(range(0, count, PER_SHARD)):
        write_shard(folder / f"{number:05d}.tar", pairs(first))


def _qa(example: Example) -> list[dict[str, str | None]]:
    return [{"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in example.turns]
