"""A request on its way: its medium, read and encoded; its prompt, cut by the context rule; its answer.

The processes that read media import this file, so it imports no model.
Letters: T frames, P patches, C vision width, K tokens a frame, N visual tokens, D width of the language model.

The context rule decides how much of a long prompt enters the language model:
published: the last tokens of the prompt, visual and text, so that with the new tokens they are at most 2,000. This is
    the rule of the published chat, VcgBench and VideoQA; MVBench cuts nothing. A model that was trained for fewer
    positions keeps only as many tokens as it has positions.
all: every token. A model with rotary positions then also reads beyond the positions that it was trained for.
A prompt is refused in two cases: its last question, which is never cut, is too long for the published rule; or it
exceeds positions from a table under `all`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from cachetools import LRUCache
from torch import Tensor

from stllm.common.errors import UserError
from stllm.common.schema import ALL, PUBLISHED
from stllm.media.clip import Clip, Media, Stamp, load_clip
from stllm.processors.sequences import VISUAL_TOKEN_ID
from stllm.processors.templates import VISUAL, Turn
from stllm.processors.transforms import FrameTransform

__all__ = ["Answer", "ClipReader", "FeatureCache", "Media", "Prepared", "Request", "RequestError", "Seen", "Stamp"]

T = TypeVar("T")
R = TypeVar("R")

NO_TIME = {"read": 0.0, "encode": 0.0}  # seconds by stage
MAX_PREFIXES = 4  # of prompts about one video: as many conversations about it at a time; chosen here
PUBLISHED_LENGTH = 2000  # of the prompt and the new tokens together


class RequestError(UserError):
    """A question that cannot be answered, whatever the model: empty, no text, or too long."""


class EngineError(UserError):
    """A failure of the server that decodes in place of this process."""


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
        """Raise RequestError when the question is empty, or no valid text."""
        assert self.pieces is None or self.pieces.count(VISUAL) == int(self.media is not None), self.pieces
        question = self.turns[-1].question
        if not question.strip():
            raise RequestError("the question is empty: ask something about the video")
        try:
            question.encode()
        except UnicodeEncodeError:  # bytes of a command line or a pipe in another encoding
            raise RequestError(f"the question {question!r} is no valid text: write it in UTF-8") from None


@dataclass(frozen=True)
class ClipReader:
    """Reads media as a model takes them; it holds no weights, so that it can be sent to other processes.

    transform: of each frame. num_frames: of media that name no number.
    """

    transform: FrameTransform
    num_frames: int

    def __call__(self, media: Media) -> Clip:
        """Return the prepared frames. Raises MediaError for an unreadable medium."""
        return load_clip(media, self.transform, num_frames=self.num_frames)


@dataclass(frozen=True)
class Seen:
    """An encoded clip, and how long it took. encoded: (1, T, 1+P, C) or (1, T, K, D); kind: as `MediaInfo` has it.

    digest: the key under which `encoded` was put into a `FeatureCache`; "" for none.
    """

    encoded: Tensor
    kind: str
    times: list[float]
    seconds: Mapping[str, float] = field(default_factory=lambda: dict(NO_TIME))
    digest: str = ""


class HasSize(Protocol):
    """Tensors of `nbytes` bytes: a `Prefix` of models/generation.py."""

    @property
    def nbytes(self) -> int: ...


class FeatureCache:
    """Least-recently-used features of videos, kept in main memory up to `max_bytes`. Safe to share between threads.

    Keys are content digests, so the same video under another name is found and a changed file is not.
    Prefixes of prompts about a video, with their keys and values where the language model computes, use the room that
    the features leave; those used longest ago are dropped first, and all of a video's with its features.
    """

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[Hashable, Tensor] = LRUCache(max_bytes, getsizeof=lambda tensor: tensor.nbytes)
        self.max_bytes = max_bytes
        self._prefixes: list[tuple[str | None, Hashable, Any]] = []  # digest, state, prefix; the last used at the end
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Return the size of all kept tensors."""
        return int(self._kept.currsize) + sum(prefix.nbytes for _, _, prefix in self._prefixes)

    def get(self, key: Hashable) -> Tensor | None:
        """Return the tensor of that key, or None; it becomes the most recently used."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a copy in main memory, and drop the least recently used tensors beyond `max_bytes`.

        A tensor larger than `max_bytes` is not kept, and causes no other to be dropped.
        """
        tensor = tensor.detach().cpu()
        with self._lock, suppress(ValueError):  # larger than the cache
            self._kept.pop(key, None)
            self._kept[key] = tensor
        with self._lock:
            self._drop_prefixes()

    def prefixes(self, digest: str | None, state: Hashable) -> list[Any]:
        """Return the kept prefixes of prompts about that video, None: about none, the last used at the end.

        state: of the language model's weights.
        """
        with self._lock:
            return [prefix for *key, prefix in self._prefixes if key == [digest, state]]

    def put_prefixes(self, digest: str | None, state: Hashable, prefixes: Sequence[HasSize]) -> None:
        """Replace the prefixes of prompts about that video; the last `MAX_PREFIXES` are kept, as far as there is room.

        Without the video's features nothing is kept.
        """
        with self._lock:
            others = [one for one in self._prefixes if one[:2] != (digest, state)]
            room = self.max_bytes - self._kept.currsize
            mine = [one for one in prefixes[-MAX_PREFIXES:] if one.nbytes <= room]
            self._prefixes = [*others, *((digest, state, one) for one in mine)]
            self._drop_prefixes()

    def clear_prefixes(self) -> None:
        """Drop all prefixes."""
        with self._lock:
            self._prefixes.clear()

    def _drop_prefixes(self) -> None:
        """Drop those of videos whose features are gone, and the least recently used ones for which there is no room."""
        self._prefixes = [one for one in self._prefixes if one[0] is None or one[0] in self._kept]
        while self._prefixes and self.num_bytes > self.max_bytes:
            self._prefixes.pop(0)


class Together(Generic[T, R]):
    """A function of several items, called for one item by each of several threads.

    One call runs at a time; items that come while it runs are taken together by the next one. If that fails, each item
    is tried alone, so that an error reaches only its own caller.
    """

    def __init__(self, work: Callable[[Sequence[T]], Sequence[R]]) -> None:
        self._work = work
        self._waiting: SimpleQueue[tuple[T, Future[R]]] = SimpleQueue()
        self._turn = Lock()

    def __call__(self, item: T) -> R:
        """Return the item's result. Raises what the function raises for it."""
        future: Future[R] = Future()
        self._waiting.put((item, future))
        with self._turn:
            if not future.done():
                self._run([self._waiting.get() for _ in range(self._waiting.qsize())])
        return future.result()

    def _run(self, taken: Sequence[tuple[T, "Future[R]"]]) -> None:
        try:
            results = self._work([item for item, _ in taken])
        except Exception as error:
            if len(taken) == 1:
                taken[0][1].set_exception(error)
                return
        else:
            for (_, future), result in zip(taken, results, strict=True):
                future.set_result(result)
            return
        for one in taken:  # the error, which may hold memory, is gone here
            self._run([one])


@dataclass(frozen=True)
class Cut:
    """The number of visual and of text tokens that were cut from the front of a prompt."""

    visual: int = 0
    text: int = 0

    @property
    def total(self) -> int:
        """Return the number of all tokens that were cut."""
        return self.visual + self.text

    def __str__(self) -> str:
        """Return a sentence for the user."""
        return f"The prompt is long: its first {self.total} tokens were cut, {self.visual} of them the video's."


@dataclass(frozen=True)
class Prepared:
    """A request ready to be answered. ids: of its prompt; visual: (N, D), None for text alone.

    times: seconds of the frames seen. seconds: spent by stage so far. cut: tokens removed from `ids` and `visual`.
    digest: of `Seen`; None for text alone.
    """

    request: Request
    ids: list[int]
    visual: Tensor | None = None
    times: list[float] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=lambda: dict(NO_TIME))
    cut: Cut = Cut()
    digest: str | None = None

    @property
    def num_visual(self) -> int:
        """Return the number of visual tokens of the prompt."""
        return 0 if self.visual is None else len(self.visual)

    @property
    def length(self) -> int:
        """Return the number of tokens of the prompt, with the visual ones in place of their placeholder."""
        return len(self.ids) if self.visual is None else len(self.ids) - 1 + len(self.visual)

    def fitted(self, *, context: str, max_new_tokens: int, text_config: Any, num_question: int) -> "Prepared":
        """Return this prompt, its first tokens cut by the context rule.

        text_config: the language model's. num_question: ids at the end that are never cut, those of the last question.
        Raises RequestError for a prompt that cannot be answered under this rule.
        """
        positions, table = num_positions(text_config), has_position_table(text_config)
        rooms: list[tuple[int, str]] = []  # the longest prompts, each with its reason in words
        if positions is not None and table:
            reason = f"the language model has {positions} positions, which it shares with {max_new_tokens} new tokens"
            rooms.append((positions - max_new_tokens, reason))
        elif positions is not None and context == PUBLISHED:
            rooms.append((positions, f"the language model has {positions} positions"))
        if context == PUBLISHED:
            shares = f"{PUBLISHED_LENGTH} positions, {max_new_tokens} of them for new tokens"
            rooms.append((PUBLISHED_LENGTH - max_new_tokens, f"the published context rule has {shares}"))
        longest, reason = min(rooms, key=lambda room: room[0], default=(self.length, ""))
        if self.length <= longest:
            return self
        if context == ALL or num_question > longest:
            question = "" if context == ALL else f" and the {num_question} tokens of the question are never cut"
            extends = context == PUBLISHED and not table
            raise RequestError(
                f"the prompt has {self.length} tokens ({self.num_visual} of the video), but {reason}{question}: "
                "ask a shorter question, begin a new conversation, use fewer frames (--num-frames) or fewer new tokens "
                f"(--max-new-tokens){', or keep the whole prompt (--context all)' if extends else ''}"
            )
        excess = self.length - longest
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


def has_position_table(text_config: Any) -> bool:
    """Check for position embeddings from a table of fixed size, in contrast to rotary positions, which are computed.

    text_config: of a causal LM of transformers.
    """
    return num_positions(text_config) is not None and not getattr(text_config, "rope_parameters", None)


def num_positions(text_config: Any) -> int | None:
    """Return the positions that a language model was trained for; None where it has no number (ALiBi, state space)."""
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    return positions


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
    cut: Cut = Cut()
