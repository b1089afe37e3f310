"""Pictures of the toy world: where things are in words, one caption, and questions that one frame answers."""

from collections.abc import Sequence

from stllm.processors.templates import Turn
from stllm.toy.draws import a_scene, several
from stllm.toy.questions import Asked, Example, Generator, ask, ask_among, ask_whether, pick, shuffled
from stllm.toy.scenes import COLORS, PATTERNS, SHAPES, UNITS, Scene, Thing

IMAGE_INSTRUCTIONS = ("Describe the image.", "What is in the image?", "Give a caption of this image.")
THIRDS = (13, 32, 51)  # the middles of a picture's thirds, in units
ROWS = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
PLACES = {place: (x, y) for y, row in zip(THIRDS, ROWS, strict=True) for x, place in zip(THIRDS, row, strict=True)}
COUNTS = ("1", "2", "3", "4")


def picture(generator: Generator) -> Example:
    """A single picture: many questions about it, and its caption."""
    still: tuple[()] = ()
    things = several(generator, [still] * int(generator.integers(1, 5)), places=tuple(PLACES.values()), radii=(5, 10))
    scene = a_scene(generator, *things)
    about = pick(generator, things)
    asked = [
        color_question(generator, about),
        _shape_question(generator, pick(generator, things)),
        _place_question(generator, pick(generator, things)),
        _at_question(generator, things),
        ask(generator, "How many things are there?", str(len(things)), COUNTS),
        *existence_questions(generator, things)[:1],
        ask_among(generator, "What is the background like?", scene.background.pattern, PATTERNS),
        *([_beside_question(generator, things)] if len(things) > 1 else []),
    ]
    text = picture_caption(scene)
    return Example(
        scene, text, tuple(shuffled(generator, asked)), (Turn("", text, pick(generator, IMAGE_INSTRUCTIONS)),)
    )


def picture_caption(scene: Scene) -> str:
    """One sentence that names everything in a picture, and where it is."""
    named = [f"a {thing.name} {place_of(thing)}" for thing in scene.things]
    text = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"{text[0].upper()}{text[1:]}. The background is {scene.background.pattern}."


def place_of(thing: Thing) -> str:
    """Its place in words: in which third of the picture it is, across and down."""
    return ROWS[thing.y * 3 // UNITS][thing.x * 3 // UNITS]


def color_question(generator: Generator, thing: Thing) -> Asked:
    """Of which color is the shape? There must be no other of that shape."""
    return ask_among(generator, f"What color is the {thing.shape}?", thing.color, COLORS)


def existence_questions(generator: Generator, things: Sequence[Thing]) -> list[Asked]:
    """Is it there? One question about a thing that is, one about a thing that is not, in any order.

    What is absent has a color that is nowhere, or one thing's color and another one's shape.
    """
    present = pick(generator, things).name
    nowhere = [color for color in COLORS if color not in {thing.color for thing in things}]
    absent = f"{pick(generator, nowhere)} {pick(generator, SHAPES)}"
    if len(things) > 1 and generator.integers(2):
        first, second = shuffled(generator, things)[:2]
        absent = f"{first.color} {second.shape}"
    return shuffled(
        generator,
        [ask_whether(generator, f"Is there a {name}?", there) for name, there in ((present, True), (absent, False))],
    )


def _shape_question(generator: Generator, thing: Thing) -> Asked:
    return ask(generator, f"Which shape is {thing.color}?", f"the {thing.shape}", [f"the {shape}" for shape in SHAPES])


def _place_question(generator: Generator, thing: Thing) -> Asked:
    return ask_among(generator, f"Where is the {thing.name}?", place_of(thing), PLACES)


def _at_question(generator: Generator, things: Sequence[Thing]) -> Asked:
    """What is at a place? Other colors and shapes, also those of the other things, are among the options."""
    thing = pick(generator, things)
    others = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    present = [f"a {other.name}" for other in things if other is not thing]
    wrong = [*present, *(name for name in shuffled(generator, others) if name not in (*present, f"a {thing.name}"))]
    return ask(generator, f"What is {place_of(thing)}?", f"a {thing.name}", [f"a {thing.name}", *wrong[:3]])


def _beside_question(generator: Generator, things: Sequence[Thing]) -> Asked:
    """On which side of another is it? Only where they are apart across or down, and not both ways alike."""
    first, second = shuffled(generator, things)[:2]
    right, down = first.x - second.x, first.y - second.y
    across = abs(right) >= abs(down)
    side = ("right of" if right > 0 else "left of") if across else ("below" if down > 0 else "above")
    sides = ("left of", "right of") if across else ("above", "below")
    question = f"Is the {first.name} {sides[0]} or {sides[1]} the {second.name}?"
    return ask(generator, question, side, sides)
