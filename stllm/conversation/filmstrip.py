"""What the model was shown, to be looked at: the sampled frames as small pictures, and evidence drawn under them.

matplotlib is imported only when something is drawn. T frames, S pixels of a side.
"""

import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stllm.common.files import replacing
from stllm.conversation.evidence import Evidence
from stllm.conversation.requests import Media
from stllm.conversation.seeing import ClipReader
from stllm.processors.transforms import EvalTransform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 160
MAX_PICTURES = 16  # a longer strip would be too small to see
WIDTH, EDGE = 10.0, 0.9  # inches: of the figure, of what stands left and right of the axes
FOR, AGAINST = "#1f77b4", "#d62728"


@dataclass(frozen=True)
class Filmstrip:
    """pictures: (T, S, S, 3) uint8, the part of each frame that the model sees; times: seconds."""

    pictures: np.ndarray
    times: list[float]


def filmstrip(media: Media, num_frames: int, *, size: int = SIZE) -> Filmstrip:
    """Reads the frames that the model was shown. num_frames: of media that name no number. Raises MediaError."""
    transform = EvalTransform(size, mean=(0, 0, 0), std=(1, 1, 1))  # the model's crop, in colours from 0 to 1
    clip = ClipReader(transform, num_frames)(media)
    pixels = (clip.frames * 255).round().byte()  # (T, 3, S, S)
    return Filmstrip(pixels.permute(0, 2, 3, 1).numpy(), clip.times)


def draw_evidence(path: str | Path, evidence: Evidence, strip: Filmstrip) -> None:
    """Draws the curve under the frames into a PNG file, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = evidence_figure(evidence, strip)
    FigureCanvasAgg(figure)
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of scripts that the font lacks: boxes stand for them
        figure.savefig(partial, format="png", dpi=120)


def evidence_figure(evidence: Evidence, strip: Filmstrip) -> "Figure":
    """The figure, to be saved or shown: frames side by side, each over its own evidence."""
    from matplotlib.figure import Figure

    answer = _lines(evidence.answer or "(an empty answer)", 3)
    found = "" if evidence.matters else f"; no part matters: no difference exceeds {evidence.bound:.2g} nats"
    title = f"{_lines(evidence.question, 2)}\n{answer}\n(log probability {evidence.log_probability:.3g} nats{found})"
    step = -(-len(strip.times) // MAX_PICTURES)
    height = (WIDTH - 2 * EDGE) * step / len(strip.times)  # of a square picture, in inches
    heading = 0.3 + 0.15 * len(title.splitlines())
    figure = Figure(figsize=(WIDTH, total := heading + height + 2.7))
    left, width = EDGE / WIDTH, 1 - 2 * EDGE / WIDTH
    _draw_pictures(figure.add_axes((left, 2.7 / total, width, height / total)), strip, step)
    _draw_curve(figure.add_axes((left, 0.6 / total, width, 2.0 / total)), evidence)
    figure.text(left, 1 - 0.15 / total, title, va="top", fontsize=9, parse_math=False)
    return figure


def _draw_pictures(axes: "Axes", strip: Filmstrip, step: int) -> None:
    """One picture of each `step` frames, as wide as they are below."""
    count = len(strip.times)
    for first in range(0, count, step):
        edges = (first - 0.5, min(first + step, count) - 0.5)
        shown = strip.pictures[min(first + step // 2, count - 1)]
        axes.imshow(shown[:, : round(shown.shape[1] * (edges[1] - edges[0]) / step)], extent=(*edges, 0, 1))
    axes.set_aspect("auto")
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(0, 1)
    axes.set_axis_off()


def _draw_curve(axes: "Axes", evidence: Evidence) -> None:
    """Evidence over the frames, in nats; below zero the segment spoke against the answer.

    A grey area covers the frames that the context rule cut.
    """
    count = len(evidence.times)
    frames = np.repeat(evidence.scores, [end - first for first, end in evidence.segments])  # (T,)
    edges = np.arange(count + 1) - 0.5
    for sign, colour in ((frames >= 0, FOR), (frames < 0, AGAINST)):
        axes.stairs(np.where(sign, frames, 0.0), edges, fill=True, color=colour, alpha=0.35)
    for first, end in (evidence.segments[number] for number in evidence.cut):
        axes.axvspan(first - 0.5, end - 0.5, color="grey", alpha=0.25, linewidth=0)
    if evidence.cut:
        axes.annotate("not read: cut from the prompt", (0.01, 0.97), xycoords="axes fraction", va="top", fontsize=8)
    axes.plot(range(count), frames, marker="o", markersize=3, color=FOR)
    axes.axhline(0, color="black", linewidth=0.8)
    places = range(0, count, -(-count // MAX_PICTURES))
    axes.set_xticks(places, [f"{round(evidence.times[place], 2):g}" for place in places])
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xlabel("seconds")
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)  # a sure model's evidence is small
    axes.set_ylabel("evidence (nats)")
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lines(text: str, most: int) -> str:
    """At most so many lines of the text, whatever it holds."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.fill(printable, 120, max_lines=most, placeholder=" …")
