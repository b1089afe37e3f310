"""Views of a clip: its frames unchanged, in another order, or without their content.

Comparing answers across views shows whether a model uses the order of the frames. A view is applied after sampling:
forward, reversed and shuffled show the same T frames, single repeats one of them, and blank shows none.
"""

import hashlib
from collections.abc import Callable

from torch import Tensor

from stllm.common.errors import UserError, unknown_name

FORWARD, REVERSED, SHUFFLED, SINGLE, BLANK = VIEWS = ("forward", "reversed", "shuffled", "single", "blank")
MEAN_COLOUR = (123, 117, 104)  # mean of CLIP's training images; near zero when normalised
SHUFFLE_KEY = "shuffled frames"  # seed of the permutation, together with the number of frames


def check_view(view: str) -> None:
    """Raise UserError if the view is not one of `VIEWS`."""
    if view not in VIEWS:
        raise UserError(unknown_name("view", view, VIEWS))


def view_order(view: str, num_frames: int) -> list[int]:
    """Return, for each of T places, the number of the sampled frame to show there. Raises UserError for unknown views.

    forward and blank: as sampled. reversed: the last frame first. shuffled: a permutation that is the same in every
        run. single: the middle frame at every place, so the number of visual tokens stays the same.
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
    """Reorder, repeat or blank sampled frames, as the view says. frames and result: (T, 3, S, S) uint8."""
    if view == BLANK:
        return frames.new_tensor(MEAN_COLOUR)[:, None, None].expand_as(frames)
    return frames if view == FORWARD else frames[view_order(view, len(frames))]


def _draw(num_frames: int, place: int) -> bytes:
    """Return a pseudo-random sort key. It uses no generator, so that no library update can change it."""
    return hashlib.blake2b(f"{SHUFFLE_KEY} {num_frames} {place}".encode(), digest_size=8).digest()
