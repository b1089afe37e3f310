"""`stllm toy --output DIR`: a small rendered world to train and test on, in the layouts of the real data sets.

DIR/vc2                                  VideoChat2-IT, see annotations.py; media in DIR/vc2/media
DIR/mvbench/json/<task>.json             MVBench, media in DIR/mvbench/video/<MVBench's own folder>
DIR/images/{00000..}.tar                 image-text shards of the first stage
DIR/language_model, DIR/qformer_tokenizer    the tiny counterparts of Vicuna and bert-base-uncased
DIR/toy_world.json                       the settings it was made with
DIR/benchmarks/{mvbench,vcgbench,...}    --benchmarks: a twin of every benchmark, see benchmarks.py

Clips have --num-frames frames (those with bounds half as many again, 64 at most). --long adds a set and a test of
64-frame clips (rare events), so that one model can learn both lengths from one world; with --num-frames 64, all clips
are long.
"""

import argparse
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from stllm.common.distributed import mapping, one_a_core
from stllm.common.errors import UserError
from stllm.common.files import check_new, new_folder, user_path
from stllm.toy.annotations import (
    TELLING,
    Fields,
    Records,
    clip_records,
    picture_records,
    text_records,
    training_records,
)
from stllm.toy.benchmarks import benchmark_bytes, mvbench_item, num_benchmark_clips, write_benchmarks
from stllm.toy.clips import FPS, NUM_FRAMES, NUM_LONG_FRAMES, SIZE, World
from stllm.toy.language import world_texts, write_language_model, write_qformer_tokenizer
from stllm.toy.media import annotation_files, encoder, png_bytes, write_shard, write_video
from stllm.toy.questions import picture_caption
from stllm.toy.tasks import PICTURES, RARE, TASKS, ToyTask

ABOUT = "toy_world.json"  # its presence marks a folder as a toy world
PER_SHARD = 500
SMALL, MAX_WORKERS = 500, 16  # clips that one process draws faster than several; processes by default
TEXTS = 4  # for each training clip
PAIRS = replace(PICTURES, corpus="images")  # of the shards: drawn apart from the instruction set's
TESTED = tuple(task for task in TASKS if task.benchmark)
LONG_TASKS: dict[bool, tuple[ToyTask, ...]] = {False: (), True: (RARE,)}

# Bytes, rounded up: a frame of a clip, a picture of SIZE, the texts about one, the language model and tokenizers
FRAME_BYTES, PICTURE_BYTES, TEXT_BYTES, LANGUAGE_BYTES = 1500, 12_000, 26_000, 5_000_000


def run(args: argparse.Namespace) -> int:
    """Write the world, and print what is in it and how to train on it."""
    target = user_path(args.output)
    small = args.num_workers is None and args.num_train + args.num_test < SMALL  # drawn before processes have started
    write_world(
        target,
        num_train=args.num_train,
        num_test=args.num_test,
        seed=args.seed or 0,
        num_frames=args.num_frames,
        size=args.size,
        long=args.long,
        benchmarks=args.benchmarks,
        overwrite=args.overwrite,
        num_workers=0 if small else one_a_core(args.num_workers, MAX_WORKERS),
    )
    tasks, tested = (*TASKS, *LONG_TASKS[args.long]), (*TESTED, *LONG_TASKS[args.long])
    num_train, num_test = sum(shares(args.num_train, tasks)), sum(shares(args.num_test, tested))
    print(
        f"written to {target}: {num_train} training clips of {len(tasks)} sets, {num_test} test clips of {len(tested)}"
    )
    if args.benchmarks:
        print(f"twins of the benchmarks, {args.benchmarks} items a task: {target / 'benchmarks'}")
    print(f"train on it: TOY_ROOT={shlex.quote(str(target))} stllm train --cfg-path configs/tiny/train.yaml")
    return 0


def write_world(
    target: Path,
    *,
    num_train: int,
    num_test: int,
    seed: int,
    num_frames: int = NUM_FRAMES,
    size: int = SIZE,
    long: bool = False,
    benchmarks: int = 0,
    overwrite: bool = False,
    num_workers: int = 0,
) -> None:
    """Write the whole world into the new folder `target`. When interrupted, write nothing.

    num_train, num_test: clips in all, divided among the tasks, at least one of each. There are as many training
    pictures and image-text pairs, and TEXTS times as many texts. num_frames: of a clip of the usual length.
    size: pixels a side. long: add rare events in clips of 64 frames. benchmarks: items of each benchmark's tasks;
    0: no twins. overwrite: replace another world there once this one is complete. num_workers: processes that draw,
    0: only this one. The world does not depend on it.
    Raises UserError for a target that is not empty and for a full disk; the target is then as it was.
    """
    target = target.resolve()
    if not (target / ABOUT).is_file():
        check_new(target, "--output")
    elif not overwrite:
        raise UserError(
            f"{target} holds a toy world already, expected a new or an empty folder: name another with --output, or "
            "replace that world with --overwrite"
        )
    world = World(seed, num_frames, size)
    tasks, tested = (*TASKS, *LONG_TASKS[long]), (*TESTED, *LONG_TASKS[long])
    train, test = shares(num_train, tasks), shares(num_test, tested)
    texts = shares(TEXTS * num_train, TELLING)
    num_clips = sum(train) + sum(test)
    frames = num_clips * (max(num_frames, NUM_LONG_FRAMES / 4) if long else num_frames)
    media = (frames * FRAME_BYTES + 2 * num_train * PICTURE_BYTES) * (size / SIZE) ** 2
    needed = round(media) + num_train * TEXT_BYTES + LANGUAGE_BYTES + benchmark_bytes(benchmarks, num_frames)
    total = num_clips + 2 * num_train + sum(texts) + num_benchmark_clips(benchmarks)
    encoder(".mp4")  # logs here, and once, that there is no H.264
    with (
        new_folder(target, needed) as folder,
        tqdm(desc="toy world", total=total, disable=None, delay=1, leave=False) as bar,
        mapping(num_workers, died="a process died while it drew: memory ran out; name fewer --num-workers") as map_,
    ):
        about = asdict(world) | {"num_train": num_train, "num_test": num_test, "long": long}
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        words = list(world_texts())
        write_language_model(folder / "language_model", words, seed)
        write_qformer_tokenizer(folder / "qformer_tokenizer", words)
        parts: list[tuple[Callable[[int], Records], int]] = [
            *((partial(_training_clip, folder, world, task), count) for task, count in zip(tasks, train, strict=True)),
            *((partial(_test_clip, folder, world, task), count) for task, count in zip(tested, test, strict=True)),
            (partial(_training_picture, folder, world), num_train),
            *((partial(text_records, world, task), count) for task, count in zip(TELLING, texts, strict=True)),
        ]
        with annotation_files(folder) as append:
            for make, count in parts:
                for records in map_(make, range(count)):
                    for file, record in records:
                        append(file, record)
                    bar.update()
        pairs = map_(partial(_pair, world), range(num_train))
        for number in range(math.ceil(num_train / PER_SHARD)):
            write_shard(folder / "images" / f"{number:05d}.tar", islice(pairs, PER_SHARD))
            bar.update(min(PER_SHARD, num_train - number * PER_SHARD))
        if benchmarks:
            write_benchmarks(folder / "benchmarks", world, count=benchmarks, done=bar.update)


def shares(total: int, tasks: tuple[ToyTask, ...]) -> list[int]:
    """The number of clips of each task: as even as can be, and at least one."""
    return [max(1, (total + number) // len(tasks)) for number in reversed(range(len(tasks)))]


# ---- drawn in any process: each writes its medium and returns annotation files with a record for each ----------------


def _training_clip(root: Path, world: World, task: ToyTask, index: int) -> Records:
    example, frames, bounds = world.clip(task, "train", index)
    medium: Fields = {"video": f"{Path(task.corpus).name}_{index:05d}.mp4", **bounds}
    write_video(root / "vc2" / "media" / medium["video"], frames, FPS)
    records = training_records(f"vc2/video/{task.corpus}", world.seed, index, example, medium)
    # a few frames of a rare event do not show what happens in it
    return records if task == RARE else [*records, *clip_records(example, medium)]


def _test_clip(root: Path, world: World, task: ToyTask, index: int) -> Records:
    example, frames, bounds = world.clip(task, "test", index)
    file = f"{task.benchmark}_{index:05d}.mp4"
    write_video(root / "mvbench" / "video" / task.media_dir / file, frames, FPS)
    return [(f"mvbench/json/{task.benchmark}.json", mvbench_item(file, example, bounds))]


def _training_picture(root: Path, world: World, index: int) -> Records:
    example, frame = world.picture(PICTURES, index)
    medium = {"image": f"{Path(PICTURES.corpus).name}_{index:05d}.png"}
    path = root / "vc2" / "media" / medium["image"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(frame))
    records = training_records(f"vc2/image/{PICTURES.corpus}", world.seed, index, example, medium)
    return [*records, *picture_records(example, medium)]


def _pair(world: World, index: int) -> tuple[str, bytes, str]:
    example, frame = world.picture(PAIRS, index)
    return f"{index:06d}", png_bytes(frame), picture_caption(example.scene)
