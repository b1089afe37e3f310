"""The jobs of the page and its API: reading a medium, answering, the temporal probe, evidence over time.

A job is a generator for the queue (serving/jobs.py) that yields its progress. Its event `stop` is set when the client
has left. This file does not depend on gradio or HTML.
"""

import math
import os
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.evidence import Evidence, measure_evidence
from stllm.conversation.requests import EncodedClip, Media, Prepared, Request
from stllm.media.clip import Clip
from stllm.media.views import FORWARD, VIEWS
from stllm.processors.templates import Turn
from stllm.serving.jobs import Jobs, Stage, explain
from stllm.serving.limits import PageLimits
from stllm.web.film import Film, read_film


@dataclass(frozen=True)
class Step:
    """A step of a job.

    seconds: its duration, None while it runs. count: number of frames or tokens, None until known.
    """

    seconds: float | None = None
    count: int | None = None
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job: its steps "read" (frames), "encode" (visual tokens), "answer" (tokens), and the results.

    text: the answer so far. details: facts about a complete answer, for the API. note: sentence about work that is not
    one of the steps. film: pictures of the frames. answers: view -> answer of the temporal probe.
    """

    steps: Mapping[str, Step] = field(default_factory=dict)
    text: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    film: Film | None = None
    answers: Mapping[str, str] = field(default_factory=dict)
    evidence: Evidence | None = None

    def at(self, name: str, seconds: float | None = None, count: int | None = None, **results: Any) -> "JobProgress":
        """Return a copy with a step begun or updated; giving `seconds` ends it. results: other fields to set."""
        step = replace(self.steps.get(name, Step()), seconds=seconds, count=count)
        return replace(self, steps={**self.steps, name: step}, **results)


Steps = Generator[JobProgress | Stage, None, None]
Look = tuple[JobProgress, Film, Callable[[str], EncodedClip]]  # the function returns the encoding of a view


class Service:
    """The model of the page and its queue; methods return jobs.

    folder: folder of uploads. examples: other files that may be read. jobs: the queue; None for a new one.
    """

    def __init__(
        self,
        chat: Chat,
        limits: PageLimits,
        folder: Path,
        examples: Sequence[Path] = (),
        jobs: Jobs | None = None,
    ) -> None:
        self.chat = chat
        self.limits = limits
        self.jobs = jobs or Jobs(limits)
        self.folder = folder.resolve()
        self.examples = frozenset(path.resolve() for path in examples)
        self._place = re.compile(re.escape(str(self.folder)) + r"/(?:[0-9a-f]+/)?")  # the path before an upload's name

    def look(self, path: str, num_frames: int, stop: Event) -> Steps:
        """Read and encode a medium, and make pictures of its frames.

        Raises UserError for a file that is not an upload or example, is too long or is unreadable.
        """
        yield from self._look(path, num_frames, None, stop)

    def ask(
        self, path: str, known: Film | None, turns: Sequence[Turn], controls: Sequence[object], stop: Event
    ) -> Steps:
        """Answer the last turn; the prompt contains the earlier ones. With one beam, the answer is streamed.

        known: the frames' pictures, if the page has them from an earlier job; None: they are made. controls: number of
        frames, number of beams, temperature, and the answer's maximum number of tokens. Raises UserError.
        """
        turns, num_frames, decoding = self._checked(turns, controls)
        progress, film, see = yield from self._look(path, num_frames, known, stop)
        yield Stage.ANSWER
        prepared = self.chat.prepare(Request(turns, film.media), decoding, see(FORWARD))
        note = str(prepared.cut) if prepared.cut.total else ""
        progress = progress.at("encode", prepared.seconds["encode"], prepared.num_visual, note=note).at("answer")
        yield progress
        start = time.perf_counter()
        for text in self._texts(prepared, decoding, stop):
            progress = progress.at("answer", count=self._num_tokens(text), text=text)
            yield progress
        text = self.chat.processor.clean(progress.text)
        num_tokens = self._num_tokens(text)
        progress = progress.at("answer", time.perf_counter() - start, num_tokens, text=text)
        details = {
            "frame_times": list(film.times),
            "visual_tokens": prepared.num_visual,
            "cut_tokens": asdict(prepared.cut),
            "tokens": num_tokens,
            "seconds": {name: step.seconds for name, step in progress.steps.items()},
        }
        yield replace(progress, details=details)

    def probe(self, path: str, known: Film | None, question: Any, controls: Sequence[object], stop: Event) -> Steps:
        """Ask a question, without earlier turns, once per view of the frames (temporal probe). Raises UserError."""
        turns, num_frames, decoding = self._checked([Turn(question)], controls)
        progress, film, see = yield from self._look(path, num_frames, known, stop, VIEWS)
        _check_is_video(film, "the temporal probe")
        seconds, num_visual, num_tokens = {"encode": 0.0, "answer": 0.0}, 0, 0  # of all views
        for number, view in enumerate(VIEWS, start=1):
            progress = replace(progress, note=f"Temporal probe: {number} of {len(VIEWS)}, frames {view}")
            yield progress
            yield Stage.MODEL
            prepared = self.chat.prepare(Request(turns, replace(film.media, view=view)), decoding, see(view))
            yield Stage.ANSWER
            num_visual += prepared.num_visual
            seconds["encode"] += prepared.seconds["encode"]
            progress = progress.at("encode", seconds["encode"], num_visual).at("answer", count=num_tokens)
            yield progress
            answer = self.chat.complete([prepared], decoding, stop)[0]
            if stop.is_set():
                return
            num_tokens += self._num_tokens(answer.text)
            seconds["answer"] += answer.seconds["answer"]
            progress = replace(progress, note="", answers={**progress.answers, view: answer.text})
            progress = progress.at("answer", seconds["answer"], num_tokens)
        yield progress

    def evidence(
        self,
        path: str,
        known: Film | None,
        turns: Sequence[Turn],
        controls: Sequence[object],
        answer: str | None,
        stop: Event,
    ) -> Steps:
        """Measure the evidence for the answer to the last turn. answer: None for the model's own. Raises UserError."""
        turns, num_frames, decoding = self._checked(turns, controls)
        progress, film, see = yield from self._look(path, num_frames, known, stop)
        _check_is_video(film, "evidence over time")
        yield replace(progress, note="Measuring the answer's probability without each part of the video…")
        request = Request(turns, film.media)
        found = measure_evidence(self.chat, request, answer, decoding=decoding, seen=see(FORWARD), stop=stop)
        yield replace(progress, evidence=found)

    def explain(self, error: Exception) -> str:
        """Return the sentence about an error, without the path of uploads. Unexpected errors are logged."""
        return self._place.sub("", explain(error))

    def _checked(self, turns: Sequence[Turn], controls: Sequence[object]) -> tuple[tuple[Turn, ...], int, Decoding]:
        """Check a user's input. Return the turns, the number of frames and the settings of generation.

        Raises UserError, naming a value that is out of range.
        """
        limits, question = self.limits, turns[-1].question
        text = question.strip() if isinstance(question, str) else ""
        Request((Turn(text),)).check()
        if len(text) > limits.text_characters:
            most = limits.text_characters
            raise UserError(f"the question has {len(text)} characters, at most {most} are read here: shorten it")
        num_frames, num_beams, temperature, max_new_tokens = controls
        decoding = self.chat.decoding.with_options(
            num_beams=_whole("beams", num_beams, limits.beams),
            max_new_tokens=_whole("tokens of the longest answer", max_new_tokens, limits.new_tokens),
            temperature=_number("the temperature", temperature, 2.0),
        )
        return (*turns[:-1], Turn(text)), _whole("frames", num_frames, limits.frames), decoding

    def _look(
        self, path: str, num_frames: int, known: Film | None, stop: Event, views: Sequence[str] = (FORWARD,)
    ) -> Generator[JobProgress | Stage, None, Look]:
        """Read and encode a medium in several views. Yield the progress; return it with the pictures and encodings.

        The part of a job after this runs in the model's thread.
        """
        file = self._owned(path)
        media = Media(str(file), num_frames=num_frames)
        in_views = {view: replace(media, view=view) for view in views}
        stamps = {view: self.chat.stamp(medium) for view, medium in in_views.items()}
        seen = {view: kept for view, medium in in_views.items() if (kept := self.chat.recall(medium)) is not None}
        clip: Clip | None = None

        def see(view: str) -> EncodedClip:
            if view not in seen:
                assert clip is not None
                seen[view] = self.chat.see(in_views[view], clip.viewed(view), stamps[view])
            return seen[view]

        if known is not None and known.media == media and len(seen) == len(views):
            yield Stage.MODEL
            progress, film = JobProgress(film=known).at("read", 0.0, len(known.times)), known
        else:
            progress = JobProgress().at("read")
            yield progress
            yield Stage.READING
            start = time.perf_counter()
            clip, pictures = self.jobs.reading.read(partial(read_film, self.limits, self.chat.read, media), file, stop)
            film = Film(media, pictures, tuple(clip.times))
            progress = progress.at("read", time.perf_counter() - start, len(film.times), film=film)
            yield progress
            yield Stage.MODEL
            yield progress.at("encode")
        num_tokens = self.chat.model.video_input.num_tokens(len(film.times), self.chat.model.config.tokens_per_frame)
        progress = progress.at("encode", see(FORWARD).seconds["encode"], num_tokens)
        yield progress
        return progress, film, see

    def _texts(self, prepared: Prepared, decoding: Decoding, stop: Event) -> Generator[str, None, None]:
        """Yield the answer's text so far after each piece; with several beams only the complete text."""
        if decoding.num_beams > 1:
            yield self.chat.complete([prepared], decoding, stop)[0].text
            return
        text = ""
        with closing(self.chat.stream_prepared(prepared, decoding, stop)) as pieces:
            for piece in pieces:
                text += piece
                yield text

    def _num_tokens(self, text: str) -> int:
        return len(self.chat.processor.tokenizer.encode(text, add_special_tokens=False))

    def _owned(self, path: str) -> Path:
        """Return the path as an absolute one, after checking that it is an upload or an example (else UserError).

        An upload is also marked as used, so that it is removed later.
        """
        file = Path(path).resolve()
        if file in self.examples:
            return file
        if not file.is_relative_to(self.folder):
            raise UserError("only uploaded files and the examples can be read here: upload the video or image")
        try:
            stat = file.stat()
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # changes ctime, by which gradio counts the age
        except FileNotFoundError:
            minutes = self.limits.keep_seconds // 60
            raise UserError(
                f"the uploaded file is no longer here: uploads are removed {minutes} minutes after the last question; "
                "upload it again"
            ) from None
        return file


def _check_is_video(film: Film, what: str) -> None:
    """Raise UserError if the medium has only one frame. what: the feature that needs more, for the message."""
    if len(film.times) < 2:
        raise UserError(f"{what} needs a video of at least two frames, and this gives one: take a video")


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
