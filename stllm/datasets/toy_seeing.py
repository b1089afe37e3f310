"""Single frames of the toy world with all that is seen in them, for the vision encoder's own stage.

What EVA-CLIP and BLIP-2's Q-Former bring along from millions of pictures, the tiny ones learn from these. Every frame
is drawn when it is asked for, so that none is seen twice. B frames, P patches, H shapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from stllm.datasets.toy_clips import split_of
from stllm.datasets.toy_questions import Generator, pick
from stllm.datasets.toy_scenes import COLORS, PATTERNS, SHAPES, UNITS, Scene, follow, render
from stllm.datasets.toy_tasks import PICTURES, RARE, TASKS

PICTURE_SHARE = 0.5  # of the frames; the others are of clips
LEAST_RADIUS = 6.0  # units: as far from a thing's middle, a patch is taken to show it
NUM_COLORS = 1 + len(COLORS)  # 0: nothing there
NUM_SHAPES = 1 + len(SHAPES)
NUM_PATTERNS, NUM_PLACES = len(PATTERNS), 8
LEVELS = np.array(list(COLORS.values()), float)  # (colors, 3)


@dataclass(frozen=True)
class Seen:
    """Frames and what is seen in them. Places are (x, y) in eighths of the picture's side.

    frames: (B, S, S, 3) uint8. Patches: colors and shapes (B, P), numbers of their tables from 1 on, 0 where nothing
    is; places (B, P, 2) of the middle of what is there, from the picture's. Slots, one a shape, for no scene has two of
    one: slot_colors (B, H), slot_places (B, H, 2), whole eighths. patterns: (B,), of the background.
    """

    frames: Tensor
    colors: Tensor
    shapes: Tensor
    places: Tensor
    slot_colors: Tensor
    slot_places: Tensor
    patterns: Tensor


class SeenFrames(IterableDataset[Seen]):
    """Batches without an end. size, patch: pixels a side."""

    def __init__(self, *, size: int, patch: int, batch: int, seed: int) -> None:
        self.size, self.grid, self.batch, self.seed = size, size // patch, batch, seed

    def __iter__(self) -> Iterator[Seen]:
        worker = get_worker_info()
        generator = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            drawn = [self._frame(generator) for _ in range(self.batch)]
            yield Seen(*(torch.as_tensor(np.stack(part)) for part in zip(*drawn, strict=True)))

    def _frame(self, generator: Generator) -> tuple[np.ndarray, ...]:
        task = PICTURES if generator.random() < PICTURE_SHARE else pick(generator, (*TASKS, RARE))
        while split_of(scene := task.make(generator).scene) != "train":
            pass
        time = generator.random(1)
        frame = render(scene, times=time, size=self.size, generator=generator)[0]
        return frame, *labels(scene, time, self.grid)


def labels(scene: Scene, time: np.ndarray, grid: int) -> tuple[np.ndarray, ...]:
    """What is seen at a time, (1,), a part of the clip: the parts of `Seen` after its frames, without B."""
    middles = (np.arange(grid) + 0.5) * (UNITS / grid)
    across, down = np.meshgrid(middles, middles)
    colors, shapes = np.zeros((grid, grid), int), np.zeros((grid, grid), int)
    places = np.zeros((grid, grid, 2), np.float32)
    slot_colors, slot_places = np.zeros(len(SHAPES), int), np.zeros((len(SHAPES), 2), int)
    for thing in scene.things:
        track = follow(thing, time)
        if track.opacity[0] <= 0.5:
            continue
        color = 1 + int(np.abs(LEVELS - track.color[0]).sum(1).argmin())
        slot = list(SHAPES).index(thing.shape)
        place = np.array([track.x[0], track.y[0]]) * (NUM_PLACES / UNITS)
        covered = np.hypot(across - track.x[0], down - track.y[0]) < max(track.radius[0], LEAST_RADIUS)
        colors[covered], shapes[covered], places[covered] = color, 1 + slot, place - NUM_PLACES / 2
        slot_colors[slot], slot_places[slot] = color, place.astype(int).clip(0, NUM_PLACES - 1)
    background = scene.background if scene.cut is None or time[0] < scene.cut.time else scene.cut.background
    pattern = np.array(list(PATTERNS).index(background.pattern))
    return colors.ravel(), shapes.ravel(), places.reshape(-1, 2), slot_colors, slot_places, pattern
