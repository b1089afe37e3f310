"""The web page in gradio: its layout, the connection of events to handlers, and the API. Styles are in style.css."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr

from stllm.processors.templates import Turn
from stllm.serving.jobs import TICK
from stllm.web.film import film_html
from stllm.web.handlers import Handlers, Session, Shown, progress_html
from stllm.web.service import JobProgress, Service, Steps

STYLE = Path(__file__).with_name("style.css")
CLEAN_EVERY = 300  # seconds between two removals of old uploads
MODEL: dict[str, Any] = {"concurrency_limit": None}  # for handlers that use the model; they have the service's queue
OTHER_THREADS = 8  # for handlers that do not use the model
SESSIONS = 1000  # tabs whose state is kept
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}
WELCOME = '<div class="welcome">Ask what happens in a video:<br>what moves, what comes first, what changes.</div>'
UNDERSTANDING = (
    '<div class="section"><h2>Reasons for an answer</h2><p>Evidence over time shows how much less likely the last '
    "answer becomes when a part of the video is left out. The temporal probe asks the question again with the frames "
    "reversed, shuffled, replaced by the middle frame, and blank.</p></div>"
)
SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]

Examples = Sequence[tuple[Path, str]]  # example files in the package, each with a question


def build_page(service: Service, about: str, examples: Examples) -> gr.Blocks:
    """Build the whole page. about: description of the model."""
    limits = service.limits
    with gr.Blocks(
        title="ST-LLM", analytics_enabled=False, fill_width=True, delete_cache=(CLEAN_EVERY, limits.keep_seconds)
    ) as page:
        gr.HTML(f'<div class="head"><h1>ST-LLM</h1><p>Chat about a video. {about}</p></div>')
        _PageParts(service, examples).connect(Handlers(service), examples)
        add_endpoints(service)
    page.max_threads = service.jobs.places + OTHER_THREADS
    page.state_session_capacity = SESSIONS
    page.queue(max_size=service.jobs.places, default_concurrency_limit=1, api_open=False)
    return page


def theme() -> gr.themes.Base:
    """Return a theme that uses only system fonts, so that browsers download none."""
    return gr.themes.Soft(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=["monospace"]
    )


class _PageParts:
    """The page's components: on the left the medium; on the right the chat, the frames, evidence and the probe."""

    def __init__(self, service: Service, examples: Examples) -> None:
        usual, limits = service.chat.decoding, service.limits
        self.session = gr.State(Session())
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                with gr.Tabs():
                    with gr.Tab("Video"):
                        sources: Any = ["upload", "webcam"]
                        self.video = gr.Video(label="Video", show_label=False, sources=sources, elem_id="video")
                    with gr.Tab("Image"):
                        self.image = gr.Image(
                            label="Image", show_label=False, type="filepath", height=320, elem_id="image", buttons=[]
                        )
                self.chosen = gr.Dataset(
                    label="Examples",
                    components=[gr.Video(render=False), gr.Textbox(render=False)],
                    samples=[[str(path), question] for path, question in examples],
                    type="index",
                    visible=bool(examples),
                    elem_id="examples",
                )
                with gr.Accordion("Settings", open=False, elem_id="controls"):
                    frames, several = service.chat.num_frames, "above 1, the answer is shown only when it is complete"
                    most, longest = limits.new_tokens, min(usual.max_new_tokens, limits.new_tokens)
                    random = "0: always the most likely word; above 0: random words"
                    sampled = "number sampled from the video"
                    self.controls = [
                        gr.Slider(1, limits.frames, frames, step=1, label="Frames", info=sampled),
                        gr.Slider(1, limits.beams, 1, step=1, label="Beams", info=several),
                        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info=random),
                        gr.Slider(1, most, longest, step=1, label="Maximum length of the answer (tokens)"),
                    ]
            with gr.Column(scale=6, min_width=360):
                self.chat = gr.Chatbot(
                    show_label=False,
                    height=300,
                    render_markdown=False,
                    sanitize_html=True,
                    allow_tags=False,
                    feedback_options=None,
                    buttons=[],
                    placeholder=WELCOME,
                    elem_id="chat",
                )
                with gr.Row(elem_id="asking"):
                    self.question = gr.Textbox(
                        show_label=False,
                        placeholder="Ask about the video…",
                        max_length=limits.text_characters,
                        lines=1,
                        max_lines=5,
                        scale=8,
                        container=False,
                        elem_id="question",
                    )
                    self.send = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="send")
                    self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="stop")
                with gr.Row(elem_id="actions"):
                    said = [_small_button(name) for name in ("Retry", "Undo", "Clear")]
                self.status = gr.HTML(progress_html(JobProgress()), elem_id="status")
                self.film = gr.HTML(film_html(None), elem_id="film")
                with gr.Row(elem_id="understanding"):
                    gr.HTML(UNDERSTANDING, min_width=240)
                    measured = [_small_button(name) for name in ("Evidence over time", "Temporal probe")]
                self.probe = gr.HTML("", elem_id="probe")
        self.others = [*said, *measured]
        self.named = {name: getattr(self, name) for name in ("chat", "question", "status", "film", "probe")}
        self.shown: list[Any] = [*self.named.values(), self.send, self.stop, *self.others]

    def update(self, shown: Shown) -> dict[Any, Any]:
        """Convert a handler's dictionary into gradio's updates of components."""
        changed: dict[Any, Any] = {self.named[name]: value for name, value in shown.items() if name in self.named}
        if "busy" in shown:
            busy = shown["busy"]
            changed |= {self.send: gr.update(visible=not busy), self.stop: gr.update(visible=busy)}
            changed |= {button: gr.update(interactive=not busy) for button in self.others}
        return changed

    def connect(self, handlers: Handlers, examples: Examples) -> None:
        """Connect events to handlers. Starting a conversation first stops a running answer, then reads the medium."""
        model: dict[str, Any] = {"outputs": self.shown, **MODEL, **HIDDEN}
        at_once: dict[str, Any] = {"queue": False, **HIDDEN}
        frames, asking = self.controls[0], [self.session, self.question, *self.controls]

        def begin(payload: Any, session: Session) -> dict[Any, Any]:
            path = None if payload is None else payload["path"]
            return {self.session: session, **self.update(handlers.begin(session, path))}

        for medium, other, triggers in (
            (self.video, self.image, [self.video.upload, self.video.clear, self.video.stop_recording]),
            (self.image, self.video, [self.image.input]),  # gr.Video has no event `input` for recordings
        ):
            outputs = [self.session, *self.shown]
            begun = gr.on(triggers, begin, [medium, self.session], outputs, preprocess=False, **at_once)
            begun.then(lambda: None, None, other, **at_once)
            begun.then(self._one_at_a_time(handlers.look), [self.session, frames], **model)

        def begin_example(index: int, session: Session) -> dict[Any, Any]:
            path, question = examples[index]
            shown = {**handlers.begin(session, str(path)), "question": question}
            return {self.session: session, self.video: str(path), self.image: None, **self.update(shown)}

        outputs = [self.session, self.video, self.image, *self.shown]
        begun = self.chosen.click(begin_example, [self.chosen, self.session], outputs, **at_once)
        begun.then(self._one_at_a_time(handlers.look), [self.session, frames], **model)

        retry, undo, clear, evidence, probe = self.others
        gr.on([self.send.click, self.question.submit], self._one_at_a_time(handlers.ask), asking, **model)
        probe.click(self._one_at_a_time(handlers.probe), asking, **model)
        retry.click(self._one_at_a_time(handlers.retry), [self.session, *self.controls], **model)
        evidence.click(self._one_at_a_time(handlers.evidence), [self.session, *self.controls], **model)
        self.stop.click(handlers.stop, [self.session], None, **at_once)
        undo.click(lambda session: self.update(handlers.undo(session)), [self.session], self.shown, **at_once)
        gr.on(  # the button "Clear", and the bin icon of the chat
            [clear.click, self.chat.clear],
            lambda session: self.update(handlers.clear(session)),
            [self.session],
            self.shown,
            **at_once,
        )

    def _one_at_a_time(self, handler: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[dict[Any, Any]]]:
        """Wrap a handler so that a browser tab runs one handler at a time: a question waits until the video is read."""

        def run(session: Session, *values: Any) -> Iterator[dict[Any, Any]]:
            while not session.lock.acquire(timeout=TICK):
                yield {self.status: gr.skip()}
            try:
                for shown in handler(session, *values):
                    yield self.update(shown)
            finally:
                session.lock.release()

        return run


def _small_button(name: str) -> gr.Button:
    return gr.Button(name, size="sm", min_width=80, elem_id=name.split()[0].lower())


# ---- the API --------------------------------------------------------------------------------------------------------


def add_endpoints(service: Service) -> None:
    """Add the API endpoints /ask, /probe and /evidence to the page, for gradio_client and curl; see docs/serving.md.

    The server keeps no state between calls: clients send earlier turns as history. Failures raise gr.Error with a
    sentence.
    """

    def followed(job: Callable[[str, Event], Steps], file: Any) -> Iterator[JobProgress]:
        """Run a job, and yield its progress at least each half second, so that gradio can cancel it."""
        if not isinstance(file, dict) or not isinstance(file.get("path"), str):
            raise gr.Error("there is no video: upload one and name it as the file", print_exception=False)
        progress = JobProgress()
        try:
            for news in service.jobs.iterate(lambda stop: job(file["path"], stop)):
                progress = news or progress
                yield progress
        except Exception as error:
            raise gr.Error(service.explain(error), print_exception=False) from None

    # gradio takes the names of the endpoints' parameters from these functions.
    def ask(
        file: Any, question: Any, history: Any, num_frames: Any, num_beams: Any, temperature: Any, max_new_tokens: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the answer's text so far, and with the last one also the details of the answer."""
        turns, controls = [*_turns(history), Turn(question)], (num_frames, num_beams, temperature, max_new_tokens)
        for progress in followed(lambda path, stop: service.ask(path, None, turns, controls, stop), file):
            yield progress.text, dict(progress.details)

    def probe(
        file: Any, question: Any, num_frames: Any, num_beams: Any, temperature: Any, max_new_tokens: Any
    ) -> Iterator[dict[str, str]]:
        """Yield the answers so far, by order of the frames: forward, reversed, shuffled, single, blank."""
        controls = (num_frames, num_beams, temperature, max_new_tokens)
        for progress in followed(lambda path, stop: service.probe(path, None, question, controls, stop), file):
            yield dict(progress.answers)

    def evidence(
        file: Any,
        question: Any,
        history: Any,
        answer: Any,
        num_frames: Any,
        num_beams: Any,
        temperature: Any,
        max_new_tokens: Any,
    ) -> Iterator[dict[str, Any]]:
        """Measure how much each part of the video mattered to the answer (by default the model's own)."""
        turns, controls = [*_turns(history), Turn(question)], (num_frames, num_beams, temperature, max_new_tokens)
        given = str(answer) if answer else None
        for progress in followed(lambda path, stop: service.evidence(path, None, turns, controls, given, stop), file):
            if (found := progress.evidence) is None:
                yield {}
            else:
                names = ("answer", "log_probability", "segments", "scores", "matters", "bound", "cut")
                yield {"frame_times": found.times, **{name: getattr(found, name) for name in names}}

    with gr.Row(visible=False):
        medium = gr.Video(label="file: a video or an image")
        asked, given = gr.Textbox(label="question"), gr.Textbox("", label="answer")
        earlier = gr.JSON([], label="history: earlier [question, answer] pairs")
        tokens = min(service.chat.decoding.max_new_tokens, service.limits.new_tokens)
        usual = {"num_frames": service.chat.num_frames, "num_beams": 1, "temperature": 0, "max_new_tokens": tokens}
        controls = [gr.Number(value, label=label) for label, value in usual.items()]
        text, found = gr.Textbox(label="answer"), gr.JSON(label="details")
    options: dict[str, Any] = {**MODEL, "preprocess": False, "show_progress": "hidden"}
    for function, inputs, outputs in (
        (ask, [asked, earlier], [text, found]),
        (probe, [asked], [found]),
        (evidence, [asked, earlier, given], [found]),
    ):
        gr.Button(visible=False).click(
            function, [medium, *inputs, *controls], outputs, api_name=function.__name__, **options
        )


def _turns(history: Any) -> list[Turn]:
    """Convert an API call's history to turns. Raises gr.Error unless it is a list of pairs of texts."""
    pairs = history if isinstance(history, list) else [] if history is None else [history]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            message = f"the history holds {str(pair)[:80]!r}: expected pairs of a question and its answer"
            raise gr.Error(message, print_exception=False)
    return [Turn(*pair) for pair in pairs]
