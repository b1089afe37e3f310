"""Views of a clip: its frames as they are, or with their order or their content taken away.

Comparing answers across views shows whether a model uses time at all. A view changes what was sampled already, so every
view but the last two shows the same frames. T frames.
"""

import hashlib
from collections.abc import Callable

from torch import Tensor

from stllm.common.errors import UserError, unknown_name

FORWARD, REVERSED, SHUFFLED, SINGLE, BLANK = VIEWS = ("forward", "reversed", "shuffled", "single", "blank")
MEAN_COLOUR = (123, 117, 104)  # of CLIP's pictures: near zero when normalised
SHUFFLE_KEY = "shuffled frames"  # with the number of frames, it fixes the shuffle of every run


def check_view(view: str) -> None:
    """Raises UserError for a view that is not one of `VIEWS`."""
    if view not in VIEWS:
        raise UserError(unknown_name("view", view, VIEWS))


def view_order(view: str, num_frames: int) -> list[int]:
    """The number of the sampled frame at each of T places. Raises UserError for an unknown view.

    forward and blank: as sampled. reversed: last first. shuffled: a fixed permutation, the same in every run.
    single: the middle frame at every place. The model then reads as many visual tokens as before, through the same
        layers and whatever its video input is, so that nothing but what the frames show has changed.
    """
    check_view(view)
    places = list(range(num_frames))
    orders: dict[str, Callable[[], list[int]]] = {
        REVERSED: lambda: places[::-1],
        SHUFFLED: lambda: sorted(places, key=lambda place: _draw(num_frames, place)),
        SINGLE: lambda: [num_frames // 2] * num_frames,
    }
    return orders.get(view, lambda: places)()


def view_frames(view: str, frames: Tensor) -> Tensor:
    """The frames as that view shows them. frames: (T, 3, S, S) uint8."""
    if view == BLANK:
        return frames.new_tensor(MEAN_COLOUR)[:, None, None].expand_as(frames)
    return frames if view == FORWARD else frames[view_order(view, len(frames))]


def _draw(num_frames: int, place: int) -> bytes:
    """A random key that needs no generator, so no library's version changes it."""
    return hashlib.blake2b(f"{SHUFFLE_KEY} {num_frames} {place}".encode(), digest_size=8).digest()
