"""Data pipeline: samples a second from mp4 files to training batches, with 0, 1 and 2 data workers.

Samples are read as in `stllm train`: sampled from a mixture, decoded, cropped, tokenized, masked and collated. The
videos are H.264 of 12 s, rendered for this measurement, with shapes that move over a noisy texture. Workers stay alive
between epochs, and the first epoch is not counted.

    python -m benchmarks.data_pipeline [--quick]
"""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import arguments, report, take_turns
from stllm.datasets.annotations import JsonRecords
from stllm.datasets.collate import Collator
from stllm.datasets.instruction import InstructionCorpus
from stllm.datasets.mixture import Mixture, MixturePart, MixtureSampler
from stllm.models.configuration import MASK_RATE_DEFAULTS, STLLMConfig
from stllm.models.video_inputs import num_visual_tokens
from stllm.processors.prompts import PromptProcessor
from stllm.processors.transforms import TrainTransform
from stllm.runners.trainer import KeyedLoader
from tests.helpers.videos import write_video

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SIZES = ((320, 240), (640, 360))
WORKERS = (0, 1, 2)
SEED = 0
NUM_FRAMES = 16  # sampled from each video
BATCH_SIZE = 2
NUM_SHAPES = 6


def pictures(num_frames: int, size: tuple[int, int], seed: int) -> Iterator[np.ndarray]:
    """Yield frames, (H, W, 3) uint8: discs of random colours move over a blocky texture, with noise."""
    generator = np.random.default_rng(seed)
    width, height = size
    texture = generator.integers(40, 200, (height // 20, width // 20, 3)).repeat(20, axis=0).repeat(20, axis=1)
    texture = np.pad(texture, ((0, height - len(texture)), (0, width - texture.shape[1]), (0, 0)), mode="edge")
    starts, speeds = generator.uniform(0, 1, (2, NUM_SHAPES)), generator.uniform(-0.01, 0.01, (2, NUM_SHAPES))
    radii, colours = generator.uniform(0.05, 0.15, NUM_SHAPES) * height, generator.integers(0, 256, (NUM_SHAPES, 3))
    rows, columns = np.ogrid[:height, :width]
    for number in range(num_frames):
        picture = texture + generator.integers(-6, 7, (height, width, 1))
        for (y, x), radius, colour in zip(((starts + number * speeds) % 1).T, radii, colours, strict=True):
            picture[(rows - y * height) ** 2 + (columns - x * width) ** 2 < radius**2] = colour
        yield picture.clip(0, 255).astype(np.uint8)


def write_corpus(folder: Path, *, size: tuple[int, int], num_videos: int, num_frames: int) -> Path:
    """Write videos, and four records about each in VideoChat2-IT's format. Returns the annotation file."""
    records = []
    for video in range(num_videos):
        # x264's usual distance between keyframes
        write_video(folder / f"{video}.mp4", size=size, frames=pictures(num_frames, size, seed=video), gop=250)
        pair = {"i": "watch the video and answer", "q": "what does the circle do", "a": "it moves to the square"}
        records += [{"video": f"{video}.mp4", "QA": [pair]}] * 4
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


def new_loader(annotations: Path, num_workers: int) -> KeyedLoader:
    """Return a loader as the Trainer builds it, with the tokenizers of the tests."""
    config = STLLMConfig(
        vision_config={"image_size": 224}, qformer_config={"vocab_size": 163, "max_position_embeddings": 64}
    )
    processor = PromptProcessor.from_pretrained(
        GOLDEN / "instructblip_residual_mvm",
        config=config,
        qformer_tokenizer=GOLDEN / "foreign" / "bert" / "vocab.txt",
    )
    corpus = InstructionCorpus(
        name="rendered",
        records=JsonRecords(annotations, media_dir=annotations.parent),
        num_frames=NUM_FRAMES,
        transform=TrainTransform(config.vision_config["image_size"]),
    )
    mixture = Mixture([MixturePart(corpus)], seed=SEED, max_tries=0)
    num_tokens = partial(num_visual_tokens, config)
    return KeyedLoader(
        mixture,
        batch_sampler=MixtureSampler(mixture, batch_size=BATCH_SIZE),
        collate_fn=Collator(processor, seed=SEED, num_tokens=num_tokens, mask_rate=MASK_RATE_DEFAULTS),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def read_all(loader: KeyedLoader) -> None:
    """Read all batches of one epoch."""
    for batch in loader:
        assert batch["pixel_values"].shape[:2] == (BATCH_SIZE, NUM_FRAMES) and not batch["failures"]


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "")
    files = {"num_videos": 2, "num_frames": 100} if args.quick else {"num_videos": 6, "num_frames": 300}
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            annotations = write_corpus(Path(folder), size=size, **files)
            loaders = {workers: new_loader(annotations, workers) for workers in WORKERS}
            num_samples = len(loaders[0]) * BATCH_SIZE
            works = {str(workers): lambda loader=loader: read_all(loader) for workers, loader in loaders.items()}
            for workers, spent in (times := take_turns(works)).items():
                rows.append(
                    {
                        "video": f"{size[0]}x{size[1]}",
                        "workers": workers,
                        "samples/s": num_samples / spent,
                        "frames/s": num_samples * NUM_FRAMES / spent,
                        "speed-up": times["0"] / spent,
                    }
                )
            del loaders, works  # ends the workers
    sizes = {"frames a clip": NUM_FRAMES, "batch": BATCH_SIZE, **files, "image size": 224}
    report("data_pipeline", "no workers: the training process reads for itself", rows, sizes, args.output_dir)


if __name__ == "__main__":
    main()
