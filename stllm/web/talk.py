"""What one browser tab holds: a medium, what was seen of it, and what was said about it. Nothing here is shared."""

from dataclasses import dataclass, field, replace
from threading import Lock

from stllm.conversation.evidence import Evidence
from stllm.conversation.requests import Media
from stllm.processors.templates import Turn


@dataclass(frozen=True)
class Film:
    """What the model was shown. media: with the number of frames that was asked for.

    kind: of `MediaInfo`. pictures: of each frame, as data addresses. times: seconds.
    """

    media: Media
    kind: str
    pictures: tuple[str, ...]
    times: tuple[float, ...]


@dataclass
class Talk:
    """One conversation. A new medium, or clearing, begins another; whoever still answers in the old one can tell.

    path: of the medium, None without one; name: as its owner calls it. stopped: set by the stop button.
    evidence: of the last answer.
    """

    path: str | None = None
    name: str = ""
    turns: list[Turn] = field(default_factory=list)
    film: Film | None = None
    evidence: Evidence | None = None
    stopped: bool = False

    def afresh(self) -> "Talk":
        """Another conversation about the same medium."""
        return replace(self, turns=[], evidence=None, stopped=False)


class Order:
    """A lock of one tab, of which each copy that gradio makes of the page's first state is another one."""

    def __init__(self) -> None:
        self.lock = Lock()

    def __deepcopy__(self, memo: object) -> "Order":
        return Order()


@dataclass
class Session:
    """The state of one tab. order: held by the handler that uses the model for it."""

    talk: Talk = field(default_factory=Talk)
    order: Order = field(default_factory=Order)

    def begin(self, talk: Talk) -> Talk:
        """Another conversation takes the place of this one, whose answer, if one is being written, stops."""
        self.talk.stopped = True
        self.talk = talk
        return talk
