"""Media made of pictures, read with Pillow: single images, animated pictures and folders of numbered frames.

Transparency is shown over white, as a page would: logos and diagrams are mostly dark on nothing.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stllm.common.files import check_regular
from stllm.datasets.media_info import Frame, MediaError, MediaInfo, Reader, check_indices, warn_once

if TYPE_CHECKING:
    from PIL.Image import Image

GIF_FPS = 25.0  # the benchmarks' protocol, whatever the delays in the file say
FOLDER_FPS = 3.0  # TVQA's `%05d.jpg`
RAW_FOLDER_FPS = 5.0  # raw training frames' `%06d.jpg`
GIF_END = b";"
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def to_rgb(image: "Image") -> Frame:
    """(H, W, 3) uint8 of any Pillow mode, transparency over white, 16 bits brought down to 8."""
    from PIL import Image as images

    if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip all but the darkest 256 levels
        grey = np.asarray(image).clip(0, 65535) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


class ImageReader(Reader):
    """A single image: one frame, turned upright by its EXIF orientation. Raises MediaError when it is damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._frame = read_image(self.path)
        height, width = self._frame.shape[:2]
        self.info = MediaInfo("image", num_frames=1, fps=1.0, width=width, height=height)

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        check_indices(self.path, self.info, indices)
        for _ in indices:
            yield self._frame.copy()

    def times(self, indices: Sequence[int]) -> list[float]:
        check_indices(self.path, self.info, indices)
        return [0.0 for _ in indices]

    def close(self) -> None:
        pass


class GifReader(Reader):
    """An animated picture (gif, animated webp), each frame composed with those under it.

    fps: how fast it is taken to play. Raises MediaError when the file is damaged.
    """

    def __init__(self, path: str | Path, *, fps: float = GIF_FPS) -> None:
        from PIL import Image as images

        self.path = Path(path)
        with _damage(self.path):
            self._image = images.open(self.path)
            width, height = self._image.size
            num_frames = getattr(self._image, "n_frames", 1)
        if self._image.format == "GIF" and not _has_end(self.path):
            warn_once(str(self.path), f"the gif ends early; the {num_frames} frames in it are used")
        self.info = MediaInfo("gif", num_frames=num_frames, fps=fps, width=width, height=height)

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        check_indices(self.path, self.info, indices)
        for index in indices:
            with _damage(self.path, f"; {self._image.tell()} frames could be read"):
                self._image.seek(index)
                frame = to_rgb(self._image)
            yield frame

    def times(self, indices: Sequence[int]) -> list[float]:
        check_indices(self.path, self.info, indices)
        return [index / self.info.fps for index in indices]

    def close(self) -> None:
        self._image.close()


class FrameFolderReader(Reader):
    """A folder of frames named by number, 00001.jpg and on; indices are those numbers (`MediaInfo.first_index` is 1).

    fps: frames a second that were extracted; default 3 (TVQA), or 5 where names have six digits (raw training frames).
    Raises MediaError when the folder holds no frames, or their numbers do not run from 1 without gaps.
    """

    def __init__(self, path: str | Path, *, fps: float | None = None) -> None:
        self.path = Path(path)
        self._files = _numbered_frames(self.path)
        if fps is None:
            fps = RAW_FOLDER_FPS if len(self._files[0].stem) == 6 else FOLDER_FPS
        height, width = read_image(self._files[0]).shape[:2]
        self.info = MediaInfo("frames", len(self._files), fps, width, height, first_index=1)

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        check_indices(self.path, self.info, indices)
        for index in indices:
            yield read_image(self._files[index - 1])

    def times(self, indices: Sequence[int]) -> list[float]:
        check_indices(self.path, self.info, indices)
        return [(index - 1) / self.info.fps for index in indices]

    def close(self) -> None:
        pass


def read_image(path: Path) -> Frame:
    """(H, W, 3) uint8, upright. Raises MediaError when the file is no whole image."""
    check_regular(path, "an image", MediaError)
    return _upright(path, path)


def decode_image(data: bytes, name: str) -> Frame:
    """(H, W, 3) uint8, upright, of an image file's bytes. Raises MediaError, beginning with `name`, as `read_image`."""
    return _upright(BytesIO(data), name)


def _upright(file: Path | BytesIO, name: object) -> Frame:
    from PIL import Image as images
    from PIL import ImageOps

    with _damage(name), images.open(file) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def _has_end(path: Path) -> bool:
    """Whether a gif's last byte is its trailer; some programs pad with zeros."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read().rstrip(b"\0").endswith(GIF_END)


def _numbered_frames(folder: Path) -> list[Path]:
    """The folder's frames in order. Raises MediaError."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except PermissionError:
        raise MediaError(f"{folder}: permission to list it is denied; expected a readable folder: chmod +rx") from None
    files = [folder / name for name in names if _is_numbered(Path(name))]
    if not files:
        found = f"{len(names)} entries such as {names[0]!r}" if names else "nothing"
        raise MediaError(
            f"{folder}: found a folder with {found} in it, expected frames named 00001.jpg and on; name a video "
            "file, or extract the frames first"
        )
    files.sort(key=lambda file: int(file.stem))
    for expected, file in enumerate(files, start=1):
        if int(file.stem) != expected:
            raise MediaError(
                f"{folder}: found frame {file.name} where number {expected} was expected; frames count from 1 without "
                f"gaps or doubles ({len(files)} files): extract them again"
            )
    return files


def _is_numbered(name: Path) -> bool:
    return name.suffix.lower() in FRAME_SUFFIXES and name.stem.isascii() and name.stem.isdecimal()


@contextmanager
def _damage(path: object, so_far: str = "") -> Iterator[None]:
    """Turns whatever Pillow raises on bad files into a MediaError; so_far: what could be read of it."""
    from PIL import Image as images

    try:
        yield
    except FileNotFoundError:
        raise MediaError(f"{path}: there is no such file; expected an image: check the path", cause="missing") from None
    except PermissionError:
        raise MediaError(f"{path}: permission to read it is denied; expected a readable file: run chmod +r") from None
    except images.DecompressionBombError as error:
        raise MediaError(f"{path}: found an image too large to be one ({error}); scale it down first") from error
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        # Pillow has no one exception for broken files: its decoders let all of these through.
        raise MediaError(
            f"{path}: found a damaged or cut image ({error}{so_far}), expected a whole one: copy or download it again"
        ) from error
