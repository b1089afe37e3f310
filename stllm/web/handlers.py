"""What happens when something on the page is used: each handler yields what the page is to show, by name.

chat: messages. question: the text box. status, film, probe: HTML. busy: whether an answer is being made, which decides
the buttons. What is not named stays as it is. Nothing here knows gradio, and every state is in the tab's `Session`.
"""

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from stllm.processors.templates import Turn
from stllm.serving.jobs import Work
from stllm.web.film import film_html
from stllm.web.limits import Wishes
from stllm.web.probe import probe_html
from stllm.web.progress import Progress, progress_html
from stllm.web.service import Service
from stllm.web.talk import Session, Talk

Shown = dict[str, Any]
NO_VIDEO = "There is no video yet: upload one, record one, or click an example."
NO_ANSWER = "There is no answer yet: ask something first."


class Handlers:
    """The page's handlers. Those that need the model are generators; the others return at once."""

    def __init__(self, service: Service) -> None:
        self.service = service

    # ---- at once ----------------------------------------------------------------------------------------------------

    def begin(self, session: Session, path: str | None, name: str) -> Shown:
        """Another medium (or none) begins another conversation; an answer that is being written stops."""
        return {**_whole(session.begin(Talk(path, name))), "question": ""}

    def clear(self, session: Session) -> Shown:
        """Begins anew about the same medium."""
        return {**_whole(session.begin(session.talk.afresh())), "question": ""}

    def stop(self, session: Session) -> None:
        """Ends what goes on; its handler shows what there is."""
        session.talk.stopped = True

    def undo(self, session: Session) -> Shown:
        """Takes back the last question, which is put into the text box, and its answer."""
        talk = session.talk
        if not talk.turns:
            return {"status": progress_html(Progress(), note=NO_ANSWER)}
        last = talk.turns.pop()
        talk.evidence = None
        return {**_conversation(talk), "question": last.question, "status": _idle(talk), "film": film_html(talk.film)}

    # ---- with the model ---------------------------------------------------------------------------------------------

    def look(self, session: Session, num_frames: object) -> Iterator[Shown]:
        """Reads and encodes the medium of `begin`, so that the first answer comes soon."""
        talk = session.talk
        path = talk.path
        if path is None:
            yield {"status": _idle(talk)}  # gradio empties the page for a handler that yields nothing
            return
        frames = self.service.chat.num_frames if not isinstance(num_frames, int) else num_frames
        yield from self._shown(
            session, talk, lambda stop: self.service.look(path, frames, None, stop), ready="Ready: ask about it."
        )

    def ask(self, session: Session, question: object, *controls: object) -> Iterator[Shown]:
        """Answers, the text growing on the page. What fails leaves the conversation as it was."""
        talk = session.talk
        asked = self._checked(talk, question, controls)
        if isinstance(asked, str):
            yield {"status": progress_html(Progress(), error=asked)}
            return
        text, wishes = asked
        path, turns = talk.path or "", [*talk.turns, Turn(text)]
        talk.evidence = None

        def close(progress: Progress | None) -> Shown:
            if progress is None or not (progress.answer or progress.text.strip()):  # failed, or stopped before a word
                return {**_conversation(talk), "question": text}
            talk.turns.append(Turn(text, self.service.chat.processor.clean(progress.text)))
            return {**_conversation(talk), "film": film_html(talk.film)}

        job: Work[Progress] = lambda stop: self.service.ask(path, talk.film, turns, wishes, stop)  # noqa: E731
        yield from self._shown(session, talk, job, pending=text, close=close)

    def retry(self, session: Session, *controls: object) -> Iterator[Shown]:
        """Asks the last question again; until the new answer is there, the old one is not lost."""
        talk = session.talk
        if not talk.turns:
            yield {"status": progress_html(Progress(), error=NO_ANSWER)}
            return
        last = talk.turns.pop()
        before = len(talk.turns)
        yield from self.ask(session, last.question, *controls)
        if session.talk is talk and len(talk.turns) == before:
            talk.turns.append(last)
            yield {**_conversation(talk), "question": ""}

    def probe(self, session: Session, question: object, *controls: object) -> Iterator[Shown]:
        """The question in the text box, or else the last one, under every view of the frames."""
        talk = session.talk
        if not (isinstance(question, str) and question.strip()) and talk.turns:
            question = talk.turns[-1].question
        asked = self._checked(talk, question, controls)
        if isinstance(asked, str):
            yield {"status": progress_html(Progress(), error=asked)}
            return
        text, wishes = asked
        path = talk.path or ""
        yield from self._shown(
            session, talk, lambda stop: self.service.probe(path, talk.film, text, wishes, stop), probed=text
        )

    def evidence(self, session: Session, *controls: object) -> Iterator[Shown]:
        """What the last answer rests on."""
        talk = session.talk
        if not talk.turns:
            yield {"status": progress_html(Progress(), error=NO_ANSWER)}
            return
        *before, last = talk.turns
        asked = self._checked(talk, last.question, controls)
        if isinstance(asked, str):
            yield {"status": progress_html(Progress(), error=asked)}
            return
        path, turns, wishes = talk.path or "", [*before, Turn(last.question)], asked[1]
        yield from self._shown(
            session, talk, lambda stop: self.service.evidence(path, talk.film, turns, wishes, last.answer, stop)
        )

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _checked(self, talk: Talk, question: object, controls: tuple[object, ...]) -> tuple[str, Wishes] | str:
        """The question and the wishes, or what is wrong with them."""
        if talk.path is None:
            return NO_VIDEO
        try:
            return self.service.limits.check_question(question), self.service.wishes(*controls)
        except ValueError as error:
            return self.service.explain(error)

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
        """Follows a job and shows it; once another conversation has begun, that one is shown.

        pending: the question that is being answered. probed: the one of the temporal probe. ready: said at the end.
        close: given how far it came, None when it failed, what is shown at the end, too.
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
                if _took(talk, progress):
                    yield {"film": film_html(talk.film, talk.evidence)}
                if news is not None and probed and talk.film:
                    yield {"probe": probe_html(talk.film, probed, progress.answers)}
        except Exception as error:
            yield {"busy": False, "status": progress_html(progress, error=self.service.explain(error)), **close(None)}
            return
        yield {"busy": False, "status": progress_html(progress, note=ready, over=True), **close(progress)}


def _conversation(talk: Talk) -> Shown:
    """The messages of what was said, and buttons at rest."""
    return {"chat": messages(talk.turns), "busy": False}


def _whole(talk: Talk) -> Shown:
    """The page of a conversation that begins."""
    return {**_conversation(talk), "status": _idle(talk), "film": film_html(talk.film), "probe": ""}


def _took(talk: Talk, progress: Progress) -> bool:
    """Takes over what was seen and measured; whether the filmstrip has changed by it."""
    film, evidence = talk.film, talk.evidence
    if progress.film is not None and progress.film is not film:
        talk.film, talk.evidence = progress.film, None  # the curve belongs to the frames it was measured on
    talk.evidence = progress.evidence or talk.evidence
    return talk.film is not film or talk.evidence is not evidence


def _pending(talk: Talk, question: str, text: str) -> Shown:
    return {"chat": messages([*talk.turns, Turn(question, text or "…")])} if question else {}


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """As gradio's chatbot has them, which takes text for HTML. An empty answer is said to be one."""
    found = []
    for turn in turns:
        found.append({"role": "user", "content": _as_html(turn.question)})
        found.append({"role": "assistant", "content": _as_html(turn.answer or "(an empty answer)")})
    return found


def _as_html(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _idle(talk: Talk) -> str:
    return progress_html(Progress(), note="" if talk.path else NO_VIDEO)
