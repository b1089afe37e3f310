"""The progress of a request: reading, encoding, answering, with the seconds and the tokens of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from time import perf_counter

from stllm.conversation.evidence import Evidence
from stllm.conversation.requests import Answer
from stllm.web.film import Film

STAGES = {"read": ("Reading", "frames"), "encode": ("Encoding", "visual tokens"), "answer": ("Answering", "tokens")}


@dataclass(frozen=True)
class Stage:
    """seconds: None while it goes on. count: frames, visual tokens or the answer's tokens, None until known."""

    seconds: float | None = None
    count: int | None = None
    started: float = field(default_factory=perf_counter)


@dataclass(frozen=True)
class Progress:
    """The stages so far, the answer's text so far, and what has come of it.

    note: what goes on, where it is none of the stages. answers: of the temporal probe, by view.
    """

    stages: Mapping[str, Stage] = field(default_factory=dict)
    text: str = ""
    note: str = ""
    film: Film | None = None
    answer: Answer | None = None
    answers: Mapping[str, str] = field(default_factory=dict)
    evidence: Evidence | None = None

    def begin(self, name: str) -> "Progress":
        """Start that stage."""
        return replace(self, stages={**self.stages, name: Stage()})

    def end(self, name: str, seconds: float, count: int) -> "Progress":
        """Finish that stage."""
        return replace(self, stages={**self.stages, name: Stage(seconds, count)})

    def write(self, text: str, count: int) -> "Progress":
        """Set the answer's text so far; its stage goes on."""
        return replace(self, text=text, stages={**self.stages, "answer": replace(self.stages["answer"], count=count)})


def progress_html(progress: Progress, *, error: str | None = None, note: str = "", over: bool = False) -> str:
    """Draw the three stages side by side, and below them an error or a note. over: no stage is running any more."""
    stages = ""
    for name, (title, unit) in STAGES.items():
        stage = progress.stages.get(name)
        if stage is None:
            stages += f'<div class="stage"><b>{title}</b><span>–</span></div>'
            continue
        seconds = perf_counter() - stage.started if stage.seconds is None else stage.seconds
        spent = "kept" if stage.seconds == 0 else f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
        unit = unit if stage.count != 1 else unit.removesuffix("s")
        count = "" if stage.count is None else f" · {stage.count} {unit}"
        state = "done" if stage.seconds is not None else "ended" if over or error is not None else "going"
        stages += f'<div class="stage {state}"><b>{title}</b><span>{spent}{count}</span></div>'
    note = note or progress.note
    below = f'<div class="stage-note">{escape(note)}</div>' if note else ""
    if error is not None:
        below = f'<div class="stage-error" role="alert">{escape(error)}</div>'
    return f'<div class="stages" aria-live="polite">{stages}</div>{below}'
