"""What is asked and what is answered: a medium and the part of it that is meant, one request, one answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.conversation.context import NOTHING_CUT, Cut
from stllm.media.clip import check_clip
from stllm.media.sampling import Bounds
from stllm.media.views import FORWARD, check_view
from stllm.processors.templates import VISUAL, Turn

Stamp = tuple[Any, ...]  # of a medium and its file as it is at one moment


class RequestError(UserError):
    """A question that cannot be answered, whatever the model: empty, no text, or too long."""


@dataclass(frozen=True)
class Media:
    """A video, gif, frame folder or image on disk, and the part of it that is meant.

    num_frames: None for the model's usual number; start, end: seconds, None for the whole; reader: see open_media.
    own_times: the frames whose own times lie within start and end, as a viewer means it; else those that the average
        rate puts there, as the benchmarks' scripts do, and the sampling rule `segment` always.
    sampling: a rule of media/sampling.py; fps: of a frame folder; view: how the frames are shown, of
        media/views.py.
    """

    path: str
    num_frames: int | None = None
    start: float | None = None
    end: float | None = None
    sampling: str = "uniform"
    reader: str = "auto"
    fps: float | None = None
    view: str = FORWARD
    own_times: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for an empty path, which would mean the current folder, and for an unknown view."""
        check_view(self.view)
        if not self.path.strip():
            raise UserError("the path of the video is empty: name a file or a folder of frames")

    @property
    def bounds(self) -> Bounds | None:
        """(start, end) in seconds, None for the whole."""
        if self.start is None and self.end is None:
            return None
        return self.start or 0.0, float("inf") if self.end is None else self.end

    def check(self) -> None:
        """Raises now what reading it would raise later: opens it and looks for the part that is meant."""
        check_clip(
            self.path,
            num_frames=1 if self.num_frames is None else self.num_frames,
            sampling=self.sampling,
            bounds=self.bounds,
            reader=self.reader,
            fps=self.fps,
            own_times=self.own_times,
        )

    def stamp(self) -> Stamp:
        """Changes when the file (or a file of the folder) changes: path, size and time of change."""
        path = user_path(self.path)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return (self, tuple(_marks(files)))


@dataclass(frozen=True)
class Request:
    """One answer to be generated.

    turns: the conversation, the last one open; the Q-Former reads the last one's text. system: None for the template's
    own. pieces: the whole prompt of a benchmark that has its own, with `VISUAL` and `BOS` among them; None: the
    template's.
    """

    turns: tuple[Turn, ...]
    media: Media | None = None
    system: str | None = None
    pieces: tuple[str, ...] | None = None

    def check(self) -> None:
        """Raises RequestError when the question is nothing, or no text."""
        assert self.pieces is None or self.pieces.count(VISUAL) == int(self.media is not None), self.pieces
        question = self.turns[-1].question
        if not question.strip():
            raise RequestError("the question is empty: ask something about the video")
        try:
            question.encode()
        except UnicodeEncodeError:  # bytes of a command line or a pipe in another encoding
            raise RequestError(f"the question {question!r} is no valid text: write it in UTF-8") from None


@dataclass(frozen=True)
class Answer:
    """text; video: path or None; frame_times: seconds of the frames seen; seconds by stage.

    visual_tokens: the number that entered the language model; cut: the tokens that the context rule removed.
    """

    text: str
    question: str
    video: str | None
    frame_times: list[float]
    visual_tokens: int
    seconds: dict[str, float]
    cut: Cut = NOTHING_CUT


def _marks(files: list[Path]) -> Iterator[tuple[str, int, int]]:
    for file in files:
        try:
            stat = file.stat()
        except (OSError, ValueError):  # gone, a dead link, no path at all: no frame, or reading it says what is wrong
            continue
        yield file.name, stat.st_size, stat.st_mtime_ns
