"""What one user of the demo may take, so that there is room for the others; and what is asked, within it."""

import math
from dataclasses import dataclass

from stllm.common.errors import UserError
from stllm.conversation.decoding import Decoding
from stllm.serving.limits import READ_SECONDS
from stllm.serving.limits import Limits as MediaLimits

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The most of each: size and length of a file, frames, beams and tokens, characters of a question.

    queue: requests that may wait. folder_megabytes, folder_files: of all uploads together. keep_seconds: how long an
        upload is kept after it was last asked about. upload_seconds, body_seconds: for an upload, or another request,
        to arrive whole. read_seconds: for a file to be decoded.
    """

    file_megabytes: int = 256
    video_seconds: float = 1800.0
    frames: int = 64
    beams: int = 8
    new_tokens: int = 512
    question_characters: int = 4000
    queue: int = 32
    folder_megabytes: int = 4096
    folder_files: int = 1000
    keep_seconds: int = 3600
    upload_seconds: float = 600.0
    body_seconds: float = 60.0
    read_seconds: float = READ_SECONDS

    def check_question(self, question: object) -> str:
        """The question without outer spaces. Raises UserError when it is empty or too long."""
        text = question.strip() if isinstance(question, str) else ""
        if not text:
            raise UserError("the question is empty: ask something about the video")
        if len(text) > self.question_characters:
            raise UserError(
                f"the question has {len(text)} characters, at most {self.question_characters} are read here: shorten it"
            )
        return text

    @property
    def media(self) -> MediaLimits:
        """Those of a file that is read."""
        return MediaLimits(media_bytes=self.file_megabytes * MEGABYTE, media_seconds=self.video_seconds)


@dataclass(frozen=True)
class Wishes:
    """What the controls of the page say: how many frames, and how to answer."""

    num_frames: int
    decoding: Decoding

    @classmethod
    def checked(
        cls,
        limits: Limits,
        usual: Decoding,
        *,
        num_frames: object,
        num_beams: object,
        temperature: object,
        max_new_tokens: object,
    ) -> "Wishes":
        """Numbers as they came from a browser or a client. Raises UserError, naming the one that is out of bounds."""
        return cls(
            num_frames=_whole("frames", num_frames, limits.frames),
            decoding=usual.with_options(
                num_beams=_whole("beams", num_beams, limits.beams),
                max_new_tokens=_whole("tokens of the longest answer", max_new_tokens, limits.new_tokens),
                temperature=_number("the temperature", temperature, 2.0),
            ),
        )


def _whole(what: str, value: object, most: int) -> int:
    number = _number(f"the number of {what}", value, most)
    if number != int(number) or number < 1:
        raise UserError(f"the number of {what} is {value!r}: expected a whole number from 1 to {most}")
    return int(number)


def _number(what: str, value: object, most: float) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= most:
        raise UserError(f"{what} is {value!r}: expected a number from 0 to {most:g}")
    return number
