"""`stllm toy --output DIR`: a small rendered world to train and test on, in the layouts of the real data sets.

DIR/vc2/video/<kind>/<set>/*.json        VideoChat2-IT, media in DIR/vc2/media: train, packed and open, see
                                         toy_annotations.py; caption/toy_story tells the short clips,
                                         caption/toy_path each of their things, frame after frame
DIR/vc2/image/<kind>/<set>/*.json        the same with pictures
DIR/vc2/text/<set>/{told,letters}.json   no media: scenes in words and questions about them; options, looked up
DIR/mvbench/json/<task>.json             MVBench, media in DIR/mvbench/video/<MVBench's own folder>
DIR/images/{00000..}.tar                 image-text shards of the first stage
DIR/language_model, DIR/qformer_tokenizer    what stands for Vicuna and bert-base-uncased
DIR/toy_world.json                       how it was made
DIR/benchmarks/{mvbench,vcgbench,...}    --benchmarks: a twin of every benchmark, see toy_benchmarks.py

Clips have --num-frames frames (those with bounds half as many again, 64 at most). --long adds a set and a test of
64-frame clips (rare events) beside the others, so that one model can learn both from one world; with --num-frames 64,
all clips are long.
"""

import argparse
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from stllm.common.errors import UserError
from stllm.common.files import check_new, new_folder, user_path
from stllm.common.processes import Map, mapping, one_a_core
from stllm.toy.annotations import Fields, Tellings, TrainingSet, record
from stllm.toy.benchmarks import benchmark_bytes, num_benchmark_clips, write_benchmarks
from stllm.toy.clips import FPS, NUM_FRAMES, NUM_LONG_FRAMES, SIZE, World
from stllm.toy.language import world_texts, write_language_model, write_qformer_tokenizer
from stllm.toy.media import encoder, png_bytes, write_json, write_png, write_shard, write_video
from stllm.toy.pictures import picture_caption
from stllm.toy.questions import Example
from stllm.toy.tasks import PICTURES, RARE, TASKS, ToyTask
from stllm.toy.texts import TELLING, letters_conversation, text_conversation

ABOUT = "toy_world.json"  # how the world was made; it tells a toy world from other folders
PER_SHARD = 500
SMALL, MAX_WORKERS = 500, 16  # clips that one process draws faster than several; processes, unless more are asked for
TEXTS = 4  # for each training clip
PAIRS = replace(PICTURES, corpus="images")  # of the shards: drawn apart from the instruction set's
TESTED = tuple(task for task in TASKS if task.benchmark)
LONG_TASKS: dict[bool, tuple[ToyTask, ...]] = {False: (), True: (RARE,)}

# Bytes, rounded up: a frame of a clip and a picture of SIZE, what is said about one, the language model and tokenizers
FRAME_BYTES, PICTURE_BYTES, TEXT_BYTES, LANGUAGE_BYTES = 1500, 12_000, 26_000, 5_000_000

R = TypeVar("R")


@dataclass(frozen=True)
class Each:
    """What makes things by their numbers, perhaps in several processes. done: called after each."""

    map: Map
    done: Callable[[], Any]

    def __call__(self, make: Callable[[int], R], count: int) -> Iterator[R]:
        """Things 0 to count - 1, in order."""
        for made in self.map(make, range(count)):
            yield made
            self.done()


def run(args: argparse.Namespace) -> int:
    """The command: writes the world, says what is in it and what can be done with it."""
    target = user_path(args.output)
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
        num_workers=_num_workers(args),
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
    """Writes the whole world into the new folder `target`: all of it or, when interrupted, nothing.

    num_train, num_test: clips in all, dealt out among the tasks, at least one of each; there are as many training
    pictures and image-text pairs, and TEXTS times as many texts. num_frames: of a clip of the usual length.
    size: pixels a side. long: rare events in clips of 64 frames, too. benchmarks: items of each benchmark's tasks;
    0: none of these. overwrite: another world there is replaced, once this one is whole. num_workers: processes that
    draw, 0: this one; the world is the same.
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
    train, test = (
        list(zip(tasks, shares(num_train, tasks), strict=True)),
        list(zip(tested, shares(num_test, tested), strict=True)),
    )
    num_clips = sum(count for _, count in (*train, *test))
    texts = list(zip(TELLING, shares(TEXTS * num_train, TELLING), strict=True))
    total = num_clips + 2 * num_train + sum(count for _, count in texts) + num_benchmark_clips(benchmarks)
    needed = _bytes(world, num_clips, num_train, long=long) + benchmark_bytes(benchmarks, num_frames)
    encoder(".mp4")  # says here, and once, when there is no H.264
    with (
        new_folder(target, needed) as folder,
        tqdm(desc="toy world", total=total, disable=None, delay=1, leave=False) as bar,
        mapping(num_workers, died="a process died while it drew: memory ran out; name fewer --num-workers") as map_,
    ):
        each = Each(map_, bar.update)
        write_json(folder / ABOUT, asdict(world) | {"num_train": num_train, "num_test": num_test, "long": long})
        _write_language(folder, seed)
        tellings = Tellings()
        for task, count in train:
            _write_training_set(folder / "vc2", world, task, count, tellings, each)
        for task, count in test:
            _write_benchmark(folder / "mvbench", world, task, count, each)
        _write_pictures(folder / "vc2", world, num_train, tellings, each)
        tellings.write(folder / "vc2")
        for task, count in texts:
            _write_texts(folder / "vc2", world, task, count, each)
        _write_shards(folder / "images", world, num_train, each)
        if benchmarks:
            write_benchmarks(folder / "benchmarks", world, count=benchmarks, done=bar.update)


def _num_workers(args: argparse.Namespace) -> int:
    """As asked; else a process a core, unless it is a small world, which is drawn before they have started."""
    small = args.num_workers is None and args.num_train + args.num_test < SMALL
    return 0 if small else one_a_core(args.num_workers, MAX_WORKERS)


def shares(total: int, tasks: tuple[ToyTask, ...]) -> list[int]:
    """How many of them each task gets: as even as can be, and at least one."""
    return [max(1, (total + number) // len(tasks)) for number in reversed(range(len(tasks)))]


def _write_language(folder: Path, seed: int) -> None:
    texts = list(world_texts())
    write_language_model(folder / "language_model", texts, seed)
    write_qformer_tokenizer(folder / "qformer_tokenizer", texts)


def _write_training_set(root: Path, world: World, task: ToyTask, count: int, tellings: Tellings, each: Each) -> None:
    records = TrainingSet(world.seed)
    for example, medium in each(partial(_training_clip, root / "media", world, task), count):
        records.add(example, medium)
        if task is not RARE:  # a few frames of such a clip do not show what happens in it
            tellings.add_clip(example, medium)
    records.write(root / "video" / task.corpus)


def _training_clip(media: Path, world: World, task: ToyTask, index: int) -> tuple[Example, Fields]:
    example, frames, bounds = world.clip(task, "train", index)
    file = f"{Path(task.corpus).name}_{index:05d}.mp4"
    write_video(media / file, frames, FPS)
    return example, {"video": file, **bounds}


def _write_benchmark(root: Path, world: World, task: ToyTask, count: int, each: Each) -> None:
    items = list(each(partial(_test_item, root / "video" / task.media_dir, world, task), count))
    write_json(root / "json" / f"{task.benchmark}.json", items)


def _test_item(media: Path, world: World, task: ToyTask, index: int) -> Fields:
    example, frames, bounds = world.clip(task, "test", index)
    file = f"{task.benchmark}_{index:05d}.mp4"
    write_video(media / file, frames, FPS)
    asked = example.asked[0]
    item = {"video": file, "question": asked.question, "candidates": list(asked.options), "answer": asked.answer}
    return {**item, **bounds}


def _write_pictures(root: Path, world: World, count: int, tellings: Tellings, each: Each) -> None:
    records = TrainingSet(world.seed)
    for example, medium in each(partial(_training_picture, root / "media", world), count):
        records.add(example, medium)
        tellings.add_picture(example, medium)
    records.write(root / "image" / PICTURES.corpus)


def _training_picture(media: Path, world: World, index: int) -> tuple[Example, Fields]:
    example, frame = world.picture(PICTURES, index)
    file = f"{Path(PICTURES.corpus).name}_{index:05d}.png"
    write_png(media / file, frame)
    return example, {"image": file}


def _write_texts(root: Path, world: World, task: ToyTask, count: int, each: Each) -> None:
    texts = list(each(partial(_texts, world, task), count))
    folder = root / "text" / Path(task.corpus).name
    for name, records in zip(("told", "letters"), zip(*texts, strict=True), strict=True):
        write_json(folder / f"{name}.json", list(records))


def _texts(world: World, task: ToyTask, index: int) -> tuple[Fields, Fields]:
    return record({}, text_conversation(world, task, index)), record({}, letters_conversation(world, task, index))


def _write_shards(folder: Path, world: World, count: int, each: Each) -> None:
    pairs = each(partial(_pair, world), count)
    for number in range(math.ceil(count / PER_SHARD)):
        write_shard(folder / f"{number:05d}.tar", islice(pairs, PER_SHARD))


def _pair(world: World, index: int) -> tuple[str, bytes, str]:
    example, frame = world.picture(PAIRS, index)
    return f"{index:06d}", png_bytes(frame), picture_caption(example.scene)


def _bytes(world: World, num_clips: int, num_train: int, *, long: bool) -> int:
    """How many bytes the world takes, rounded up, without benchmarks."""
    scale = (world.size / SIZE) ** 2
    frames = num_clips * (max(world.num_frames, NUM_LONG_FRAMES / 4) if long else world.num_frames)
    media = frames * FRAME_BYTES + 2 * num_train * PICTURE_BYTES
    return round(media * scale) + num_train * TEXT_BYTES + LANGUAGE_BYTES
