"""Requests and answers: one question about a medium (or about none), and one answer."""

from dataclasses import dataclass

from stllm.common.errors import UserError
from stllm.conversation.context import NOTHING_CUT, Cut
from stllm.media.clip import Media, Stamp
from stllm.processors.templates import VISUAL, Turn

__all__ = ["Answer", "Media", "Request", "RequestError", "Stamp"]


class RequestError(UserError):
    """A question that cannot be answered, whatever the model: empty, no text, or too long."""


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
