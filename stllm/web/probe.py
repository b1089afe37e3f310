"""The temporal probe on the page: the answers under every view of the frames, side by side, and what they show."""

from collections.abc import Mapping
from html import escape

from stllm.media.views import BLANK, FORWARD, REVERSED, SHUFFLED, SINGLE, VIEWS, view_order
from stllm.web.film import small_strip
from stllm.web.talk import Film

MEANING = {
    FORWARD: "the frames as they are",
    REVERSED: "last frame first",
    SHUFFLED: "in a fixed random order",
    SINGLE: "the middle frame alone",
    BLANK: "grey: what the text alone gives away",
}


def probe_html(film: Film, question: str, answers: Mapping[str, str]) -> str:
    """A card a view, with what was shown in small; views that have no answer yet wait."""
    cards = "".join(_card(film, view, answers) for view in VIEWS)
    said = f'<div class="probe-words"><b>{verdict(answers)}</b></div>' if len(answers) == len(VIEWS) else ""
    asked = f'<div class="probe-question">Asked alone, under five views: “{escape(question)}”</div>'
    return f'{asked}<div class="probe-cards">{cards}</div>{said}'


def verdict(answers: Mapping[str, str]) -> str:
    """What the answers to one question say about time; a benchmark's probe says it of a model."""
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


def _card(film: Film, view: str, answers: Mapping[str, str]) -> str:
    answer = answers.get(view)
    strip = small_strip(film, view_order(view, len(film.times)), blank=view == BLANK)
    if answer is None:
        return f'<div class="probe-card waiting"><b>{view}</b><i>{MEANING[view]}</i>{strip}<p>…</p></div>'
    same = view != FORWARD and answer.strip().lower() == answers[FORWARD].strip().lower()
    mark = "" if view == FORWARD else f'<em class="{"same" if same else "other"}">{"same" if same else "differs"}</em>'
    text = escape(answer) or "(an empty answer)"
    return f'<div class="probe-card"><b>{view}{mark}</b><i>{MEANING[view]}</i>{strip}<p>{text}</p></div>'
