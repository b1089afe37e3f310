"""Turning decoded pictures as players show them: the display matrix of phone videos.

Source: ISO/IEC 14496-12, the matrix of the track header: a picture point (x, y) is shown at (a x + c y, b x + d y).
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from stllm.media import images as picture_readers
from stllm.media.info import Frame

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Turn = tuple[bool, bool, bool]  # (transpose, then flip left-right, then flip top-bottom)
UPRIGHT: Turn = (False, False, False)
BY_ROTATION: dict[int, Turn] = {  # quarter turns counterclockwise
    1: (True, False, True),
    2: (False, True, True),
    3: (True, True, False),
}
MIRRORING = frozenset(turn for turn in np.ndindex(2, 2, 2) if sum(turn) % 2)  # an odd number of reflections


def turn_of(frame: "VideoFrame") -> Turn:
    """How to turn this frame, by the quarter turn and mirroring nearest to its display matrix."""
    # Asked of a thumbnail, which carries the matrix too: `side_data` makes a reference cycle, and a full frame in it
    # would stay in memory until the garbage collector comes by.
    thumbnail = frame.reformat(width=16, height=16)
    try:
        data = cast(Any, thumbnail.side_data.get("DISPLAYMATRIX"))
    except ValueError:  # PyAV refuses all side data beside a kind that it does not know: EXIF in a camera's MJPEG
        return BY_ROTATION.get(round(thumbnail.rotation / 90) % 4, UPRIGHT)
    if data is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(data, np.int32, count=5).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def turned(picture: "np.ndarray[Any, Any]", turn: Turn) -> "np.ndarray[Any, Any]":
    """(H, W, C) -> the same or (W, H, C)."""
    transpose, left_right, top_bottom = turn
    if transpose:
        picture = picture.swapaxes(0, 1)
    if left_right:
        picture = picture[:, ::-1]
    if top_bottom:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def is_transparent(frame: "VideoFrame") -> bool:
    """Whether the frame's format has transparency; a palette may have it."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def to_rgb(frame: "VideoFrame", turn: Turn) -> Frame:
    """The decoded frame as shown, (H, W, 3) uint8 RGB, transparent parts over white as in pictures.

    Non-square pixels stay as stored, as in the published system.
    """
    if is_transparent(frame):
        from PIL import Image

        return turned(picture_readers.to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"))), turn)
    return turned(frame.to_ndarray(format="rgb24"), turn)
