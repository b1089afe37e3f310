"""Handlers of the page: each yields what the page is to show, by name.

chat: messages. question: the text box. status, film, probe: HTML. busy: whether an answer is being made, which decides
the buttons. A part without a name stays as it is. Nothing here knows gradio, and every state is in the tab's `Session`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import wraps
from html import escape
from threading import Lock
from typing import Any

from stllm.common.errors import UserError
from stllm.conversation.evidence import Evidence
from stllm.processors.templates import Turn
from stllm.serving.jobs import Work
from stllm.web.film import Film, film_html, probe_html
from stllm.web.progress import Progress, progress_html
from stllm.web.service import Service, Wishes

Shown = dict[str, Any]
NO_VIDEO = "There is no video yet: upload one, record one, or click an example."
NO_ANSWER = "There is no answer yet: ask something first."


@dataclass
class Talk:
    """One conversation about one medium. A new medium, or clearing, begins another one.

    path: of the medium, None without one; name: as its owner calls it. stopped: set by the stop button.
    evidence: of the last answer.
    """

    path: str | None = None
    name: str = ""
    turns: list[Turn] = field(default_factory=list)
    film: Film | None = None
    evidence: Evidence | None = None
    stopped: bool = False


class Order:
    """A lock of one tab. gradio copies the page's first state for each tab, and each copy gets a new lock."""

    def __init__(self) -> None:
        self.lock = Lock()

    def __deepcopy__(self, memo: object) -> "Order":
        return Order()


@dataclass
class Session:
    """The state of one tab; tabs share nothing. order: held by the handler that uses the model for the tab."""

    talk: Talk = field(default_factory=Talk)
    order: Order = field(default_factory=Order)

    def begin(self, talk: Talk) -> Talk:
        """Replace the conversation; an answer that is being written in the old one stops."""
        self.talk.stopped = True
        self.talk = talk
        return talk


def _showing_errors(handler: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[Shown]]:
    """Show a UserError that the handler raises before its job begins."""

    @wraps(handler)
    def run(self: "Handlers", *arguments: Any) -> Iterator[Shown]:
        try:
            yield from handler(self, *arguments)
        except UserError as error:
            yield {"status": progress_html(Progress(), error=self.service.explain(error))}

    return run


class Handlers:
    """The page's handlers. Those that need the model are generators; the others return at once."""

    def __init__(self, service: Service) -> None:
        self.service = service

    # ---- at once ----------------------------------------------------------------------------------------------------

    def begin(self, session: Session, path: str | None, name: str) -> Shown:
        """Begin another conversation, about another medium or none; an answer that is being written stops."""
        return {**_whole(session.begin(Talk(path, name))), "question": ""}

    def clear(self, session: Session) -> Shown:
        """Begin another conversation about the same medium."""
        talk = replace(session.talk, turns=[], evidence=None, stopped=False)
        return {**_whole(session.begin(talk)), "question": ""}

    def stop(self, session: Session) -> None:
        """End the current job; its handler shows the result so far."""
        session.talk.stopped = True

    def undo(self, session: Session) -> Shown:
        """Take back the last question, which is put into the text box, and its answer."""
        talk = session.talk
        if not talk.turns:
            return {"status": progress_html(Progress(), note=NO_ANSWER)}
        last = talk.turns.pop()
        talk.evidence = None
        return {**_conversation(talk), "question": last.question, "status": _idle(talk), "film": film_html(talk.film)}

    # ---- with the model ---------------------------------------------------------------------------------------------

    def look(self, session: Session, num_frames: object) -> Iterator[Shown]:
        """Read and encode the medium of `begin`, so that the first answer comes soon."""
        talk = session.talk
        path = talk.path
        if path is None:
            yield {"status": _idle(talk)}  # gradio empties the page for a handler that yields nothing
            return
        frames = self.service.chat.num_frames if not isinstance(num_frames, int) else num_frames
        yield from self._shown(
            session, talk, lambda stop: self.service.look(path, frames, None, stop), ready="Ready: ask about it."
        )

    @_showing_errors
    def ask(self, session: Session, question: object, *controls: object) -> Iterator[Shown]:
        """Answer, with the text growing on the page. A failure leaves the conversation unchanged."""
        talk = session.talk
        text, wishes = self._checked(talk, question, controls)
        path, turns = talk.path or "", [*talk.turns, Turn(text)]
        talk.evidence = None

        def close(progress: Progress | None) -> Shown:
            if progress is None or not (progress.answer or progress.text.strip()):  # failed, or stopped before a word
                return {**_conversation(talk), "question": text}
            talk.turns.append(Turn(text, self.service.chat.processor.clean(progress.text)))
            return {**_conversation(talk), "film": film_html(talk.film)}

        job: Work[Progress] = lambda stop: self.service.ask(path, talk.film, turns, wishes, stop)  # noqa: E731
        yield from self._shown(session, talk, job, pending=text, close=close)

    @_showing_errors
    def retry(self, session: Session, *controls: object) -> Iterator[Shown]:
        """Ask the last question again; the old answer is kept until there is a new one."""
        talk = session.talk
        if not talk.turns:
            raise UserError(NO_ANSWER)
        last = talk.turns.pop()
        before = len(talk.turns)
        yield from self.ask(session, last.question, *controls)
        if session.talk is talk and len(talk.turns) == before:
            talk.turns.append(last)
            yield {**_conversation(talk), "question": ""}

    @_showing_errors
    def probe(self, session: Session, question: object, *controls: object) -> Iterator[Shown]:
        """Ask the question in the text box, or else the last one, under every view of the frames."""
        talk = session.talk
        if not (isinstance(question, str) and question.strip()) and talk.turns:
            question = talk.turns[-1].question
        text, wishes = self._checked(talk, question, controls)
        path = talk.path or ""
        yield from self._shown(
            session, talk, lambda stop: self.service.probe(path, talk.film, text, wishes, stop), probed=text
        )

    @_showing_errors
    def evidence(self, session: Session, *controls: object) -> Iterator[Shown]:
        """Measure the evidence for the last answer."""
        talk = session.talk
        if not talk.turns:
            raise UserError(NO_ANSWER)
        *before, last = talk.turns
        question, wishes = self._checked(talk, last.question, controls)
        path, turns = talk.path or "", [*before, Turn(question)]
        yield from self._shown(
            session, talk, lambda stop: self.service.evidence(path, talk.film, turns, wishes, last.answer, stop)
        )

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _checked(self, talk: Talk, question: object, controls: tuple[object, ...]) -> tuple[str, Wishes]:
        """Return the question and the controls, checked. Raises UserError."""
        if talk.path is None:
            raise UserError(NO_VIDEO)
        return self.service.limits.check_question(question), self.service.wishes(*controls)

    def _shown(
        self,
        session: Session,
        talk: Talk,
        job: Work[Progress],
        *,
        pending: str = "",
        probed: str = "",
        ready: str = "",
        close: Callable[[Progress | None], Shown] = lambda _: {},
    ) -> Iterator[Shown]:
        """Show the progress of a job; once another conversation has begun, show that one.

        pending: the question that is being answered. probed: the one of the temporal probe. ready: a note at the end.
        close: returns more to show at the end, from the last progress, or from None after a failure.
        """
        progress, talk.stopped = Progress(), False
        start = {"question": "", **_pending(talk, pending, "")} if pending else {"probe": ""} if probed else {}
        yield {"busy": True, "status": progress_html(progress), **start}
        try:
            for news in self.service.jobs.iterate(job):
                if session.talk is not talk:  # what was yielded before may come to the page after `begin`
                    yield _whole(session.talk)
                    return
                if talk.stopped:
                    ready = "Stopped."
                    break
                progress = news or progress
                yield {"status": progress_html(progress), **_pending(talk, pending, progress.text)}
                film, evidence = talk.film, talk.evidence
                if progress.film is not None and progress.film is not film:
                    talk.film, talk.evidence = progress.film, None  # the curve belongs to the frames it was measured on
                talk.evidence = progress.evidence or talk.evidence
                if talk.film is not film or talk.evidence is not evidence:
                    yield {"film": film_html(talk.film, talk.evidence)}
                if news is not None and probed and talk.film:
                    yield {"probe": probe_html(talk.film, probed, progress.answers)}
        except Exception as error:
            yield {"busy": False, "status": progress_html(progress, error=self.service.explain(error)), **close(None)}
            return
        yield {"busy": False, "status": progress_html(progress, note=ready, over=True), **close(progress)}


def _conversation(talk: Talk) -> Shown:
    """Return the messages so far, and buttons at rest."""
    return {"chat": messages(talk.turns), "busy": False}


def _whole(talk: Talk) -> Shown:
    """Return the whole page at the beginning of a conversation."""
    return {**_conversation(talk), "status": _idle(talk), "film": film_html(talk.film), "probe": ""}


def _pending(talk: Talk, question: str, text: str) -> Shown:
    return {"chat": messages([*talk.turns, Turn(question, text or "…")])} if question else {}


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Return the messages as gradio's chatbot takes them, which reads text as HTML."""
    said = [
        message
        for turn in turns
        for message in (("user", turn.question), ("assistant", turn.answer or "(an empty answer)"))
    ]
    return [{"role": role, "content": escape(text).replace("\n", "<br>")} for role, text in said]


def _idle(talk: Talk) -> str:
    return progress_html(Progress(), note="" if talk.path else NO_VIDEO)
