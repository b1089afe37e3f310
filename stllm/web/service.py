"""The engine's work for the page and its API: looking, answering, the temporal probe, evidence.

Each is a job of the queue (serving/jobs.py), a generator that yields its progress; `stop` is set when nobody listens
any more. Nothing here knows gradio.
"""

import logging
import math
import os
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event

import torch

from stllm.common.errors import UserError, out_of_memory
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.evidence import measure_evidence
from stllm.conversation.requests import Answer, Media, Prepared, Request, Seen, Stamp
from stllm.media.clip import Clip
from stllm.media.reading import ReadingPool
from stllm.media.views import FORWARD, VIEWS
from stllm.processors.templates import Turn
from stllm.serving.jobs import Jobs, Stage
from stllm.serving.limits import PageLimits
from stllm.web.film import Film, read_film
from stllm.web.progress import Progress

logger = logging.getLogger(__name__)

Steps = Generator[Progress | Stage, None, Progress]  # the return value is also yielded last


@dataclass(frozen=True)
class Wishes:
    """The values of the page's controls: how many frames, and how to answer."""

    num_frames: int
    decoding: Decoding


@dataclass
class Look:
    """A medium that was read. seen: its encodings by view; clip, stamps: None and empty if all encodings were kept."""

    chat: Chat
    media: Media
    progress: Progress
    seen: dict[str, Seen]
    clip: Clip | None = None
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def see(self, view: str = FORWARD) -> Seen:
        """Encode the medium in that view, unless it is encoded already."""
        if view not in self.seen:
            assert self.clip is not None
            media = replace(self.media, view=view)
            self.seen[view] = self.chat.see(media, self.clip.viewed(view), self.stamps[view])
        return self.seen[view]


class Service:
    """The engine behind the page, and the queue before it.

    folder: of uploads; examples: other files that may be read.
    reading: the processes that read them; None: new ones, which start with the first request.
    """

    def __init__(
        self,
        chat: Chat,
        limits: PageLimits,
        folder: Path,
        examples: Sequence[Path] = (),
        reading: ReadingPool | None = None,
    ) -> None:
        self.chat = chat
        self.limits = limits
        self.jobs = Jobs(1 + limits.waiting, reading or ReadingPool(seconds=limits.read_seconds))
        self.folder = folder.resolve()
        self.examples = frozenset(path.resolve() for path in examples)
        self._place = re.compile(re.escape(str(self.folder)) + r"/(?:[0-9a-f]+/)?")  # no part of an upload's name

    def wishes(self, num_frames: object, num_beams: object, temperature: object, max_new_tokens: object) -> Wishes:
        """Check the numbers of a browser or client. Raises UserError, naming the one that is out of bounds."""
        limits = self.limits
        return Wishes(
            num_frames=_whole("frames", num_frames, limits.frames),
            decoding=self.chat.decoding.with_options(
                num_beams=_whole("beams", num_beams, limits.beams),
                max_new_tokens=_whole("tokens of the longest answer", max_new_tokens, limits.new_tokens),
                temperature=_number("the temperature", temperature, 2.0),
            ),
        )

    def look(self, path: str, num_frames: int, known: Film | None, stop: Event) -> Steps:
        """Read and encode a medium, with pictures of its frames. known: the pictures of an earlier reading.

        Raises UserError for a file that is no upload or example, too long, or cannot be read.
        """
        return (yield from self._look(path, num_frames, known, stop)).progress

    def ask(self, path: str, known: Film | None, turns: Sequence[Turn], wishes: Wishes, stop: Event) -> Steps:
        """Answer the last turn, with the earlier ones in the prompt; with one beam piece by piece. Raises UserError."""
        look = yield from self._look(path, wishes.num_frames, known, stop)
        progress, film = look.progress, look.progress.film
        assert film is not None
        prepared = self.chat.prepare(Request(tuple(turns), film.media), wishes.decoding, look.see())
        looked = progress.stages["encode"].seconds or 0.0
        seconds = {"read": progress.stages["read"].seconds or 0.0, "encode": looked + prepared.seconds["encode"]}
        progress = progress.end("encode", seconds["encode"], prepared.num_visual).begin("answer")
        if prepared.cut.total:
            progress = replace(progress, note=str(prepared.cut))
        yield progress
        start = time.perf_counter()
        for text in self._texts(prepared, wishes.decoding, stop):
            progress = progress.write(text, self._num_tokens(text))
            yield progress
        seconds["answer"] = time.perf_counter() - start
        text = self.chat.processor.clean(progress.text)
        answer = Answer(text, turns[-1].question, path, list(film.times), prepared.num_visual, seconds, prepared.cut)
        progress = replace(progress, text=text, answer=answer).end("answer", seconds["answer"], self._num_tokens(text))
        yield progress
        return progress

    def probe(self, path: str, known: Film | None, question: str, wishes: Wishes, stop: Event) -> Steps:
        """Ask the same question about the frames in every view, without earlier turns. Raises UserError."""
        look = yield from self._look(path, wishes.num_frames, known, stop, VIEWS)
        progress, film = look.progress, _video(look.progress, "the temporal probe")
        for number, view in enumerate(VIEWS, start=1):
            progress = replace(progress, note=f"Temporal probe: {number} of {len(VIEWS)}, frames {view}")
            yield progress
            request = Request((Turn(question),), replace(film.media, view=view))
            prepared = self.chat.prepare(request, wishes.decoding, look.see(view))
            answer = self.chat.complete([prepared], wishes.decoding, stop)[0].text
            if stop.is_set():
                return progress
            progress = replace(progress, note="", answers={**progress.answers, view: answer})
        yield progress
        return progress

    def evidence(
        self, path: str, known: Film | None, turns: Sequence[Turn], wishes: Wishes, answer: str | None, stop: Event
    ) -> Steps:
        """Measure the evidence for the answer to the last turn. answer: None for the model's own. Raises UserError."""
        look = yield from self._look(path, wishes.num_frames, known, stop)
        progress, film = look.progress, _video(look.progress, "evidence over time")
        yield replace(progress, note="Leaving out one part of the video after the other…")
        request = Request(tuple(turns), film.media)
        found = measure_evidence(self.chat, request, answer, decoding=wishes.decoding, seen=look.see(), stop=stop)
        progress = replace(progress, evidence=found)
        yield progress
        return progress

    def explain(self, error: Exception) -> str:
        """Return the sentence for the user. A defect of ours is logged."""
        if isinstance(error, UserError):
            return " ".join(self._place.sub("", str(error)).split())
        if out_of_memory(error):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return "not enough memory for this: take fewer frames or fewer beams, or ask a shorter question"
        logger.error("a request failed", exc_info=error)
        return "something went wrong on the server, whose log says more; it goes on with the next question"

    def _look(
        self, path: str, num_frames: int, known: Film | None, stop: Event, views: Sequence[str] = (FORWARD,)
    ) -> Generator[Progress | Stage, None, Look]:
        """Look at the medium in those views. It ends in the model's thread; another process reads."""
        file = self._owned(path)
        media = Media(str(file), num_frames=num_frames)
        in_views = {view: replace(media, view=view) for view in views}
        stamps = {view: self.chat.stamp(medium) for view, medium in in_views.items()}
        recalled = {view: self.chat.recall(medium) for view, medium in in_views.items()}
        seen = {view: one for view, one in recalled.items() if one is not None}
        num_tokens = self.chat.model.video_input.num_tokens
        if known is not None and known.media == media and len(seen) == len(views):
            yield Stage.MODEL
            count = num_tokens(len(known.times), self.chat.model.config.tokens_per_frame)
            progress = Progress(film=known).end("read", 0.0, len(known.times)).end("encode", 0.0, count)
            return Look(self.chat, media, progress, seen)
        progress = Progress().begin("read")
        yield progress
        yield Stage.READING
        start = time.perf_counter()
        clip, pictures = self.jobs.reading.read(partial(read_film, self.limits, self.chat.read, media), file, stop)
        film = Film(media, pictures, tuple(clip.times))
        progress = replace(progress, film=film).end("read", time.perf_counter() - start, len(film.times))
        yield progress
        yield Stage.MODEL
        yield progress.begin("encode")
        start = time.perf_counter()
        look = Look(self.chat, media, progress, seen, clip, stamps)
        look.see()
        count = num_tokens(len(film.times), self.chat.model.config.tokens_per_frame)
        look.progress = progress.end("encode", time.perf_counter() - start, count)
        yield look.progress
        return look

    def _texts(self, prepared: Prepared, decoding: Decoding, stop: Event) -> Generator[str, None, None]:
        """Yield the answer's text so far, after each piece; with several beams once, at the end."""
        if decoding.num_beams > 1:
            yield self.chat.complete([prepared], decoding, stop)[0].text
            return
        text = ""
        with closing(self.chat.stream_prepared(prepared, decoding)) as pieces:
            for piece in pieces:
                text += piece
                yield text

    def _num_tokens(self, text: str) -> int:
        return len(self.chat.processor.tokenizer.encode(text, add_special_tokens=False))

    def _owned(self, path: str) -> Path:
        """Return the file of that path, and keep it for longer. Raises UserError unless it is an upload or example."""
        file = Path(path).resolve()
        if file in self.examples:
            return file
        if not file.is_relative_to(self.folder):
            raise UserError("only uploaded files and the examples can be read here: upload the video or image")
        try:
            stat = file.stat()
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # gradio counts the age from this change
        except FileNotFoundError:
            minutes = self.limits.keep_seconds // 60
            raise UserError(
                f"the uploaded file is no longer here: uploads are removed {minutes} minutes after the last question; "
                "upload it again"
            ) from None
        return file


def _video(progress: Progress, what: str) -> Film:
    """Return the film of a video. Raises UserError for a medium of one frame."""
    film = progress.film
    assert film is not None
    if len(film.times) < 2:
        raise UserError(f"{what} needs a video of at least two frames, and this gives one: take a video")
    return film


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
