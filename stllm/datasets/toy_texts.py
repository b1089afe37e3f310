"""The toy world in words alone, for the language model's own first stage.

A scene is told by what happens, is told again, which teaches to look back, and is asked about as clips and pictures
are. Options are looked up, too: which letter stands before which answer is slow to be learned from choices alone.
"""

from dataclasses import replace

import numpy as np

from stllm.conversation.templates import Turn
from stllm.datasets.toy_clips import World
from stllm.datasets.toy_questions import NUM_OPTIONS, OPTION_REQUEST, Example, Generator, letters_text, pick, shuffled
from stllm.datasets.toy_scenes import COLORS, DIRECTIONS, PATTERNS, SHAPES, UNITS, Scene, follow
from stllm.datasets.toy_tasks import PICTURES, RARE, TASKS, ToyTask
from stllm.datasets.toy_video_questions import ACTIONS, MOVING

TELLING = tuple(task for task in (*TASKS, RARE, PICTURES) if not task.corpus.startswith(("caption/", "conversation/")))
COLUMNS = ("far left", "left", "center", "right", "far right")
ROWS = ("top", "upper", "middle", "lower", "bottom")
AGAIN_REQUEST, STORY_REQUEST, PICTURE_REQUEST = "Tell it again.", "What happens in the video?", "Tell the image."
QUESTIONS = 3  # about a scene, at most
LOOKUPS, CHOICES = 5, 3  # letters asked for at once; choices among the same options
WORDS = (*COLORS, *DIRECTIONS, *ACTIONS.values(), *PATTERNS, *MOVING, "yes", "no")


def text_conversation(world: World, task: ToyTask, index: int) -> tuple[Turn, ...]:
    """A training conversation about a scene of a task of TELLING: the scene told, told again, and asked about."""
    example, generator = world.draw(replace(task, corpus=f"text/{task.corpus}"), "train", index)
    return tell(example, generator)


def tell(example: Example, generator: Generator) -> tuple[Turn, ...]:
    """The scene told again, and questions openly, as choices, or both: what is answered can be looked up."""
    turns = [Turn(AGAIN_REQUEST, example.story, example.story)]
    other = 1 - int(generator.integers(2))
    for asked in shuffled(generator, [asked for asked in example.asked if asked.only != other])[:QUESTIONS]:
        openly, choice = asked.openly(), replace(asked.as_choice(), instruction="")
        turns += pick(generator, ((openly,), (choice,), (openly, choice)))
    return tuple(turns)


def letters_conversation(world: World, task: ToyTask, index: int) -> tuple[Turn, ...]:
    """The options of a question of a task of TELLING, or any words, looked up many times, then chosen from."""
    example, generator = world.draw(replace(task, corpus=f"letters/{task.corpus}"), "train", index)
    return look_up(example, generator)


def look_up(example: Example, generator: Generator) -> tuple[Turn, ...]:
    """Two turns of LOOKUPS letters each, and CHOICES in the words of a choice, whose answers are given."""
    asked = pick(generator, example.asked)
    if generator.integers(2):  # words that are seldom options together tell that all of them are to be looked at
        number = int(generator.integers(2, NUM_OPTIONS + 1))
        asked = replace(asked, options=tuple(shuffled(generator, WORDS)[:number]))
    first, second = _lookups(asked.options, generator), _lookups(asked.options, generator)
    chosen = (replace(asked, answer=pick(generator, asked.options)) for _ in range(CHOICES))
    return (
        replace(first, question=f"{letters_text(asked.options)}\n{first.question}"),
        second,
        *(Turn(f"It is: {choice.answer}. {OPTION_REQUEST}", choice.as_choice().answer) for choice in chosen),
    )


def _lookups(options: tuple[str, ...], generator: Generator) -> Turn:
    """Letters of some options; the same one may be asked for twice."""
    numbers = [int(number) for number in generator.integers(len(options), size=LOOKUPS)]
    named = ", ".join(options[number] for number in numbers)
    return Turn(f"Letters of {named}?", ", ".join(f"{options[number]} {chr(65 + number)}" for number in numbers))


def seen_in_words(scene: Scene, time: float = 0.5) -> str:
    """What is seen at a time, a part of the clip, shape by shape: "circle nothing, square red far left top, ..."."""
    seen = dict.fromkeys(SHAPES, "nothing")
    for thing in scene.things:
        track = follow(thing, np.array([time]))
        if track.opacity[0] > 0.5:
            seen[thing.shape] = f"{_color(track.color[0])} {_part(COLUMNS, track.x[0])} {_part(ROWS, track.y[0])}"
    return ", ".join(f"{shape} {words}" for shape, words in seen.items()) + "."


def _part(names: tuple[str, ...], place: float) -> str:
    return names[min(max(int(place / UNITS * len(names)), 0), len(names) - 1)]


def _color(levels: np.ndarray) -> str:
    """The nearest color's name."""
    return min(COLORS, key=lambda name: float(np.abs(levels - COLORS[name]).sum()))
