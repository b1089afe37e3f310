"""Media files of the toy world: H.264 videos, PNG pictures and shards of them, the same bytes for the same input."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# One thread: the same pixels, the same file. crf: shapes of a few pixels keep their colors.
ENCODER = {"preset": "veryfast", "crf": "18", "threads": "1"}


def write_mp4(path: Path, clip: np.ndarray, fps: int) -> None:
    """Writes a clip, (T, H, W, 3) uint8 RGB, as H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options=ENCODER)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture, (H, W, 3) uint8 RGB, as the bytes of a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, pairs: Iterable[tuple[str, np.ndarray, str]]) -> None:
    """Writes (name, picture, text) as one webdataset shard: `<name>.png` and `<name>.txt` each."""
    with tarfile.open(path, "w") as tar:
        for name, picture, text in pairs:
            for ending, content in (("png", png_bytes(picture)), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{name}.{ending}")  # without time and owner: the same bytes every time
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
