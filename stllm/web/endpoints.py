"""The page's API through gradio: /ask, /probe and /evidence. Calls keep no state: earlier turns are sent as history.

gradio_client and curl reach them; README.md has examples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import gradio as gr

from stllm.processors.templates import Turn
from stllm.serving.jobs import Work
from stllm.web.progress import Progress
from stllm.web.service import Service, Wishes


class Endpoints:
    """The functions of the endpoints. Each raises gr.Error with one sentence."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def ask(
        self,
        file: Any,
        question: Any,
        history: Any,
        num_frames: Any,
        num_beams: Any,
        temperature: Any,
        max_new_tokens: Any,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the answer's text so far, and at the end its details. history: the earlier turns."""
        path, text, wishes = self._checked(file, question, num_frames, num_beams, temperature, max_new_tokens)
        turns = [*_turns(history), Turn(text)]
        for progress in self._followed(lambda stop: self.service.ask(path, None, turns, wishes, stop)):
            if progress.answer is not None:
                answer = progress.answer
                yield (
                    progress.text,
                    {
                        "frame_times": answer.frame_times,
                        "visual_tokens": answer.visual_tokens,
                        "cut_tokens": asdict(answer.cut),
                        "tokens": progress.stages["answer"].count or 0,
                        "seconds": answer.seconds,
                    },
                )
            else:
                yield progress.text, {}

    def probe(
        self, file: Any, question: Any, num_frames: Any, num_beams: Any, temperature: Any, max_new_tokens: Any
    ) -> Iterator[dict[str, str]]:
        """Yield the answers so far under each view of the frames: forward, reversed, shuffled, single, blank."""
        path, text, wishes = self._checked(file, question, num_frames, num_beams, temperature, max_new_tokens)
        for progress in self._followed(lambda stop: self.service.probe(path, None, text, wishes, stop)):
            yield dict(progress.answers)

    def evidence(
        self,
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
        path, text, wishes = self._checked(file, question, num_frames, num_beams, temperature, max_new_tokens)
        turns = [*_turns(history), Turn(text)]
        given = str(answer) if answer else None
        job: Work[Progress] = lambda stop: self.service.evidence(path, None, turns, wishes, given, stop)  # noqa: E731
        for progress in self._followed(job):
            found = progress.evidence
            if found is None:
                yield {}
                continue
            yield {
                "answer": found.answer,
                "log_probability": found.log_probability,
                "frame_times": found.times,
                "segments": found.segments,
                "scores": found.scores,
                "matters": found.matters,
                "bound": found.bound,
                "cut": found.cut,
            }

    def _checked(self, file: Any, question: Any, *controls: Any) -> tuple[str, str, Wishes]:
        if not isinstance(file, dict) or not isinstance(file.get("path"), str):
            raise gr.Error("there is no video: upload one and name it as the file", print_exception=False)
        with _as_gradio_errors(self.service):
            return file["path"], self.service.limits.check_question(question), self.service.wishes(*controls)

    def _followed(self, job: Work[Progress]) -> Iterator[Progress]:
        """Yield the progress, also each half second, so that gradio can end the job of a client that has left."""
        progress = Progress()
        with _as_gradio_errors(self.service):
            for news in self.service.jobs.iterate(job):
                progress = news or progress
                yield progress


def add_endpoints(service: Service, queue: dict[str, Any]) -> None:
    """Add the endpoints to the page that is being built. queue: gradio's options for events that need the model."""
    endpoints, usual = Endpoints(service), service.chat.decoding
    with gr.Row(visible=False):
        file = gr.Video(label="file: a video or an image")
        question, answer = gr.Textbox(label="question"), gr.Textbox("", label="answer")
        history = gr.JSON([], label="history: [question, answer] pairs said before")
        controls = [
            gr.Number(value, label=label)
            for value, label in (
                (service.chat.num_frames, "num_frames"),
                (1, "num_beams"),
                (0, "temperature"),
                (min(usual.max_new_tokens, service.limits.new_tokens), "max_new_tokens"),
            )
        ]
        text, found = gr.Textbox(label="answer"), gr.JSON(label="details")
        ask, probe, evidence = gr.Button(), gr.Button(), gr.Button()
    options: dict[str, Any] = {**queue, "preprocess": False, "show_progress": "hidden"}
    ask.click(endpoints.ask, [file, question, history, *controls], [text, found], api_name="ask", **options)
    probe.click(endpoints.probe, [file, question, *controls], found, api_name="probe", **options)
    evidence.click(
        endpoints.evidence, [file, question, history, answer, *controls], found, api_name="evidence", **options
    )


def _turns(history: Any) -> list[Turn]:
    """Return the earlier turns. Raises gr.Error unless they are pairs of texts."""
    pairs = history if isinstance(history, list) else [] if history is None else [history]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise gr.Error(
                f"the history holds {str(pair)[:80]!r}: expected pairs of a question and its answer",
                print_exception=False,
            )
    return [Turn(question, answer) for question, answer in pairs]


@contextmanager
def _as_gradio_errors(service: Service) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise gr.Error(service.explain(error), print_exception=False) from None
