"""Data classes for the stages of a question: request, clip, encoded clip, prepared prompt, answer. And a cache.

Processes that read media import this file, so it imports no model.
Letters in shapes: T frames, P patches, C vision width, K tokens per frame, N visual tokens, D width of the language
model.

The context rule decides how much of a long prompt enters the language model:
published: the last tokens of the prompt, visual and text; with the new tokens they are at most 2,000. The published
    chat, VcgBench and VideoQA use this rule; MVBench cuts nothing. If a model was trained for fewer positions, the
    prompt is cut to that number.
all: every token. A model with rotary positions then also reads beyond the positions that it was trained for.
A prompt is refused in two cases: under `published` if its last question, which is never cut, is too long; under `all`
if it exceeds the model's table of position embeddings.
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

__all__ = [
    "Answer",
    "ClipReader",
    "EncodedClip",
    "FeatureCache",
    "Media",
    "Prepared",
    "Request",
    "RequestError",
    "Stamp",
]

T = TypeVar("T")
R = TypeVar("R")

NO_TIME = {"read": 0.0, "encode": 0.0}  # seconds by stage
MAX_PREFIXES = 4  # prompts kept per video, enough for four concurrent conversations about it; our choice
PUBLISHED_LENGTH = 2000  # tokens of the prompt and of the answer together


class RequestError(UserError):
    """An error in the question itself: it is empty, not valid text, or too long."""


class EngineError(UserError):
    """A failure of the engine, the server that runs the language model (remote.py)."""


@dataclass(frozen=True)
class Request:
    """A question to be answered.

    turns: the conversation; the last turn has no answer yet, and the Q-Former reads its text. system: the system
    message; None for the template's. pieces: a benchmark's own prompt, including `VISUAL` and `BOS`; None for a prompt
    by the template.
    """

    turns: tuple[Turn, ...]
    media: Media | None = None
    system: str | None = None
    pieces: tuple[str, ...] | None = None

    def check(self) -> None:
        """Raise RequestError if the question is empty or not valid text."""
        assert self.pieces is None or self.pieces.count(VISUAL) == int(self.media is not None), self.pieces
        question = self.turns[-1].question
        if not question.strip():
            raise RequestError("the question is empty: ask something about the video")
        try:
            question.encode()
        except UnicodeEncodeError:  # Python decoded bytes that are not UTF-8 to unpaired surrogates
            raise RequestError(f"the question {question!r} is no valid text: write it in UTF-8") from None


@dataclass(frozen=True)
class ClipReader:
    """Reader of media into a model's input. It holds no weights, so that it can be sent to other processes.

    transform: applied to each frame. num_frames: number of frames for media that do not set one.
    """

    transform: FrameTransform
    num_frames: int

    def __call__(self, media: Media) -> Clip:
        """Read a medium and return its transformed frames. Raises MediaError if it is unreadable."""
        return load_clip(media, self.transform, num_frames=self.num_frames)


@dataclass(frozen=True)
class EncodedClip:
    """An encoded clip.

    encoded: (1, T, 1+P, C) if the Q-Former reads the question, else (1, T, K, D). kind: as in `MediaInfo`.
    times: the frames' times in seconds. seconds: time spent on each stage. digest: key in the `FeatureCache`; "" if not
    cached.
    """

    encoded: Tensor
    kind: str
    times: list[float]
    seconds: Mapping[str, float] = field(default_factory=lambda: dict(NO_TIME))
    digest: str = ""


class HasSize(Protocol):
    """Type of an object with a size in bytes, such as a `Prefix` of models/generation.py."""

    @property
    def nbytes(self) -> int: ...


class FeatureCache:
    """Least-recently-used cache of encoded videos in main memory, of at most `max_bytes`. Thread-safe.

    Keys are hashes of the frames, so a renamed file is found and a changed file is not.
    The cache also holds prefixes: keys and values of the language model for prompts about a video, on its device. They
    use the room that the videos leave, and the least recently used one is dropped first. When a video is dropped, its
    prefixes are too.
    """

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[Hashable, Tensor] = LRUCache(max_bytes, getsizeof=lambda tensor: tensor.nbytes)
        self.max_bytes = max_bytes
        self._prefixes: list[tuple[str | None, Hashable, Any]] = []  # digest, state, prefix; least recently used first
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Return the size of everything in the cache."""
        return int(self._kept.currsize) + sum(prefix.nbytes for _, _, prefix in self._prefixes)

    def get(self, key: Hashable) -> Tensor | None:
        """Return the tensor of that key, or None. The tensor becomes the most recently used one."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Cache the tensor in main memory, and drop the least recently used tensors beyond `max_bytes`.

        A tensor larger than `max_bytes` is not cached, and no other is dropped for it.
        """
        tensor = tensor.detach().cpu()
        with self._lock, suppress(ValueError):  # larger than the cache
            self._kept.pop(key, None)
            self._kept[key] = tensor
        with self._lock:
            self._drop_prefixes()

    def prefixes(self, digest: str | None, state: Hashable) -> list[Any]:
        """Return the prefixes of prompts about a video, least recently used first.

        digest: the video's key; None for prompts without a video. state: identifies the language model's weights.
        """
        with self._lock:
            return [prefix for *key, prefix in self._prefixes if key == [digest, state]]

    def put_prefixes(self, digest: str | None, state: Hashable, prefixes: Sequence[HasSize]) -> None:
        """Replace the prefixes of prompts about a video by the last `MAX_PREFIXES` of those given, if there is room.

        If the video itself is not in the cache, no prefix is kept.
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
        """Drop prefixes of videos that are no longer cached, then the least recently used ones beyond `max_bytes`."""
        self._prefixes = [one for one in self._prefixes if one[0] is None or one[0] in self._kept]
        while self._prefixes and self.num_bytes > self.max_bytes:
            self._prefixes.pop(0)


class Together(Generic[T, R]):
    """Wrapper that batches calls from several threads: each thread passes one item, `work` gets a list of items.

    One batch runs at a time; items that arrive meanwhile form the next batch. If a batch fails, each item is run
    separately, so that an error reaches only the thread that caused it.
    """

    def __init__(self, work: Callable[[Sequence[T]], Sequence[R]]) -> None:
        self._work = work
        self._waiting: SimpleQueue[tuple[T, Future[R]]] = SimpleQueue()
        self._turn = Lock()

    def __call__(self, item: T) -> R:
        """Return the item's result. Raises the exception that `work` raises for this item."""
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
        for one in taken:  # outside `except`, so that the error no longer keeps memory alive
            self._run([one])


@dataclass(frozen=True)
class CutTokens:
    """Numbers of visual and of text tokens that the context rule cut from the beginning of a prompt."""

    visual: int = 0
    text: int = 0

    @property
    def total(self) -> int:
        """Return the number of tokens that were cut, visual and text."""
        return self.visual + self.text

    def __str__(self) -> str:
        """Return a sentence for the user."""
        return f"The prompt is long: its first {self.total} tokens were cut, {self.visual} of them the video's."


@dataclass(frozen=True)
class Prepared:
    """A request with its prompt, ready to be answered.

    ids: token ids of the prompt; one placeholder id stands for all visual tokens. visual: the visual tokens, (N, D);
    None without media. times: the frames' times in seconds. seconds: time spent on each stage. cut: tokens that the
    context rule removed. digest: the video's key in the cache; None without media.
    """

    request: Request
    ids: list[int]
    visual: Tensor | None = None
    times: list[float] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=lambda: dict(NO_TIME))
    cut: CutTokens = CutTokens()
    digest: str | None = None

    @property
    def num_visual(self) -> int:
        """Return the number of visual tokens of the prompt."""
        return 0 if self.visual is None else len(self.visual)

    @property
    def length(self) -> int:
        """Return the number of tokens of the prompt, text and visual."""
        return len(self.ids) if self.visual is None else len(self.ids) - 1 + len(self.visual)

    def fitted(self, *, context: str, max_new_tokens: int, text_config: Any, num_question: int) -> "Prepared":
        """Return the prompt without the first tokens, as many as the context rule cuts.

        text_config: the language model's configuration. num_question: number of ids of the last question, which are
        never cut. Raises RequestError if the rule cannot shorten the prompt enough.
        """
        positions, table = num_positions(text_config), has_position_table(text_config)
        rooms: list[tuple[int, str]] = []  # limits of the prompt's length, each with its reason
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
        before = min(excess, front)  # cut the text before the visual tokens, then visual tokens, then text after them
        visual = min(excess - before, self.num_visual)
        after = excess - before - visual
        return replace(
            self,
            ids=self.ids[before : front + 1] + self.ids[front + 1 + after :],
            visual=None if self.visual is None else self.visual[visual:],
            cut=CutTokens(visual=visual, text=before + after),
        )


def has_position_table(text_config: Any) -> bool:
    """Check whether a language model has a fixed table of position embeddings, not rotary or no positions.

    text_config: configuration of a causal language model in transformers.
    """
    return num_positions(text_config) is not None and not getattr(text_config, "rope_parameters", None)


def num_positions(text_config: Any) -> int | None:
    """Return the number of positions a language model was trained for; None if unlimited (ALiBi, state space)."""
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    return positions


@dataclass(frozen=True)
class Answer:
    """An answer. video: path or None. frame_times: the frames' times in seconds. seconds: time spent on each stage.

    visual_tokens: number of visual tokens that entered the language model. cut: tokens that the context rule removed.
    """

    text: str
    question: str
    video: str | None
    frame_times: list[float]
    visual_tokens: int
    seconds: dict[str, float]
    cut: CutTokens = CutTokens()
