"""Turning pictures as players do, also where PyAV does not give the display matrix."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from stllm.media.video import BY_ROTATION, UPRIGHT, PyAvReader, turn_of
from tests.helpers.videos import frame_code, read_code, write_video

ORIENTATION = 0x0112  # EXIF's tag; 1 upright, 3 upside down, 6 and 8 a quarter turn


def camera_video(path: Path, orientation: int) -> Path:
    """Motion JPEG as cameras write it: each picture with its own EXIF."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for index in range(4):
            picture = io.BytesIO()
            Image.fromarray(frame_code(index + 1, (96, 64))).save(picture, "JPEG", exif=exif)
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    return path


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_cameras_motion_jpeg_is_shown_upright(tmp_path: Path, orientation: int) -> None:
    with PyAvReader(camera_video(tmp_path / "camera.avi", orientation)) as reader:
        frames = list(reader.frames(range(4)))
    image = Image.fromarray(frame_code(3, (96, 64)))
    image.getexif()[ORIENTATION] = orientation
    expected = ImageOps.exif_transpose(image)
    assert (frames[2].shape[1], frames[2].shape[0]) == expected.size
    assert read_code(frames[2]) == read_code(np.array(expected))


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_the_rotation_alone_says_the_same_as_the_matrix(tmp_path: Path, rotation: int) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=3, rotation=rotation)
    with av.open(str(video)) as container:
        frame = next(container.decode(video=0))
    assert BY_ROTATION.get(round(frame.rotation / 90) % 4, UPRIGHT) == turn_of(frame)
