"""The toy world in words alone: a scene told, then asked about, for the language model's own first stage.

A scene is told by what happens ("A red circle jumps, then it grows.") or frame by frame, as a model sees it, so that
what happens has to be found out. Questions and options are those of clips and pictures.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stllm.conversation.templates import Turn
from stllm.datasets.toy_clips import World
from stllm.datasets.toy_questions import OPTION_INSTRUCTION, Example, Generator
from stllm.datasets.toy_scenes import COLORS, UNITS, Scene, follow
from stllm.datasets.toy_tasks import PICTURES, RARE, TASKS, ToyTask

TELLING = tuple(task for task in (*TASKS, RARE, PICTURES) if not task.corpus.startswith(("caption/", "conversation/")))
BY_EVENTS = (RARE, PICTURES)  # a flash is too short to be told frame by frame
NUM_TOLD = 8  # frames
COLUMNS = ("far left", "left", "center", "right", "far right")
ROWS = ("top", "upper", "middle", "lower", "bottom")
SCENE_REQUEST, FRAMES_REQUEST = "Tell a scene.", "Tell a scene frame by frame."
STORY_REQUEST, VIDEO_REQUEST, PICTURE_REQUEST = (
    "What happens in the video?",
    "Tell the video frame by frame.",
    "Tell the image.",
)
GROWN = 1.3  # times its usual radius: from here on a thing is called big


def text_conversation(world: World, task: ToyTask, index: int) -> tuple[Turn, ...]:
    """A training conversation about a scene of a task of TELLING, see `tell`."""
    example, generator = world.draw(replace(task, corpus=f"text/{task.corpus}"), "train", index)
    return tell(example, task, generator)


def told(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The same conversation with its scene as the first answer, so that all of it is learned."""
    scene = turns[0].instruction.removesuffix(OPTION_INSTRUCTION).rstrip()
    request = FRAMES_REQUEST if scene.startswith("Frame 1:") else SCENE_REQUEST
    return (Turn(request, scene), *(replace(turn, instruction="") for turn in turns))


def tell(example: Example, task: ToyTask, generator: Generator) -> tuple[Turn, ...]:
    """Questions about an example after its scene in words, each once; half of the time in the benchmark's words.

    The scene stands in every turn's instruction: each can stand alone.
    """
    by_frames = task not in BY_EVENTS and generator.integers(2)
    scene = frames_in_words(example.scene, *(example.bounds or (0.0, 1.0))) if by_frames else example.story
    in_full = generator.integers(2)
    turns = replace(example, told=()).conversations(generator)[0]
    return tuple(
        replace(turn, instruction=f"{scene} {turn.instruction}" if in_full and turn.instruction else scene)
        for turn in turns
    )


def frames_in_words(scene: Scene, start: float = 0.0, end: float = 1.0, num_frames: int = NUM_TOLD) -> str:
    """What is seen where in each of some frames. start, end: parts of the clip."""
    times = start + (np.arange(num_frames) + 0.5) / num_frames * (end - start)
    seen: list[list[str]] = [[] for _ in times]
    for thing in scene.things:
        track = follow(thing, times)
        for number in np.flatnonzero(track.opacity > 0.5):
            size = "big " if track.radius[number] > GROWN * thing.radius else ""
            place = f"{_part(COLUMNS, track.x[number])} {_part(ROWS, track.y[number])}"
            seen[number].append(f"{size}{_color(track.color[number])} {thing.shape} {place}")
    if scene.cut is not None:
        for names, time in zip(seen, times, strict=True):
            names.append(f"{(scene.background if time < scene.cut.time else scene.cut.background).pattern} background")
    return " ".join(f"Frame {number}: {', '.join(names) or 'nothing'}." for number, names in enumerate(seen, start=1))


def _part(names: tuple[str, ...], place: float) -> str:
    return names[min(max(int(place / UNITS * len(names)), 0), len(names) - 1)]


def _color(levels: np.ndarray) -> str:
    """The nearest color's name."""
    return min(COLORS, key=lambda name: float(np.abs(levels - COLORS[name]).sum()))
