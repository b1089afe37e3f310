"""Reads single images, animated pictures and folders of numbered frames with Pillow.

Transparent parts become white, here and in videos, because logos and diagrams are mostly dark lines without background.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stllm.common.errors import UserError
from stllm.common.files import check_regular
from stllm.media.info import AVIF, Frame, MediaError, MediaInfo, Member, Place, Reader, place_of, warn_once
from stllm.media.time_bound import keep_reading

if TYPE_CHECKING:
    from PIL.Image import Image

GIF_FPS = 25.0  # the benchmarks' protocol, which ignores the delays in the file
FOLDER_FPS = 3.0  # TVQA's `%05d.jpg`
RAW_FOLDER_FPS = 5.0  # raw training frames' `%06d.jpg`
GIF_END = b";"  # the last byte
ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # several pictures in other formats are pages or sizes; the first is read
# Only these, because files can come from strangers: EPS would run Ghostscript, and MPEG would open videos.
FORMATS = (
    *("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "HEIF", "AVIF", "JPEG2000", "PPM", "ICO", "QOI", "PSD", "DDS"),
    *("ICNS", "SGI", "PCX", "TGA"),
)
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def to_rgb(image: "Image") -> Frame:
    """Convert an image of any Pillow mode to (H, W, 3) uint8. Transparent parts become white, 16 bits become 8."""
    from PIL import Image as images

    if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip all but the darkest 256 levels
        grey = np.asarray(image).clip(0, 65535) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this installation of Pillow can read."""
    from PIL import Image as images

    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    images.init()
    return tuple(name for name in FORMATS if name in images.OPEN)


def open_image(file: Place | BytesIO) -> "Image":
    """Open a picture without decoding it. Raises Pillow's errors, and UserError if another package is needed."""
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    try:
        opened: Any = file.open() if isinstance(file, Member) else file
        return images.open(opened, formats=_formats())
    except UnidentifiedImageError:
        with BytesIO(file.getvalue()) if isinstance(file, BytesIO) else file.open("rb") as opened:
            head = opened.read(12)
        if head[4:8] != b"ftyp":
            raise
        name, package = ("AVIF", "pillow 11.3 or later") if head[8:12] in AVIF else ("HEIC", "pillow-heif")
        raise UserError(
            f"found a picture in {name} format, which needs the package {package}: install it with "
            f"`pip install -U {package.split()[0]}`, or convert the picture to PNG or JPEG"
        ) from None


def open_picture(path: Place, *, fps: float = GIF_FPS) -> Reader:
    """Return a reader for an image or an animated picture. Raises MediaError if the file is neither, or damaged.

    fps: the frame rate to use for an animated picture instead of the delays in the file.
    """
    with _damage(path), open_image(path) as image:
        animated = image.format == "GIF" or (image.format in ANIMATED and getattr(image, "is_animated", False))
    return GifReader(path, fps=fps) if animated else ImageReader(path)


class ImageReader(Reader):
    """Reads a single image as one frame, rotated by its EXIF orientation. Raises MediaError if it is damaged."""

    def __init__(self, path: str | Path | Member) -> None:
        self.path = place_of(path)
        self._frame = read_image(self.path)
        height, width = self._frame.shape[:2]
        self.info = MediaInfo("image", num_frames=1, fps=1.0, width=width, height=height)
        self.seconds = np.zeros(1)

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        self.check(indices)
        for _ in indices:
            yield self._frame.copy()


class GifReader(Reader):
    """Reads an animated picture (gif, or animated webp, png or avif). Frames are returned as they appear on a screen.

    fps: the frame rate to use instead of the delays in the file. Raises MediaError if the file is damaged.
    """

    def __init__(self, path: str | Path | Member, *, fps: float = GIF_FPS) -> None:
        self.path = place_of(path)
        with _damage(self.path):
            self._image = open_image(self.path)
            width, height = self._image.size
            # A png may begin with a picture for programs without support of animation, which is skipped here.
            self._first = int(getattr(self._image, "default_image", False))
            num_frames = getattr(self._image, "n_frames", 1) - self._first
        if self._image.format == "GIF":
            with self.path.open("rb") as file:
                file.seek(max(0, self.path.stat().st_size - 1024))
                if not file.read().rstrip(b"\0").endswith(GIF_END):  # some programs pad with zeros
                    warn_once(str(self.path), f"the gif ends early; the {num_frames} frames in it are used")
        self.info = MediaInfo("gif", num_frames=num_frames, fps=fps, width=width, height=height)
        self.seconds = np.arange(num_frames) / fps

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        self.check(indices)
        for index in indices:
            with _damage(self.path, f"; {self._image.tell()} frames could be read"):
                target = index + self._first
                if target < self._image.tell():
                    self._image.seek(0)
                while self._image.tell() < target:  # one call of Pillow would do it, but could not be ended
                    keep_reading()
                    self._image.seek(self._image.tell() + 1)
                frame = to_rgb(self._image)
            yield frame

    def close(self) -> None:
        self._image.close()


class FrameFolderReader(Reader):
    """Reads a folder of frames named 00001.jpg and on. Indices are these numbers (`MediaInfo.first_index` is 1).

    fps: frames extracted from each second of the video (default: 3 as in TVQA; 5 for names of six digits, as in raw
    training frames). Raises MediaError if the folder holds no frames, or if their numbers have gaps or do not start at
    1.
    """

    def __init__(self, path: str | Path, *, fps: float | None = None) -> None:
        self.path = folder = Path(path)
        try:
            names = sorted(entry.name for entry in folder.iterdir())
        except PermissionError:
            raise MediaError(
                f"{folder}: permission to list it is denied; expected a readable folder: chmod +rx"
            ) from None
        files = [folder / name for name in names if Path(name).suffix.lower() in FRAME_SUFFIXES]
        files = [file for file in files if file.stem.isascii() and file.stem.isdecimal()]
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
                    f"{folder}: found frame {file.name} where number {expected} was expected; frames count from 1 "
                    f"without gaps or doubles ({len(files)} files): extract them again"
                )
        self._files = files
        if fps is None:
            fps = RAW_FOLDER_FPS if len(files[0].stem) == 6 else FOLDER_FPS
        height, width = read_image(files[0]).shape[:2]
        self.info = MediaInfo("frames", len(files), fps, width, height, first_index=1)
        self.seconds = np.arange(len(files)) / fps

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        self.check(indices)
        for index in indices:
            yield read_image(self._files[index - 1])


def read_image(path: Place) -> Frame:
    """Read an image file as (H, W, 3) uint8, rotated by its EXIF orientation. Raises MediaError if it is damaged."""
    if isinstance(path, Path):
        check_regular(path, "an image", MediaError)
    return decode_image(path, path)


def decode_image(file: Place | bytes, name: object) -> Frame:
    """Decode an image file, or its bytes, to (H, W, 3) uint8, rotated by its EXIF orientation.

    name: the image's name in error messages. Raises MediaError if it is damaged.
    """
    from PIL import ImageOps

    with _damage(name), open_image(BytesIO(file) if isinstance(file, bytes) else file) as image:
        return to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def _damage(path: object, so_far: str = "") -> Iterator[None]:
    """Turn the errors that Pillow raises on damaged files into a MediaError.

    so_far: what was read before, for the message.
    """
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    try:
        yield
    except FileNotFoundError:
        raise MediaError(f"{path}: there is no such file; expected an image: check the path", cause="missing") from None
    except PermissionError:
        raise MediaError(f"{path}: permission to read it is denied; expected a readable file: run chmod +r") from None
    except images.DecompressionBombError as error:
        assert images.MAX_IMAGE_PIXELS is not None
        raise MediaError(
            f"{path}: found a picture that is too large, at most {2 * images.MAX_IMAGE_PIXELS} pixels are read: make "
            "it smaller"
        ) from error
    except UserError as error:
        raise MediaError(f"{path}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        # Pillow has no exception of its own for damaged files; its decoders raise all of these.
        # An UnidentifiedImageError only repeats the file's name or the address of its bytes.
        reason = "no picture's format" if isinstance(error, UnidentifiedImageError) else str(error)
        if re.search(r"\bb['\"]", reason):  # Pillow quotes the file's bytes, which a server must not show
            reason = reason.removeprefix("b").strip("'\"").partition(": ")[0]
        raise MediaError(
            f"{path}: found a damaged or cut image ({reason}{so_far}), expected a whole one: copy or download it again"
        ) from error
