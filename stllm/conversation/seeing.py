"""From a medium to what the model has seen of it: read (by anyone, in any process), encoded (by the model).

Letters: T frames, P patches, C vision width, K tokens a frame, N visual tokens, D width of the language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from stllm.conversation.context import ALL, NOTHING_CUT, PUBLISHED, Cut, has_position_table, room
from stllm.conversation.requests import Media, Request, RequestError
from stllm.media.clip import Clip, load_clip
from stllm.processors.sequences import VISUAL_TOKEN_ID
from stllm.processors.transforms import FrameTransform


def _no_time() -> Mapping[str, float]:
    return {"read": 0.0, "encode": 0.0}


@dataclass(frozen=True)
class ClipReader:
    """Reads media as a model wants them; it holds no weights, so that other processes can have it.

    transform: of each frame. num_frames: of media that name no number.
    """

    transform: FrameTransform
    num_frames: int

    def __call__(self, media: Media) -> Clip:
        """The prepared frames. Raises MediaError for what cannot be read."""
        return load_clip(media, self.transform, num_frames=self.num_frames)


@dataclass(frozen=True)
class Seen:
    """An encoded clip, and how long it took. encoded: (1, T, 1+P, C) or (1, T, K, D); kind: as `MediaInfo` has it."""

    encoded: Tensor
    kind: str
    times: list[float]
    seconds: Mapping[str, float] = field(default_factory=_no_time)


@dataclass(frozen=True)
class Prepared:
    """A request ready to be answered. ids: of its prompt; visual: (N, D), None for text alone.

    times: seconds of the frames seen. seconds: spent by stage so far. cut: tokens removed from `ids` and `visual`.
    """

    request: Request
    ids: list[int]
    visual: Tensor | None = None
    times: list[float] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=_no_time)
    cut: Cut = NOTHING_CUT

    @property
    def num_visual(self) -> int:
        """Visual tokens of the prompt."""
        return 0 if self.visual is None else len(self.visual)

    @property
    def length(self) -> int:
        """Tokens of the prompt, with the visual ones in place of their placeholder."""
        return len(self.ids) if self.visual is None else len(self.ids) - 1 + len(self.visual)

    def fitted(self, *, context: str, max_new_tokens: int, text_config: Any, num_question: int) -> "Prepared":
        """This prompt, its first tokens cut by the context rule.

        text_config: the language model's. num_question: ids at the end that are never cut, those of the last question.
        Raises RequestError for a prompt that cannot be answered under this rule.
        """
        place = room(context, max_new_tokens, text_config)
        if place.longest is None or self.length <= place.longest:
            return self
        if context == ALL or num_question > place.longest:
            question = "" if context == ALL else f" and the {num_question} tokens of the question are never cut"
            extends = context == PUBLISHED and not has_position_table(text_config)
            raise RequestError(
                f"the prompt has {self.length} tokens ({self.num_visual} of the video), but {place.reason}{question}: "
                "ask a shorter question, begin a new conversation, use fewer frames (--num-frames) or fewer new tokens "
                f"(--max-new-tokens){', or keep the whole prompt (--context all)' if extends else ''}"
            )
        excess = self.length - place.longest
        front = len(self.ids) if self.visual is None else self.ids.index(VISUAL_TOKEN_ID)
        before = min(excess, front)  # text before the visual tokens, visual tokens, text after them
        visual = min(excess - before, self.num_visual)
        after = excess - before - visual
        return replace(
            self,
            ids=self.ids[before : front + 1] + self.ids[front + 1 + after :],
            visual=None if self.visual is None else self.visual[visual:],
            cut=Cut(visual=visual, text=before + after),
        )
