"""From a medium to what the model has seen of it: read (by anyone, in any process), encoded (by the model).

Letters: T frames, P patches, C vision width, K tokens a frame, N visual tokens, D width of the language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from stllm.conversation.requests import Media, Request
from stllm.datasets.media import Clip, load_clip
from stllm.processors.vision import FrameTransform


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
        return load_clip(
            media.path,
            num_frames=self.num_frames if media.num_frames is None else media.num_frames,
            sampling=media.sampling,
            bounds=media.bounds,
            transform=self.transform,
            reader=media.reader,
            fps=media.fps,
            view=media.view,
            own_times=True,
        )


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

    times: seconds of the frames seen. seconds: spent by stage so far.
    """

    request: Request
    ids: list[int]
    visual: Tensor | None = None
    times: list[float] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=_no_time)

    @property
    def length(self) -> int:
        """Tokens of the prompt, the visual ones among them."""
        return len(self.ids) + (0 if self.visual is None else len(self.visual))
