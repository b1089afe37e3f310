"""HTML of the page's pictures: sampled frames with their times, the evidence curve, and the temporal probe's cards.

Pictures are embedded in the HTML, so that no files have to be written and removed.
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

SIDE = 144  # height and width of a picture in pixels
MAX_ANSWER = 160  # characters of the answer that are shown below the curve
HEIGHT, MARGIN = 100, 8  # height and margin of the curve, in SVG units
MEANING = {
    FORWARD: "the frames as they are",
    REVERSED: "last frame first",
    SHUFFLED: "in a fixed random order",
    SINGLE: "only the middle frame",
    BLANK: "grey frames: the model has only the question",
}


@dataclass(frozen=True)
class Film:
    """Pictures of the frames that the model sees.

    media: what was read: the file and the requested number of frames. pictures: one per sampled frame, as data URLs.
    times: the times of the sampled frames in seconds.
    """

    media: Media
    pictures: tuple[str, ...]
    times: tuple[float, ...]


class Pictures:
    """A frame transform that also stores a small picture of each frame in `taken`, cropped as for the model."""

    def __init__(self, transform: FrameTransform) -> None:
        self._transform = transform
        self._small = EvalTransform(SIDE)
        self.taken: list[str] = []

    def __call__(self, frame: np.ndarray) -> Tensor:
        """Store a picture of the frame, (H, W, 3) uint8, and return the transformed frame."""
        pixels = self._small(frame).permute(1, 2, 0)  # (SIDE, SIDE, 3)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=85)
        self.taken.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
        return self._transform(frame)


def read_film(limits: "Limits", reader: "ClipReader", media: Media) -> "tuple[Clip, tuple[str, ...]]":
    """Read a clip. Return it with a picture of each frame, as data URLs. Raises MediaError."""
    pictures = Pictures(reader.transform)
    clip = limits.read(replace(reader, transform=pictures), media)
    return clip, tuple(pictures.taken)


def film_html(film: Film | None, evidence: "Evidence | None" = None) -> str:
    """Return the HTML of the frames in a row and, if there is evidence, of its curve below them."""
    if film is None:
        return '<div class="film-empty">The frames that the model sees will be shown here.</div>'
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
    """Return the HTML of at most `most` small pictures. order: indices of the frames. blank: True for grey pictures."""
    places = order[:: max(1, -(-len(order) // most))]
    if blank:
        return '<div class="small-strip">' + '<span class="small-blank"></span>' * len(places) + "</div>"
    pictures = "".join(f'<img src="{film.pictures[place]}" alt="{clock(film.times[place])}">' for place in places)
    return f'<div class="small-strip">{pictures}</div>'


def clock(seconds: float) -> str:
    """Format a time as minutes, seconds and tenths, such as 1:02.5."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def probe_html(film: Film, question: str, answers: Mapping[str, str]) -> str:
    """Return the HTML of the temporal probe: per view of the frames a card with small pictures and the answer.

    answers: view -> answer; views without an answer yet are shown as waiting.
    """
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
    asked = f"Asked without earlier turns, with five versions of the frames: “{escape(question)}”"
    return f'<div class="probe-question">{asked}</div><div class="probe-cards">{cards}</div>{said}'


def verdict(answers: Mapping[str, str]) -> str:
    """Return a sentence on whether the answers to one question depend on the order of frames."""
    same = {view: answers[view].strip().lower() == answers[FORWARD].strip().lower() for view in VIEWS}
    if not same[REVERSED] and not same[SHUFFLED]:
        return "The answer changes when the order of the frames is changed: here the model uses the order of events."
    if not same[REVERSED] or not same[SHUFFLED]:
        changed, kept = (SHUFFLED, REVERSED) if same[REVERSED] else (REVERSED, SHUFFLED)
        return f"The answer changes if the frames are {changed}, but not if they are {kept}: a sign that order matters."
    if not same[SINGLE]:
        return "The answer is the same in every order, but not on one frame: it needs several frames, not their order."
    if not same[BLANK]:
        return "One frame gives the same answer: it needs neither several frames nor their order."
    return "The answer is the same without any picture: it comes from the question alone."


def _curve(evidence: "Evidence") -> str:
    """Return the SVG of the evidence, one unit wide per frame. Segments above the line made the answer more likely.

    A difference that does not count takes at most a quarter of the height, so that it does not look important.
    """
    count = len(evidence.times)
    low, high = min(0.0, *evidence.scores), max(0.0, *evidence.scores)
    room = max(0.0, 4 * evidence.bound - (high - low)) / 2
    low, high = low - room, high + room
    unit = (HEIGHT - 2 * MARGIN) / (high - low)
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
            "No part of the video makes this answer more or less likely: leaving any part out makes a difference of at "
            f"most {evidence.bound:.2g} nats."
        )
    elif not evidence.supports:
        found = "No part of the video makes this answer more likely: leaving out any part does not make it less likely."
    else:
        found = (
            f"The most important part is {_span(evidence, first, end)}: without it, the answer is {score:.3g} nats "
            "less likely."
        )
    if evidence.cut:
        found += f" The model did not read {len(evidence.cut)} parts, because they were cut from the prompt."
    answer = evidence.answer if len(evidence.answer) <= MAX_ANSWER else f"{evidence.answer[:MAX_ANSWER]}…"
    return (
        f'<div class="film-words"><b>{found}</b> The curve shows how much the log probability of '
        f"“{escape(answer)}” ({evidence.log_probability:.3g} nats) falls when a part is left out. "
        "Below the line, leaving the part out makes the answer more likely.</div>"
    )


def _span(evidence: "Evidence", first: int, end: int) -> str:
    """Return the times of a segment as text. first, end: its frame indices, end excluded."""
    start, last = clock(evidence.times[first]), clock(evidence.times[end - 1])
    return start if end - first == 1 else f"{start} to {last}"
