"""The page: its layout, and the handler of each event. The look is in style.css; the API in endpoints.py."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from stllm.serving.jobs import TICK
from stllm.web.endpoints import add_endpoints
from stllm.web.film import film_html
from stllm.web.handlers import Handlers, Session, Shown
from stllm.web.progress import Progress, progress_html
from stllm.web.service import Service

STYLE = Path(__file__).with_name("style.css")
CLEAN_EVERY = 300  # seconds
MODEL: dict[str, Any] = {"concurrency_limit": None}  # they wait in the service's own queue
OTHER_THREADS = 8  # beside those that wait for the model, for what the page does at once
SESSIONS = 1000  # tabs whose state is kept
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}
WELCOME = '<div class="welcome">Ask what happens in a video:<br>what moves, what comes first, what changes.</div>'
UNDERSTANDING = (
    '<div class="section"><h2>What the answer rests on</h2><p>Evidence: how much less likely the last answer is when a '
    "part of the video is left out. Probe: the same question on the frames reversed, shuffled, one, none.</p></div>"
)
SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]


Examples = Sequence[tuple[Path, str]]  # files that come with the demo, each with a question


@dataclass(frozen=True)
class Parts:
    """The components that handlers read and change."""

    session: gr.State
    video: gr.Video
    image: gr.Image
    chat: gr.Chatbot
    question: gr.Textbox
    status: gr.HTML
    film: gr.HTML
    probe: gr.HTML
    send: gr.Button
    stop: gr.Button
    others: tuple[gr.Button, ...]  # retry, undo, clear, evidence, probe
    controls: tuple[gr.Slider, ...]  # frames, beams, temperature, longest answer

    @property
    def shown(self) -> list[Any]:
        """Return the components that a handler may change."""
        return [self.chat, self.question, self.status, self.film, self.probe, self.send, self.stop, *self.others]

    def update(self, shown: Shown) -> dict[Any, Any]:
        """Turn a handler's parts into gradio's updates."""
        names = ("chat", "question", "status", "film", "probe")
        changed: dict[Any, Any] = {getattr(self, name): shown[name] for name in names if name in shown}
        if "busy" in shown:
            busy = shown["busy"]
            changed |= {self.send: gr.update(visible=not busy), self.stop: gr.update(visible=busy)}
            changed |= {button: gr.update(interactive=not busy) for button in self.others}
        return changed


def build_page(service: Service, about: str, examples: Examples) -> gr.Blocks:
    """Build the whole page. about: the model that answers."""
    limits = service.limits
    with gr.Blocks(
        title="ST-LLM", analytics_enabled=False, fill_width=True, delete_cache=(CLEAN_EVERY, limits.keep_seconds)
    ) as page:
        gr.HTML(f'<div class="head"><h1>ST-LLM</h1><p>Talk with a video. {about}</p></div>')
        parts, chosen = _lay_out(service, examples)
        _wire(parts, Handlers(service), chosen, examples)
        add_endpoints(service, MODEL)
    page.max_threads = service.jobs.places + OTHER_THREADS
    page.state_session_capacity = SESSIONS
    page.queue(max_size=service.jobs.places, default_concurrency_limit=1, api_open=False)
    return page


def theme() -> gr.themes.Base:
    """Return a theme with fonts of the system only, so that nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=["monospace"]
    )


# ---- layout ---------------------------------------------------------------------------------------------------------


def _lay_out(service: Service, examples: Examples) -> tuple[Parts, gr.Dataset]:
    """Lay out the medium on the left, and on the right the conversation, the frames, evidence and the probe."""
    usual, limits, frames = service.chat.decoding, service.limits, service.chat.num_frames
    session = gr.State(Session())
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            with gr.Tabs():
                with gr.Tab("Video"):
                    video = gr.Video(label="Video", show_label=False, sources=["upload", "webcam"], elem_id="video")
                with gr.Tab("Image"):
                    image = gr.Image(
                        label="Image", show_label=False, type="filepath", height=320, elem_id="image", buttons=[]
                    )
            chosen = gr.Dataset(
                label="Examples",
                components=[gr.Video(render=False), gr.Textbox(render=False)],
                samples=[[str(path), question] for path, question in examples],
                type="index",
                visible=bool(examples),
                elem_id="examples",
            )
            with gr.Accordion("How to look and answer", open=False, elem_id="controls"):
                most, longest = limits.new_tokens, min(usual.max_new_tokens, limits.new_tokens)
                several = "above 1 the answer comes whole, not word by word"
                controls = (
                    gr.Slider(1, limits.frames, frames, step=1, label="Frames", info="taken from the video"),
                    gr.Slider(1, limits.beams, 1, step=1, label="Beams", info=several),
                    gr.Slider(
                        0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest answer; above: drawn at random"
                    ),
                    gr.Slider(1, most, longest, step=1, label="Longest answer (tokens)"),
                )
        with gr.Column(scale=6, min_width=360):
            chat, question, send, stop = _conversation(service)
            with gr.Row(elem_id="actions"):
                said = [_small(name) for name in ("Retry", "Undo", "Clear")]
            status = gr.HTML(progress_html(Progress()), elem_id="status")
            film = gr.HTML(film_html(None), elem_id="film")
            with gr.Row(elem_id="understanding"):
                gr.HTML(UNDERSTANDING, min_width=240)
                measured = [_small("Evidence over time"), _small("Temporal probe")]
            probe = gr.HTML("", elem_id="probe")
    parts = Parts(session, video, image, chat, question, status, film, probe, send, stop, (*said, *measured), controls)
    return parts, chosen


def _conversation(service: Service) -> tuple[gr.Chatbot, gr.Textbox, gr.Button, gr.Button]:
    """Lay out the messages, the question, and the buttons that ask it and stop its answer."""
    chat = gr.Chatbot(
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
        question = gr.Textbox(
            show_label=False,
            placeholder="Ask about the video…",
            max_length=service.limits.text_characters,
            lines=1,
            max_lines=5,
            scale=8,
            container=False,
            elem_id="question",
        )
        send = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="stop")
    return chat, question, send, stop


def _small(name: str) -> gr.Button:
    return gr.Button(name, size="sm", min_width=80, elem_id=name.split()[0].lower())


# ---- events ---------------------------------------------------------------------------------------------------------


def _wire(parts: Parts, handlers: Handlers, chosen: gr.Dataset, examples: Examples) -> None:
    """Connect every handler. Those that begin a conversation stop the answer at once, and then wait for the model."""
    frames = parts.controls[0]
    model: dict[str, Any] = {"outputs": parts.shown, **MODEL, **HIDDEN}
    at_once: dict[str, Any] = {"queue": False, **HIDDEN}

    def begin(payload: Any, session: Session) -> dict[Any, Any]:
        path, name = (None, "") if payload is None else (payload["path"], payload.get("orig_name") or "")
        return {parts.session: session, **parts.update(handlers.begin(session, path, name))}

    video, image = parts.video, parts.image
    for medium, other, triggers in (
        (video, image, [video.upload, video.clear, video.stop_recording]),  # a recording is no input to gradio
        (image, video, [image.input]),
    ):
        begun = gr.on(
            triggers, begin, [medium, parts.session], [parts.session, *parts.shown], preprocess=False, **at_once
        )
        begun.then(lambda: None, None, other, **at_once)
        begun.then(_yielding(parts, handlers.look), [parts.session, frames], **model)

    def begin_example(index: int, session: Session) -> dict[Any, Any]:
        path, question = examples[index]
        shown = {**handlers.begin(session, str(path), path.name), "question": question}
        media = {parts.video: str(path), parts.image: None}
        return {parts.session: session, **media, **parts.update(shown)}

    outputs = [parts.session, parts.video, parts.image, *parts.shown]
    begun = chosen.click(begin_example, [chosen, parts.session], outputs, **at_once)
    begun.then(_yielding(parts, handlers.look), [parts.session, frames], **model)

    def returning(handler: Callable[[Session], Shown]) -> Callable[[Session], dict[Any, Any]]:
        return lambda session: parts.update(handler(session))

    asking = [parts.session, parts.question, *parts.controls]
    retry, undo, clear, evidence, probe = parts.others
    gr.on([parts.send.click, parts.question.submit], _yielding(parts, handlers.ask), asking, **model)
    probe.click(_yielding(parts, handlers.probe), asking, **model)
    retry.click(_yielding(parts, handlers.retry), [parts.session, *parts.controls], **model)
    evidence.click(_yielding(parts, handlers.evidence), [parts.session, *parts.controls], **model)
    parts.stop.click(handlers.stop, [parts.session], None, **at_once)
    for event, handler in (
        (undo.click, handlers.undo),
        (clear.click, handlers.clear),
        (parts.chat.clear, handlers.clear),  # the chat's own bin
    ):
        event(returning(handler), [parts.session], parts.shown, **at_once)


def _yielding(parts: Parts, handler: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[dict[Any, Any]]]:
    """Run one handler of a tab at a time: a question during the reading of a video is answered after it."""

    def run(session: Session, *values: Any) -> Iterator[dict[Any, Any]]:
        while not session.order.lock.acquire(timeout=TICK):
            yield {parts.status: gr.skip()}
        try:
            for shown in handler(session, *values):
                yield parts.update(shown)
        finally:
            session.order.lock.release()

    return run
