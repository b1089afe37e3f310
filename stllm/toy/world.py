"""`stllm toy --output DIR`: write a small rendered world for training and tests, in the layouts of the real data sets.

DIR/vc2                                  VideoChat2-IT, see annotations.py; media in DIR/vc2/media
DIR/mvbench/json/<task>.json             MVBench; media in DIR/mvbench/video/<MVBench's own folder>
DIR/images/{00000..}.tar                 image-text shards of the first stage
DIR/language_model, DIR/qformer_tokenizer    tiny replacements of Vicuna and bert-base-uncased
DIR/toy_world.json                       the settings of the world
DIR/benchmarks/{mvbench,vcgbench,...}    with --benchmarks: a toy version of every benchmark, see benchmarks.py

Clips have --num-frames frames; clips with bounds have 1.5 times as many, at most 64. --long adds a training set and a
test of 64-frame clips with rare events, so that a model can learn both lengths from one world. With --num-frames 64,
all clips have 64 frames.
"""

import argparse
import json
import math
import shlex
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stllm.common.distributed import mapping, one_a_core
from stllm.common.errors import UserError
from stllm.common.files import check_new, new_folder, user_path
from stllm.common.registry import templates
from stllm.toy.annotations import Fields, Records, follow_turn, times_of, training_records
from stllm.toy.benchmarks import benchmark_bytes, mvbench_item, num_benchmark_clips, write_benchmarks
from stllm.toy.media import annotation_files, encoder, png_bytes, write_shard, write_video
from stllm.toy.questions import picture_caption
from stllm.toy.tasks import FPS, NUM_FRAMES, NUM_LONG_FRAMES, PICTURES, RARE, SIZE, TASKS, ToyTask, World

ABOUT = "toy_world.json"  # its presence marks a folder as a toy world
PER_SHARD = 500
SMALL = 500  # for fewer clips, one process is faster than several
MAX_WORKERS = 16  # processes by default
PAIRS = replace(PICTURES, corpus="images")  # the shards have other pictures than the instruction data
TESTED = tuple(task for task in TASKS if task.benchmark)

# sizes in bytes, rounded up: a frame of a clip, a picture of SIZE, its texts, the language model with tokenizers
FRAME_BYTES, PICTURE_BYTES, TEXT_BYTES, LANGUAGE_BYTES = 1500, 12_000, 24_000, 6_000_000

NUM_TEXTS = 40  # examples of each task from which the vocabularies are made; they contain every word
LLM_TOKENS = 1024  # maximum
QFORMER_TOKENS = 512  # exact number without [DEC]; as in BERT's vocabulary, unused tokens fill it
QFORMER_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,  # chosen here: fewer weights for the small vocabulary
    "num_attention_heads": 4,
    "initializer_range": 0.14,  # with 0.07, attention starts less sharp, and the model learns much later
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def run(args: argparse.Namespace) -> int:
    """Run the command: write the world, and print its size and the command that trains on it."""
    target = user_path(args.output)
    small = args.num_workers is None and args.num_train + args.num_test < SMALL  # starting processes would take longer
    train, test = write_world(
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
    print(
        f"written to {target}: {sum(train)} training clips of {len(train)} sets, {sum(test)} test clips of {len(test)}"
    )
    if args.benchmarks:
        print(f"toy benchmarks, {args.benchmarks} items a task: {target / 'benchmarks'}")
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
) -> tuple[list[int], list[int]]:
    """Write the world to the folder `target`. An interrupted call writes nothing.

    Return the number of clips of each training set and of each test.

    num_train, num_test: total number of clips, divided among the tasks, at least one for each. num_train is also the
    number of training pictures and of image-text pairs.
    num_frames: frames of a clip of the usual length. size: height and width in pixels.
    long: add rare events in clips of 64 frames. benchmarks: items per task of the toy benchmarks; 0: none.
    overwrite: replace an existing world when the new one is complete.
    num_workers: number of drawing processes; 0: only this process. The result does not depend on it.
    Raises UserError for a target that is not empty and for a full disk; the target is then unchanged.
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
    tasks, tested = ((*TASKS, RARE), (*TESTED, RARE)) if long else (TASKS, TESTED)
    train, test = shares(num_train, tasks), shares(num_test, tested)
    num_clips = sum(train) + sum(test)
    frames = num_clips * (max(num_frames, NUM_LONG_FRAMES / 4) if long else num_frames)
    media = (frames * FRAME_BYTES + 2 * num_train * PICTURE_BYTES) * (size / SIZE) ** 2
    needed = round(media) + num_train * TEXT_BYTES + LANGUAGE_BYTES + benchmark_bytes(benchmarks, num_frames)
    total = num_clips + 2 * num_train + num_benchmark_clips(benchmarks)
    encoder(".mp4")  # log a missing H.264 encoder here, once, and not in each worker
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
    return train, test


def shares(total: int, tasks: tuple[ToyTask, ...]) -> list[int]:
    """Divide a number of clips among the tasks as evenly as possible, at least one for each."""
    return [max(1, (total + number) // len(tasks)) for number in reversed(range(len(tasks)))]


# ---- run in worker processes: each writes one medium and returns (annotation file, record) pairs ---------------------


def _training_clip(root: Path, world: World, task: ToyTask, index: int) -> Records:
    example, frames, bounds = world.clip(task, "train", index)
    medium: Fields = {"video": f"{Path(task.corpus).name}_{index:05d}.mp4", **bounds}
    write_video(root / "vc2" / "media" / medium["video"], frames, FPS)
    times = times_of(example) if task != RARE else []  # a few frames may miss a rare event
    return training_records(f"vc2/video/{task.corpus}", example, medium, times)


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
    return training_records(f"vc2/image/{PICTURES.corpus}", example, medium, [0.5])


def _pair(world: World, index: int) -> tuple[str, bytes, str]:
    example, frame = world.picture(PAIRS, index)
    return f"{index:06d}", png_bytes(frame), picture_caption(example.scene)


# ---- a tiny LLaMA with random weights, and two tokenizers with the words of the world --------------------------------

# They replace Vicuna and bert-base-uncased, in the same layouts, so that a tiny model uses the same code. Both
# tokenizers are the same for every world. The Q-Former's vocabulary has a fixed size, which configurations contain.


def world_texts() -> Iterator[str]:
    """Yield the texts for the tokenizers: questions with options, answers, and prompts of all templates."""
    for number, task in enumerate((*TASKS, RARE, PICTURES)):
        for index in range(NUM_TEXTS):
            generator = np.random.default_rng([number, index])
            example = task.make(generator)
            paths = (follow_turn(thing, times_of(example)) for thing in example.scene.things)
            for turn in (*example.turns, *paths):
                yield from (turn.instruction, turn.question, turn.answer or "")
    for name in templates.names():
        template = templates.get(name)
        yield from (template.system, template.followup, *template.opening, *template.text_opening)


def write_language_model(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Write a LLaMA of about a million parameters and its tokenizer: config.json, model.safetensors, tokenizer.json.

    texts: texts for the vocabulary. seed: seed of the weights.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # bytes, so that every text has tokens; a space is added in front, as in LLaMA's tokenizer
    bytes_of_text = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = Tokenizer(models.BPE())
    # A word at the beginning of a line gets its usual token. "Assistant: " at the end of training's prompts gets the
    # same tokens as in the benchmarks' longer prompts. Otherwise the model would not apply in a benchmark what it
    # learned.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r" *\n *"), "\n "), normalizers.Replace(Regex(r" +\z"), "")]
    )
    tokenizer.pre_tokenizer = bytes_of_text
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n")])
    trainer = trainers.BpeTrainer(
        vocab_size=LLM_TOKENS,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(bytes_of_text.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(wrapped), **LLAMA)
        model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_qformer_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Write a BERT tokenizer with vocab.txt. Words of the world are single tokens; others are divided into letters."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import BertTokenizer

    normalize, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    letters = string.ascii_lowercase + string.digits
    characters = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    known = [*QFORMER_SPECIAL, *characters, *sorted(words - set(characters))]
    assert len(known) <= QFORMER_TOKENS, f"{len(known)} tokens"
    known += [f"[unused{number}]" for number in range(QFORMER_TOKENS - len(known))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(known) + "\n", encoding="utf-8")
    BertTokenizer(str(vocabulary), do_lower_case=True).save_pretrained(folder)
