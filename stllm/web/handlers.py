"""Handlers of the page's events. They do not depend on gradio. All state is in the `Session` of a browser tab.

A handler yields dictionaries of the parts of the page to update: chat: messages. question: content of the text box.
status, film, probe: HTML. busy: whether a job is running, which determines the enabled buttons.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from html import escape
from threading import Event, Lock
from time import perf_counter
from typing import Any

from stllm.conversation.evidence import Evidence
from stllm.processors.templates import Turn
from stllm.web.film import Film, film_html, probe_html
from stllm.web.service import JobProgress, Service, Steps

Shown = dict[str, Any]
NO_VIDEO = "There is no video yet: upload one, record one, or click an example."
NO_ANSWER = "There is no answer yet: ask something first."
STEPS = {"read": ("Reading", "frames"), "encode": ("Encoding", "visual tokens"), "answer": ("Answering", "tokens")}


@dataclass
class Talk:
    """One conversation about one medium. A new medium or the clear button starts another conversation.

    path: path of the medium; None without one. film: pictures of its frames. evidence: evidence for the last answer.
    stopped: True after the stop button was pressed.
    """

    path: str | None = None
    turns: list[Turn] = field(default_factory=list)
    film: Film | None = None
    evidence: Evidence | None = None
    stopped: bool = False


class Session:
    """The state of one browser tab. talk: its conversation. lock: held by the tab's handler that uses the model."""

    def __init__(self) -> None:
        self.talk = Talk()
        self.lock = Lock()

    def __deepcopy__(self, memo: object) -> "Session":
        """Return a new session. gradio copies the initial state for each tab, and tabs must share nothing."""
        return Session()

    def begin(self, talk: Talk) -> Shown:
        """Replace the conversation, and stop a running answer in the old one. Return the content of the whole page."""
        self.talk.stopped = True
        self.talk = talk
        return {**_whole(talk), "question": ""}


class Handlers:
    """The page's handlers. Those that use the model are generators; the others return at once."""

    def __init__(self, service: Service) -> None:
        self.service = service

    # ---- at once ----------------------------------------------------------------------------------------------------

    def begin(self, session: Session, path: str | None) -> Shown:
        """Start a conversation about another medium, or without one. A running answer is stopped."""
        return session.begin(Talk(path))

    def clear(self, session: Session) -> Shown:
        """Start a new conversation about the same medium."""
        return session.begin(Talk(session.talk.path, film=session.talk.film))

    def stop(self, session: Session) -> None:
        """Stop the running job. Its handler shows the result so far."""
        session.talk.stopped = True

    def undo(self, session: Session) -> Shown:
        """Remove the last question and its answer, and put the question into the text box."""
        talk = session.talk
        if not talk.turns:
            return {"status": progress_html(JobProgress(), note=NO_ANSWER)}
        last, talk.evidence = talk.turns.pop(), None
        return {**_conversation(talk), "question": last.question, "status": _idle(talk), "film": film_html(talk.film)}

    # ---- with the model ---------------------------------------------------------------------------------------------

    def look(self, session: Session, num_frames: object) -> Iterator[Shown]:
        """Read and encode the conversation's medium in advance, so that the first answer is faster."""
        if session.talk.path is None:
            yield {"status": _idle(session.talk)}  # if a handler yields nothing, gradio empties the page
            return
        frames = num_frames if isinstance(num_frames, int) else self.service.chat.num_frames
        yield from self._shown(
            session, lambda path, stop: self.service.look(path, frames, stop), ready="Ready: ask about it."
        )

    def ask(self, session: Session, question: object, *controls: object) -> Iterator[Shown]:
        """Answer a question, and show the text as it is generated. A failure leaves the conversation unchanged."""
        talk, text = session.talk, question.strip() if isinstance(question, str) else ""
        turns = [*talk.turns, Turn(text)]

        def close(progress: JobProgress | None) -> Shown:
            if progress is None or not (progress.details or progress.text.strip()):  # failed, or stopped without text
                return {**_conversation(talk), "question": text}
            talk.turns.append(Turn(text, self.service.chat.processor.clean(progress.text)))
            talk.evidence = None  # it explained the previous answer
            return {**_conversation(talk), "film": film_html(talk.film)}

        yield from self._shown(
            session,
            lambda path, stop: self.service.ask(path, talk.film, turns, controls, stop),
            pending=text,
            close=close,
        )

    def retry(self, session: Session, *controls: object) -> Iterator[Shown]:
        """Ask the last question again. If that fails, the old answer stays."""
        talk = session.talk
        if not talk.turns:
            yield {"status": progress_html(JobProgress(), error=NO_ANSWER)}
            return
        last = talk.turns.pop()
        before = len(talk.turns)
        yield from self.ask(session, last.question, *controls)
        if session.talk is talk and len(talk.turns) == before:
            talk.turns.append(last)
            yield {**_conversation(talk), "question": ""}

    def probe(self, session: Session, question: object, *controls: object) -> Iterator[Shown]:
        """Ask the question in the text box, or else the last question, once per view of the frames (temporal probe)."""
        talk, text = session.talk, question.strip() if isinstance(question, str) else ""
        if not text and talk.turns:
            text = talk.turns[-1].question
        yield from self._shown(
            session, lambda path, stop: self.service.probe(path, talk.film, text, controls, stop), probed=text
        )

    def evidence(self, session: Session, *controls: object) -> Iterator[Shown]:
        """Measure the evidence for the last answer."""
        talk = session.talk
        if not talk.turns:
            yield {"status": progress_html(JobProgress(), error=NO_ANSWER)}
            return
        *before, last = talk.turns
        turns = [*before, Turn(last.question)]
        yield from self._shown(
            session,
            lambda path, stop: self.service.evidence(path, talk.film, turns, controls, last.answer, stop),
            steps=("read", "encode"),  # it measures the answer that is there
        )

    def _shown(
        self,
        session: Session,
        job: Callable[[str, Event], Steps],
        *,
        pending: str = "",
        probed: str = "",
        ready: str = "",
        steps: Collection[str] = tuple(STEPS),
        close: Callable[[JobProgress | None], Shown] = lambda _: {},
    ) -> Iterator[Shown]:
        """Run a job about the tab's medium, and yield its progress. If a new conversation starts, show that and end.

        pending: the question to be answered. probed: the temporal probe's question. ready: a note to show at the end.
        steps: the steps to show.
        close: function that returns further parts to update at the end; it gets the last progress, or None after a
        failure.
        """
        talk, progress = session.talk, JobProgress()
        status = partial(progress_html, steps=steps)
        if (path := talk.path) is None:
            yield {"status": status(progress, error=NO_VIDEO)}
            return
        talk.stopped = False
        start = {"question": "", **_pending(talk, pending, "")} if pending else {"probe": ""} if probed else {}
        yield {"busy": True, "status": status(progress), **start}
        try:
            for news in self.service.jobs.iterate(lambda stop: job(path, stop)):
                if session.talk is not talk:  # show the new one again, as earlier updates may have arrived after it
                    yield _whole(session.talk)
                    return
                if talk.stopped:
                    ready = "Stopped."
                    break
                progress = news or progress
                yield {"status": status(progress), **_pending(talk, pending, progress.text)}
                film, evidence = talk.film, talk.evidence
                if progress.film is not None and progress.film != film:
                    talk.film, talk.evidence = progress.film, None  # the old curve is for other frames
                talk.evidence = progress.evidence or talk.evidence
                if talk.film is not film or talk.evidence is not evidence:
                    yield {"film": film_html(talk.film, talk.evidence)}
                if news is not None and probed and talk.film:
                    yield {"probe": probe_html(talk.film, probed, progress.answers)}
        except Exception as error:
            yield {"busy": False, "status": status(progress, error=self.service.explain(error)), **close(None)}
            return
        yield {"busy": False, "status": status(progress, note=ready, over=True), **close(progress)}


def _conversation(talk: Talk) -> Shown:
    """Return the messages, with the buttons enabled."""
    return {"chat": messages(talk.turns), "busy": False}


def _whole(talk: Talk) -> Shown:
    """Return the content of the whole page when no job is running."""
    return {**_conversation(talk), "status": _idle(talk), "film": film_html(talk.film), "probe": ""}


def _pending(talk: Talk, question: str, text: str) -> Shown:
    return {"chat": messages([*talk.turns, Turn(question, text or "…")])} if question else {}


def _idle(talk: Talk) -> str:
    return progress_html(JobProgress(), note="" if talk.path else NO_VIDEO)


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Return the messages for gradio's chatbot. Texts are escaped, because the chatbot interprets HTML."""
    texts = [(role, text) for turn in turns for role, text in (("user", turn.question), ("assistant", turn.answer))]
    return [
        {"role": role, "content": escape(text or "(an empty answer)").replace("\n", "<br>")} for role, text in texts
    ]


def progress_html(
    progress: JobProgress,
    *,
    error: str | None = None,
    note: str = "",
    over: bool = False,
    steps: Collection[str] = tuple(STEPS),
) -> str:
    """Return the HTML of a job's steps, and below them an error or a note.

    over: True if the job has ended. steps: names of the steps to show.
    """
    drawn = ""
    for name in steps:
        title, unit = STEPS[name]
        step = progress.steps.get(name)
        if step is None:
            drawn += f'<div class="stage"><b>{title}</b><span>–</span></div>'
            continue
        seconds = perf_counter() - step.started if step.seconds is None else step.seconds
        spent = "kept" if step.seconds == 0 else f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
        count = "" if step.count is None else f" · {step.count} {unit if step.count != 1 else unit.removesuffix('s')}"
        state = "done" if step.seconds is not None else "ended" if over or error is not None else "going"
        drawn += f'<div class="stage {state}"><b>{title}</b><span>{spent}{count}</span></div>'
    below = f'<div class="stage-note">{escape(note or progress.note)}</div>' if note or progress.note else ""
    if error is not None:
        below = f'<div class="stage-error" role="alert">{escape(error)}</div>'
    return f'<div class="stages" aria-live="polite">{drawn}</div>{below}'
