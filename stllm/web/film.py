"""Pictures of the page: the sampled frames with their times, evidence over time as a curve, the temporal probe's cards.

They are HTML and SVG with the pictures inside, so that no file is written that would have to be removed.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from stllm.conversation.requests import Media
from stllm.media.views import BLANK, FORWARD, REVERSED, SHUFFLED, SINGLE, VIEWS, view_order
from stllm.processors.transforms import EvalTransform, FrameTransform

if TYPE_CHECKING:  # read_film runs in a process without a model
    from stllm.conversation.evidence import Evidence
    from stllm.conversation.requests import ClipReader
    from stllm.media.clip import Clip
    from stllm.serving.limits import Limits

SIDE = 144  # pixels of a picture
MAX_ANSWER = 160  # characters of it that are shown
HEIGHT, MARGIN = 100, 8  # of the curve, in units of its own
MEANING = {
    FORWARD: "the frames as they are",
    REVERSED: "last frame first",
    SHUFFLED: "in a fixed random order",
    SINGLE: "the middle frame alone",
    BLANK: "grey: what the text alone gives away",
}


@dataclass(frozen=True)
class Film:
    """The frames that the model was shown. media: with the number of frames that was asked for.

    pictures: of each frame, as data addresses. times: seconds.
    """

    media: Media
    pictures: tuple[str, ...]
    times: tuple[float, ...]


class Pictures:
    """A frame transform that also keeps a small picture of each frame, cropped as the model sees it."""

    def __init__(self, transform: FrameTransform) -> None:
        self._transform = transform
        self._small = EvalTransform(SIDE)
        self.taken: list[str] = []

    def __call__(self, frame: np.ndarray) -> Tensor:
        """frame: (H, W, 3) uint8."""
        pixels = self._small(frame).permute(1, 2, 0)  # (SIDE, SIDE, 3)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=85)
        self.taken.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
        return self._transform(frame)


def read_film(limits: "Limits", reader: "ClipReader", media: Media) -> "tuple[Clip, tuple[str, ...]]":
    """Read the clip, and make a picture of each frame, as data addresses. Raises MediaError."""
    pictures = Pictures(reader.transform)
    clip = limits.read(replace(reader, transform=pictures), media)
    return clip, tuple(pictures.taken)


def film_html(film: Film | None, evidence: "Evidence | None" = None) -> str:
    """Draw the strip and, with evidence, the curve, each point under its frame."""
    if film is None:
        return '<div class="film-empty">The frames that the model looks at will be shown here.</div>'
    peak = range(*evidence.segments[evidence.peak]) if evidence is not None and evidence.supports else ()
    frames = "".join(
        f'<figure class="film-frame{" film-peak" if place in peak else ""}">'
        f'<img src="{picture}" alt="frame {place + 1} of {len(film.pictures)}" loading="lazy">'
        f"<figcaption>{clock(seconds)}</figcaption></figure>"
        for place, (picture, seconds) in enumerate(zip(film.pictures, film.times, strict=True))
    )
    curve = "" if evidence is None else _curve(evidence)
    words = "" if evidence is None else _words(evidence)
    strip = f'<div class="film-strip" style="--frames: {len(film.pictures)}">{frames}{curve}</div>'
    return f'<div class="film-scroll" tabindex="0" aria-label="sampled frames">{strip}</div>{words}'


def small_strip(film: Film, order: list[int], *, blank: bool = False, most: int = 8) -> str:
    """Draw at most `most` pictures of the frames in that order; blank: grey ones."""
    places = order[:: max(1, -(-len(order) // most))]
    if blank:
        return '<div class="small-strip">' + '<span class="small-blank"></span>' * len(places) + "</div>"
    pictures = "".join(f'<img src="{film.pictures[place]}" alt="{clock(film.times[place])}">' for place in places)
    return f'<div class="small-strip">{pictures}</div>'


def clock(seconds: float) -> str:
    """Format a time as players do: 1:02.5."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def probe_html(film: Film, question: str, answers: Mapping[str, str]) -> str:
    """Draw a card for each view: a small strip and the answer, which may still be missing."""
    same = {view: answers[view].strip().lower() == answers[FORWARD].strip().lower() for view in answers}
    cards = ""
    for view in VIEWS:
        strip = small_strip(film, view_order(view, len(film.times)), blank=view == BLANK)
        state, mark, text = " waiting", "", "…"
        if view in answers:
            state, text = "", escape(answers[view]) or "(an empty answer)"
            if view != FORWARD:
                mark = '<em class="same">same</em>' if same[view] else '<em class="other">differs</em>'
        cards += f'<div class="probe-card{state}"><b>{view}{mark}</b><i>{MEANING[view]}</i>{strip}<p>{text}</p></div>'
    said = f'<div class="probe-words"><b>{verdict(answers)}</b></div>' if len(answers) == len(VIEWS) else ""
    asked = f'<div class="probe-question">Asked alone, under five views: “{escape(question)}”</div>'
    return f'{asked}<div class="probe-cards">{cards}</div>{said}'


def verdict(answers: Mapping[str, str]) -> str:
    """Conclude from the answers to one question whether they depend on time."""
    same = {view: answers[view].strip().lower() == answers[FORWARD].strip().lower() for view in VIEWS}
    if not same[REVERSED] and not same[SHUFFLED]:
        return "The answer changes when the order of the frames is taken away: here the model uses time."
    if not same[REVERSED] or not same[SHUFFLED]:
        changed, kept = (SHUFFLED, REVERSED) if same[REVERSED] else (REVERSED, SHUFFLED)
        return f"The answer changes with the frames {changed}, not with them {kept}: a sign that time is used."
    if not same[SINGLE]:
        return "The answer is the same in every order, but not on one frame: it needs several frames, not their order."
    if not same[BLANK]:
        return "One frame gives the same answer: nothing here needs time."
    return "The answer is the same without any picture: it comes from the question alone."


def _curve(evidence: "Evidence") -> str:
    """Draw an SVG as wide as the strip, one unit a frame. Segments above the line spoke for the answer."""
    count = len(evidence.times)
    low, high = min(0.0, *evidence.scores), max(0.0, *evidence.scores)
    unit = (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)
    level = [MARGIN + (high - score) * unit for score in evidence.scores]
    zero = MARGIN + high * unit
    spans = list(zip(evidence.segments, evidence.scores, level, strict=True))
    bars = "".join(
        f'<rect class="{"for" if score >= 0 else "against"}" x="{first + 0.06:.2f}" width="{end - first - 0.12:.2f}" '
        f'y="{min(y, zero):.2f}" height="{abs(y - zero):.2f}"><title>{_span(evidence, first, end)}: {score:+.3f} '
        "nats</title></rect>"
        for (first, end), score, y in spans
    )
    points = " ".join(f"{(first + end) / 2:g},{y:.2f}" for (first, end), _, y in spans)
    return (
        f'<svg class="film-curve" viewBox="0 0 {count} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="evidence over time">{bars}<line x1="0" x2="{count}" y1="{zero:.2f}" y2="{zero:.2f}"/>'
        f'<polyline points="{points}"/></svg>'
    )


def _words(evidence: "Evidence") -> str:
    first, end = evidence.segments[evidence.peak]
    score = evidence.scores[evidence.peak]
    if not evidence.matters:
        found = (
            "No part of the video speaks for this answer or against it: leaving any out makes a difference of at most "
            f"{evidence.bound:.2g} nats."
        )
    elif not evidence.supports:
        found = "No part of the video speaks for this answer: leaving any out makes it no less likely."
    else:
        found = f"Most rests on {_span(evidence, first, end)}: without it the answer is {score:.3g} nats less likely."
    if evidence.cut:
        found += f" The model did not read {len(evidence.cut)} parts, which were cut from the prompt."
    answer = evidence.answer if len(evidence.answer) <= MAX_ANSWER else f"{evidence.answer[:MAX_ANSWER]}…"
    return (
        f'<div class="film-words"><b>{found}</b> The curve shows how much the log probability of '
        f"“{escape(answer)}” ({evidence.log_probability:.3g} nats) falls when a part is left out; "
        "below the line, that part spoke against it.</div>"
    )


def _span(evidence: "Evidence", first: int, end: int) -> str:
    """Format the time of a segment."""
    start, last = clock(evidence.times[first]), clock(evidence.times[end - 1])
    return start if end - first == 1 else f"{start} to {last}"
