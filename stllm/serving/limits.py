"""Limits of one request to the server or the page. They are generous for one person and leave room for other requests.

The processes that read media import this file, so it imports no model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stllm.common.errors import UserError
from stllm.media.info import EXPECTED, MediaError, kind_of, limited_pixels, read_head
from stllm.media.open import open_media

if TYPE_CHECKING:
    from stllm.conversation.requests import ClipReader, Media
    from stllm.media.clip import Clip

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """media_bytes, media_seconds, media_pixels (of a frame): of a video or image. text_characters: of all messages.

    frames, new_tokens: the most that a request may ask for. waiting: requests in addition to the one being answered.
    body_seconds: for a request to arrive completely. read_seconds: for its video or image to be decoded.
    """

    media_bytes: int = 100 * MEBIBYTE
    media_seconds: float = 1800.0
    media_pixels: int = 36_000_000  # 8K, and a phone's pictures
    text_characters: int = 100_000
    frames: int = 128
    new_tokens: int = 1024
    waiting: int = 16
    body_seconds: float = 60.0
    read_seconds: float = 60.0  # half an hour of full HD takes less

    @property
    def words_bytes(self) -> int:
        """Return the largest size in bytes of a request without its medium: the escaped text and the JSON around it."""
        return 8 * self.text_characters + MEBIBYTE

    @property
    def body_bytes(self) -> int:
        """Return the largest size in bytes of a request: the medium in base64, and the rest."""
        return self.media_bytes * 4 // 3 + self.words_bytes

    def check_size(self, num_bytes: int) -> None:
        """Raise MediaError for a file that is too large."""
        if num_bytes > self.media_bytes:
            raise MediaError(
                f"the video or image has {num_bytes / MEBIBYTE:.1f} MiB, at most {self.media_bytes / MEBIBYTE:.1f} are "
                "taken: cut or compress it"
            )

    def check_file(self, path: Path) -> None:
        """Check the file without decoding it. Raises MediaError for a file that is no medium or is too large."""
        self.check_size(path.stat().st_size)
        if kind_of(read_head(path)) == "text":  # without its first words: it may be a file that the client cannot read
            raise MediaError(f"{path}: found text, expected {EXPECTED}")
        with open_media(path) as medium:
            info = medium.info
        if info.kind != "image" and info.duration > self.media_seconds:
            raise MediaError(
                f"the video lasts {info.duration:.1f} s, at most {self.media_seconds:.1f} s are taken: cut the part "
                "that you ask about"
            )
        if info.width * info.height > self.media_pixels:
            raise MediaError(
                f"the picture has {info.width} x {info.height} pixels, at most {self.media_pixels} in all are taken: "
                "make it smaller"
            )

    def read(self, reader: "ClipReader", media: "Media") -> "Clip":
        """Check the file and read it. Called in a reading process (media/reading.py). Raises MediaError."""
        with limited_pixels(self.media_pixels):
            self.check_file(Path(media.path))
            return reader(media)


@dataclass(frozen=True)
class PageLimits(Limits):
    """Limits of one user of the page. text_characters: of a question. folder_bytes, folder_files: of all uploads.

    keep_seconds: how long an upload is kept after the last question about it. upload_seconds: for an upload to arrive
    completely.
    """

    media_bytes: int = 256 * MEBIBYTE
    text_characters: int = 4000
    frames: int = 64
    new_tokens: int = 512
    waiting: int = 32
    beams: int = 8
    folder_bytes: int = 4096 * MEBIBYTE
    folder_files: int = 1000
    keep_seconds: int = 3600
    upload_seconds: float = 600.0

    def check_question(self, question: object) -> str:
        """Return the question without outer spaces. Raises UserError when it is empty or too long."""
        text = question.strip() if isinstance(question, str) else ""
        if not text:
            raise UserError("the question is empty: ask something about the video")
        if len(text) > self.text_characters:
            raise UserError(
                f"the question has {len(text)} characters, at most {self.text_characters} are read here: shorten it"
            )
        return text
