"""Clips of the toy world, drawn by number: a seed, a task's name and a number determine a clip.

The scene's digest decides whether it belongs to training or test. So no test shows a scene from training, for any
seeds and numbers of clips.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from stllm.datasets.samples import keyed_numpy
from stllm.toy.questions import Example
from stllm.toy.scenes import Scene, frame_times, render
from stllm.toy.tasks import ToyTask

NUM_FRAMES, NUM_LONG_FRAMES = 16, 64
FPS = 4  # 16 frames last 4 seconds: one frame a second is MVBench's least
SIZE = 64  # pixels a side
TEST_SHARE = 4  # every fourth scene is one for testing


@dataclass(frozen=True)
class World:
    """Examples and their frames by number. num_frames: of a clip of the usual length; size: pixels a side."""

    seed: int
    num_frames: int
    size: int = SIZE

    def draw(self, task: ToyTask, split: str, index: int) -> tuple[Example, np.random.Generator]:
        """Example `index` of a task's "train" or "test" part, and the generator of its noise."""
        generator = keyed_numpy(self.seed, zlib.crc32(f"{split}/{task.corpus}".encode()), index)
        while True:
            example = task.make(generator)
            if split_of(example.scene) == split:
                return example, generator

    def clip(
        self, task: ToyTask, split: str, index: int, fps: float = FPS
    ) -> tuple[Example, np.ndarray, dict[str, float]]:
        """An example, its frames, (T, S, S, 3) uint8 RGB, and its bounds in seconds, if it has any, as start and end.

        fps: at which the frames will be played.
        """
        example, generator = self.draw(task, split, index)
        count = min(round(example.length * self.num_frames), NUM_LONG_FRAMES)
        frames = render(example.scene, times=frame_times(count), size=self.size, generator=generator)
        if example.bounds is None:
            return example, frames, {}
        start, end = (round(part * count / fps, 3) for part in example.bounds)
        return example, frames, {"start": start, "end": end}

    def picture(self, task: ToyTask, index: int) -> tuple[Example, np.ndarray]:
        """A training example of one frame, and the frame."""
        example, generator = self.draw(task, "train", index)
        return example, render(example.scene, times=frame_times(1), size=self.size, generator=generator)[0]


def split_of(scene: Scene) -> str:
    """The part that a scene belongs to, "train" or "test"."""
    return "train" if scene.digest() % TEST_SHARE else "test"
