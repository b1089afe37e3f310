"""Single frames of the toy world with all that is seen in them, for the vision encoder's own stage.

What EVA-CLIP and BLIP-2's Q-Former bring along from millions of pictures, the tiny ones learn from these. Every frame
is drawn when it is asked for, by its key, so that none is seen twice. B frames, P patches, H shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stllm.datasets.collate import stacked
from stllm.datasets.samples import Sample, SampleKey
from stllm.processors.transforms import EvalTransform
from stllm.toy.clips import split_of
from stllm.toy.questions import Generator, pick
from stllm.toy.scenes import COLORS, PATTERNS, SHAPES, UNITS, Scene, follow, nearest_colors, render
from stllm.toy.tasks import PICTURES, RARE, TASKS

EPOCH = 100_000  # frames; the next epoch's are others
PICTURE_SHARE = 0.5  # of the frames; the others are of clips
LEAST_RADIUS = 6.0  # units: as far from a thing's middle, a patch is taken to show it
NUM_COLORS = 1 + len(COLORS)  # 0: nothing there
NUM_SHAPES = 1 + len(SHAPES)
NUM_PATTERNS, NUM_PLACES = len(PATTERNS), 8
WORDS = (6, 16)  # random words read by a Q-Former that reads text: the fewest, and one more than the most


class Seen(NamedTuple):
    """What is seen in frames. Places are (x, y) in eighths of the picture's side.

    Patches: colors and shapes (B, P), numbers of their tables from 1 on, 0 where nothing is; places (B, P, 2) of the
    middle of what is there, from the picture's. Slots, one a shape, for no scene has two of one: slot_colors (B, H),
    slot_places (B, H, 2), whole eighths. patterns: (B,), of the background.
    """

    colors: Tensor
    shapes: Tensor
    places: Tensor
    slot_colors: Tensor
    slot_places: Tensor
    patterns: Tensor


@dataclass(kw_only=True)
class SeenFrame(Sample):
    """One frame: pixel_values (1, 3, S, S), and what is seen in it, without B.

    words: (L,), random, so that what is seen comes to depend on none of them.
    """

    seen: Seen
    words: Tensor


class SeenFrames:
    """A data set without files. size, patch: pixels a side. vocab_size: of the words."""

    name = "toy_seeing"
    media: str | None = "image"

    def __init__(self, *, size: int, patch: int, vocab_size: int) -> None:
        self.size, self.grid, self.vocab_size = size, size // patch, vocab_size
        self.transform = EvalTransform(size)

    def __len__(self) -> int:
        return EPOCH

    def load(self, key: SampleKey, generator: Generator) -> SeenFrame:
        """Another frame for every generator; of the key only the name is made."""
        task = PICTURES if generator.random() < PICTURE_SHARE else pick(generator, (*TASKS, RARE))
        while split_of(scene := task.make(generator).scene) != "train":
            pass
        time = generator.random(1)
        frame = render(scene, times=time, size=self.size, generator=generator)[0]
        return SeenFrame(
            key,
            f"frame {key.index} of epoch {key.epoch}",
            (),
            self.media,
            pixel_values=self.transform(frame)[None],
            seen=labels(scene, time, self.grid),
            words=torch.as_tensor(generator.integers(self.vocab_size, size=generator.integers(*WORDS))),
        )


def collate(frames: Sequence[SeenFrame]) -> dict[str, Any]:
    """A DataLoader's `collate_fn`: frames to the arguments of `SeeingModel.forward`, and names and failures."""
    words = [frame.words for frame in frames]
    seen = Seen(*(torch.stack(part) for part in zip(*(frame.seen for frame in frames), strict=True)))
    return {
        **stacked(frames),  # pixel_values: (B, 1, 3, S, S)
        "qformer_input_ids": pad_sequence(words, batch_first=True),
        "qformer_attention_mask": pad_sequence([torch.ones_like(row) for row in words], batch_first=True),
        "seen": seen._asdict(),
        "labels": seen.patterns,
        "names": [frame.name for frame in frames],
        "failures": [failure for frame in frames for failure in frame.failures],
    }


def labels(scene: Scene, time: np.ndarray, grid: int) -> Seen:
    """What is seen at a time, (1,), a part of the clip; without B."""
    middles = (np.arange(grid) + 0.5) * (UNITS / grid)
    across, down = np.meshgrid(middles, middles)
    colors, shapes = np.zeros((grid, grid), int), np.zeros((grid, grid), int)
    places = np.zeros((grid, grid, 2), np.float32)
    slot_colors, slot_places = np.zeros(len(SHAPES), int), np.zeros((len(SHAPES), 2), int)
    for thing in scene.things:
        track = follow(thing, time)
        if track.opacity[0] <= 0.5:
            continue
        color = 1 + int(nearest_colors(track.color)[0])
        slot = list(SHAPES).index(thing.shape)
        place = np.array([track.x[0], track.y[0]]) * (NUM_PLACES / UNITS)
        covered = np.hypot(across - track.x[0], down - track.y[0]) < max(track.radius[0], LEAST_RADIUS)
        colors[covered], shapes[covered], places[covered] = color, 1 + slot, place - NUM_PLACES / 2
        slot_colors[slot], slot_places[slot] = color, place.astype(int).clip(0, NUM_PLACES - 1)
    background = scene.background if scene.cut is None or time[0] < scene.cut.time else scene.cut.background
    pattern = np.array(list(PATTERNS).index(background.pattern))
    parts = (colors.ravel(), shapes.ravel(), places.reshape(-1, 2), slot_colors, slot_places, pattern)
    return Seen(*map(torch.as_tensor, parts))
