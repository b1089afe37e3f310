"""`stllm toy --output DIR`: a small rendered world to train and test on, in the layouts of the real data sets.

    DIR/vc2/video/<kind>/<set>/train.json    VideoChat2-IT, media in DIR/vc2/media
    DIR/vc2/image/<kind>/<set>/train.json    the same with pictures
    DIR/mvbench/json/<task>.json             MVBench, media in DIR/mvbench/video/<MVBench's own folder>
    DIR/images/{00000..}.tar                 image-text shards of the first stage
    DIR/language_model, DIR/qformer_tokenizer    what stands for Vicuna and bert-base-uncased

Everything is keyed by the seed and its own number. A scene's digest alone says whether it belongs to training or to
testing, so that nothing seen in training, of whatever seed and number of clips, is ever tested.
"""

import argparse
import json
import shlex
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stllm.common.files import check_new, new_folder
from stllm.datasets.samples import keyed_numpy
from stllm.datasets.toy_language import world_texts, write_language_model, write_qformer_tokenizer
from stllm.datasets.toy_media import png_bytes, write_mp4, write_shard
from stllm.datasets.toy_scenes import Scene, render
from stllm.datasets.toy_tasks import PICTURES, TASKS, Example, ToyTask, picture_caption

NUM_FRAMES, NUM_LONG_FRAMES = 16, 64
FPS = 4  # 16 frames last 4 seconds: one frame a second is MVBench's least
SIZE = 64  # pixels a side
PER_SHARD = 500
TEST_SHARE = 4  # every fourth scene is one for testing
PAIRS = replace(PICTURES, corpus="images")  # of the shards: drawn apart from the instruction set's
TESTED = tuple(task for task in TASKS if task.benchmark)

# Bytes, rounded up: a frame of a clip, a picture, the language model with both tokenizers
FRAME_BYTES, PICTURE_BYTES, LANGUAGE_BYTES = 1500, 12_000, 5_000_000


@dataclass(frozen=True)
class World:
    """What is drawn, by numbers. num_frames: of a clip of the usual length."""

    seed: int
    num_frames: int

    def draw(self, task: ToyTask, split: str, index: int) -> tuple[Example, np.random.Generator]:
        """Example `index` of a task's "train" or "test" part, and the generator of its noise."""
        generator = keyed_numpy(self.seed, zlib.crc32(f"{split}/{task.corpus}".encode()), index)
        while True:
            example = task.make(generator)
            if split_of(example.scene) == split:
                return example, generator

    def clip(self, task: ToyTask, split: str, index: int) -> tuple[Example, np.ndarray, dict[str, float]]:
        """An example, its frames, and its bounds as annotations give them, {} without."""
        example, generator = self.draw(task, split, index)
        count = round(example.length * self.num_frames)
        frames = render(example.scene, num_frames=count, size=SIZE, generator=generator)
        if example.bounds is None:
            return example, frames, {}
        start, end = (round(part * count / FPS, 3) for part in example.bounds)
        return example, frames, {"start": start, "end": end}

    def picture(self, task: ToyTask, index: int) -> tuple[Example, np.ndarray]:
        """A training example of one frame, and the frame."""
        example, generator = self.draw(task, "train", index)
        return example, render(example.scene, num_frames=1, size=SIZE, generator=generator)[0]


def run(args: argparse.Namespace) -> int:
    """The command: writes the world, says what is in it and what can be done with it."""
    target = Path(args.output).expanduser()
    write_world(target, num_train=args.num_train, num_test=args.num_test, seed=args.seed or 0, long=args.long)
    num_train, num_test = sum(shares(args.num_train, TASKS)), sum(shares(args.num_test, TESTED))
    print(
        f"written to {target}: {num_train} training clips of {len(TASKS)} sets, {num_test} test clips of {len(TESTED)}"
    )
    print(f"train on it: TOY_ROOT={shlex.quote(str(target))} stllm train --cfg-path configs/tiny/train.yaml")
    return 0


def write_world(target: Path, *, num_train: int, num_test: int, seed: int, long: bool = False) -> None:
    """Writes the whole world into the new folder `target`.

    num_train, num_test: clips in all, dealt out among the tasks, at least one of each. long: of 64 frames, not 16.
    Raises UserError for a target that is not empty and for a full disk; the target is then as it was.
    """
    check_new(target, "--output")
    world = World(seed, NUM_LONG_FRAMES if long else NUM_FRAMES)
    num_clips = sum(shares(num_train, TASKS)) + sum(shares(num_test, TESTED))
    num_pictures = shares(num_train, TASKS)[0]
    needed = num_clips * world.num_frames * FRAME_BYTES + (num_train + num_pictures) * PICTURE_BYTES + LANGUAGE_BYTES
    with (
        new_folder(target, needed) as folder,
        tqdm(desc="toy world", total=num_clips + num_pictures + num_train, disable=None, delay=1, leave=False) as bar,
    ):
        _write_language(folder, seed)
        for task, count in zip(TASKS, shares(num_train, TASKS), strict=True):
            _write_training_set(folder / "vc2", world, task, count, bar.update)
        for task, count in zip(TESTED, shares(num_test, TESTED), strict=True):
            _write_benchmark(folder / "mvbench", world, task, count, bar.update)
        _write_pictures(folder / "vc2", world, num_pictures, bar.update)
        _write_shards(folder / "images", world, num_train, bar.update)


def split_of(scene: Scene) -> str:
    """To which part a scene belongs, "train" or "test", whoever draws it."""
    return "train" if scene.digest() % TEST_SHARE else "test"


def shares(total: int, tasks: tuple[ToyTask, ...]) -> list[int]:
    """How many of them each task gets: as even as can be, and at least one."""
    return [max(1, (total + number) // len(tasks)) for number in reversed(range(len(tasks)))]


def _write_language(folder: Path, seed: int) -> None:
    texts = list(world_texts())
    write_language_model(folder / "language_model", texts, seed)
    write_qformer_tokenizer(folder / "qformer_tokenizer", texts)


def _write_training_set(root: Path, world: World, task: ToyTask, count: int, done: Callable[[], Any]) -> None:
    media, name = _folder(root / "media"), Path(task.corpus).name
    records = []
    for index in range(count):
        example, frames, bounds = world.clip(task, "train", index)
        file = f"{name}_{index:05d}.mp4"
        write_mp4(media / file, frames, FPS)
        records.append({"video": file, "QA": _qa(example), **bounds})
        done()
    _write_json(root / "video" / task.corpus / "train.json", records)


def _write_benchmark(root: Path, world: World, task: ToyTask, count: int, done: Callable[[], Any]) -> None:
    media = _folder(root / "video" / task.media_dir)
    items = []
    for index in range(count):
        example, frames, bounds = world.clip(task, "test", index)
        file = f"{task.benchmark}_{index:05d}.mp4"
        write_mp4(media / file, frames, FPS)
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
    _write_json(root / "json" / f"{task.benchmark}.json", items)


def _write_pictures(root: Path, world: World, count: int, done: Callable[[], Any]) -> None:
    media, name = _folder(root / "media"), Path(PICTURES.corpus).name
    records = []
    for index in range(count):
        example, frame = world.picture(PICTURES, index)
        file = f"{name}_{index:05d}.png"
        (media / file).write_bytes(png_bytes(frame))
        records.append({"image": file, "QA": _qa(example)})
        done()
    _write_json(root / "image" / PICTURES.corpus / "train.json", records)


def _write_shards(folder: Path, world: World, count: int, done: Callable[[], Any]) -> None:
    def pairs(first: int) -> Iterator[tuple[str, np.ndarray, str]]:
        for index in range(first, min(first + PER_SHARD, count)):
            example, frame = world.picture(PAIRS, index)
            yield f"{index:06d}", frame, picture_caption(example.scene.things)
            done()

    _folder(folder)
    for number, first in enumerate(range(0, count, PER_SHARD)):
        write_shard(folder / f"{number:05d}.tar", pairs(first))


def _qa(example: Example) -> list[dict[str, str | None]]:
    return [{"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in example.turns]


def _write_json(path: Path, content: list[dict[str, Any]]) -> None:
    _folder(path.parent)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
