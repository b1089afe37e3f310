"""Small files that decode to many pixels are refused by the sizes in file and frame headers, before decoding."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import openai
import pytest

from stllm.media.info import MediaError, limited_pixels
from stllm.media.open import open_media
from stllm.serving.app import Server
from tests.conversation.test_chat import new_chat
from tests.helpers import memory
from tests.helpers.serving import MODEL, client_of, data_url, serving, user


def write_png(path: Path, side: int) -> Path:
    """Write a black square, row by row, so that it needs little memory here."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


def write_growing_vp8(path: Path, side: int) -> Path:
    """Write ten frames of 64 x 64 pixels and one of side x side; each keyframe of VP8 may have another size."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libvpx", 25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for at, packet in enumerate([*_vp8(64, 10), *_vp8(side, 1)]):
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, at, at, Fraction(1, 25)
            container.mux(packet)
    return path


def _vp8(side: int, count: int) -> list[Any]:
    encoder: Any = av.CodecContext.create("libvpx", "w")
    encoder.width = encoder.height = side
    encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 25)
    encoder.options = {"deadline": "realtime", "cpu-used": "8"}
    packets: list[Any] = []
    for at in range(count):
        frame = av.VideoFrame(side, side, "yuv420p")
        frame.pts = at
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        packets += encoder.encode(frame)
    return packets + encoder.encode(None)


def write_growing_gif(path: Path, side: int) -> Path:
    """Write a gif with a canvas of 8 x 8 pixels and a much larger second frame."""
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF", save_all=True, append_images=[Image.new("P", (8, 8), 1)], duration=40)
    data = bytearray(file.getvalue())
    small = struct.pack("<BHHHH", 0x2C, 0, 0, 8, 8)
    last = data.rindex(small)
    data[last : last + len(small)] = struct.pack("<BHHHH", 0x2C, 0, 0, side, side)
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize(("write", "name"), [(write_growing_vp8, "grows.webm"), (write_growing_gif, "grows.gif")])
def test_a_frame_that_is_larger_than_the_header_says_is_not_decoded(tmp_path: Path, write: Any, name: str) -> None:
    path = write(tmp_path / name, 1500)
    with limited_pixels(1_000_000), pytest.raises(MediaError, match=r"too large|more than 1000000 pixels"):  # noqa: SIM117
        with open_media(path) as medium:
            list(medium.frames([medium.info.num_frames - 1]))


@pytest.mark.parametrize("name", ["large.png", "large.mp4"])
def test_a_size_beyond_the_limit_is_refused_at_opening(tmp_path: Path, name: str) -> None:
    from tests.helpers.videos import write_video

    path = tmp_path / name
    if name.endswith("png"):
        write_png(path, 600)
    else:
        write_video(path, num_frames=3, size=(600, 600))
    for most, fits in ((400_000, True), (300_000, False)):
        with limited_pixels(most):
            if fits:
                assert open_media(path).info.width == 600
            else:
                with pytest.raises(MediaError):
                    open_media(path)
    assert open_media(path).info.width == 600


@pytest.mark.skipif(not memory.STATUS.exists(), reason="memory is read from /proc")
def test_five_large_pictures_at_once_take_little_memory(tmp_path: Path) -> None:
    bomb, fits = data_url(write_png(tmp_path / "bomb.png", 13_300)), data_url(write_png(tmp_path / "fits.png", 2000))
    server = Server(new_chat(), MODEL, folder=tmp_path)
    with serving(server) as address, ThreadPoolExecutor(5) as clients:

        def ask(url: str) -> str:
            with client_of(address) as client:
                try:
                    found = client.chat.completions.create(
                        model=MODEL, messages=[user("what", url, "image_url")], max_tokens=2
                    )
                except openai.BadRequestError as error:
                    return str(error)
            return str(found.id)

        ask(fits)
        with memory.peak_below(200):
            refused = list(clients.map(ask, [bomb] * 5))
            assert all(answer.startswith("chatcmpl-") for answer in clients.map(ask, [fits] * 5))
        assert all("too large, at most 36000000 pixels are read" in answer for answer in refused)
        assert memory.peak_of_children() < 1024  # three quarters of it are shared with the process they come from
