"""Evidence over time: how much each part of a video mattered to an answer, and a chart of it.

`measure_evidence` leaves out one segment of the frames at a time and measures the answer's log probability again. The
segment's tokens are removed from the sequence, as in the dynamic masking of training. Frames are not encoded again: if
the encoder has a temporal adapter, the tokens of other frames still contain information from the segment.
Letters in shapes: B prompts, S positions of a row, T frames, K tokens of a frame, N visual tokens, A tokens of the
answer, D width of the language model.
"""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.common.files import replacing
from stllm.common.schema import PUBLISHED
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import (
    ClipReader,
    EncodedClip,
    Media,
    Prepared,
    Request,
    RequestError,
    has_position_table,
    num_positions,
)
from stllm.models import language_model as lm
from stllm.models.generation import positions_at_once
from stllm.processors.transforms import EvalTransform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SEGMENTS = 64
MIN_DIFFERENCE = 0.01  # nats: a probability that changes by 1 %

SIZE = 160  # height and width of a picture in pixels
MAX_PICTURES = 16  # more in one row would be too small to see
WIDTH, EDGE = 10.0, 0.9  # inches: width of the figure, margin left and right of the axes
FOR, AGAINST = "#1f77b4", "#d62728"

AnyChat: TypeAlias = Any  # a `Chat`; chat.py imports this file, so this file must not import it


@dataclass(frozen=True)
class Evidence:
    """The evidence for one answer.

    log_probability: log probability of the answer and its end mark given the whole video, in nats.
    times: times of the T frames in seconds. segments: (first, end) frame indices of each segment, end excluded.
    scores: one per segment in nats: log_probability minus the log probability without the segment. Above 0, the
        segment made the answer more likely.
    bound: nats; smaller differences are ignored, see `smallest_difference`.
    cut: indices of segments that the language model did not read, because the context rule cut all their tokens.
    """

    question: str
    answer: str
    log_probability: float
    times: list[float]
    segments: list[tuple[int, int]]
    scores: list[float]
    bound: float = MIN_DIFFERENCE
    cut: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Return the index of the segment with the highest score."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    @property
    def matters(self) -> bool:
        """Check whether leaving out any segment changes the answer's log probability by more than `bound`."""
        return max(map(abs, self.scores)) > self.bound

    @property
    def supports(self) -> bool:
        """Check whether leaving out any segment makes the answer less likely, by more than `bound`."""
        return max(self.scores) > self.bound


@torch.inference_mode()
def measure_evidence(
    chat: AnyChat,
    request: Request,
    answer: str | None = None,
    *,
    decoding: Decoding | None = None,
    max_segments: int = MAX_SEGMENTS,
    max_positions: int | None = None,
    seen: EncodedClip | None = None,
    stop: Event | None = None,
) -> Evidence:
    """Measure how much each segment of the request's video mattered to an answer, by leaving it out.

    answer: None for the model's own, generated with `decoding`. For an empty answer, only the end mark is measured.
    decoding: its context rule may cut the prompt; segments are then left out of the shortened prompt.
    max_segments: maximum number of segments. With at most this many frames, each frame is a segment; with more,
    neighbouring frames form one segment.
    max_positions: the most token positions in one forward pass; None for a default of the device. The scores do not
    depend on it.
    seen: the request's encoded video, if known. stop: an event that ends the measurement.
    Raises UserError for a request without a video of at least two frames, or if stopped; and whatever `Chat.prepare`
    raises.
    """
    if request.media is None:
        raise UserError("evidence over time was asked for without a video: name one")
    if chat.engine is not None:
        raise UserError("evidence over time needs the whole language model in this process: leave out --engine")
    seen = seen or chat.see(request.media)
    if len(seen.times) < 2:
        raise UserError(f"{request.media.path} gives one frame, and evidence over time needs at least 2: take a video")
    decoding = decoding or chat.decoding
    prepared = chat.prepare(request, decoding, seen)
    text = chat.complete([prepared], decoding, stop)[0].text if answer is None else answer
    ids = answer_ids(chat, request, text)
    config = chat.model.config.text_config
    positions = num_positions(config)
    bounded = decoding.context == PUBLISHED or has_position_table(config)
    if positions is not None and bounded and prepared.length + len(ids) > positions:
        raise RequestError(
            f"the prompt has {prepared.length} tokens ({prepared.num_visual} of the video), but with the answer's "
            f"{len(ids)} that is more than the language model's {positions} positions: give a shorter answer"
        )
    frames = chat.frame_tokens(request, seen)  # (1, T, K, D)
    segments = split_frames(len(seen.times), max_segments)
    left = [without(chat.model.video_input, frames, segment, prepared) for segment in segments]
    variants = [prepared, *(replace(prepared, visual=visual) for visual, _ in left)]
    whole, *parts = log_probabilities(chat, variants, ids, max_positions=max_positions, stop=stop)
    return Evidence(
        question=request.turns[-1].question,
        answer=text,
        log_probability=whole,
        times=seen.times,
        segments=segments,
        scores=[whole - part for part in parts],
        bound=smallest_difference(chat.model.dtype, whole, len(ids)),
        cut=[number for number, (_, cut) in enumerate(left) if cut],
    )


def answer_ids(chat: AnyChat, request: Request, answer: str) -> list[int]:
    """Return the token ids of the answer and its end mark, as they follow the prompt in training. None are cut off."""
    *before, last = request.turns
    prompt = chat.processor.prompt_ids(request.turns)
    return chat.processor.prompt_ids([*before, replace(last, answer=answer)])[len(prompt) :]


@torch.inference_mode()
def log_probabilities(
    chat: AnyChat,
    prepared: Sequence[Prepared],
    answer: Sequence[int],
    *,
    max_positions: int | None = None,
    stop: Event | None = None,
) -> list[float]:
    """Return the log probability of the answer's token ids after each prompt, in nats. Nothing is sampled.

    The prompts are padded and run in as few passes as `max_positions` token positions allow. The logits are computed
    for one row at a time, and only for the A tokens of the answer.
    Raises UserError if `stop` is set before a pass.
    """
    model = chat.model
    most = max_positions or positions_at_once(model.device)
    size = max(1, most // (max(one.length for one in prepared) + len(answer)))
    targets = torch.tensor(answer, device=model.device)
    found: list[float] = []
    for start in range(0, len(prepared), size):
        if stop is not None and stop.is_set():
            raise UserError("evidence over time was stopped before it was measured")
        batch = chat.batch(prepared[start : start + size], answer)
        with chat.lock:
            embeds = model.embed(batch["input_ids"], batch["visual_positions"], batch["visual_tokens"])
            hidden = lm.last_hidden_states(model.language_model, embeds, batch["attention_mask"])  # (B, S, D)
            for states in hidden.flatten(0, 1).index_select(0, batch["label_positions"]).split(len(answer)):  # (A, D)
                logits = lm.logits_of(model.language_model, states)  # (A, vocabulary)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                found.append(float(logits.log_softmax(-1).gather(-1, targets[:, None]).sum()))
    return found


def smallest_difference(dtype: torch.dtype, log_probability: float, num_tokens: int) -> float:
    """Return the difference in nats up to which two log probabilities of an answer count as equal. Our choice.

    0.01 nats change a probability by 1 %. Rounding may change more: logits are of the order of 10, so rounding changes
    the log probability of a token of probability p by about 10 (1 - p) times the type's epsilon. The sum of 1 - p over
    the answer is at most its number of tokens, and at most minus its log probability.
    """
    return max(MIN_DIFFERENCE, 10 * torch.finfo(dtype).eps * min(num_tokens, -log_probability))


def split_frames(num_frames: int, max_segments: int) -> list[tuple[int, int]]:
    """Split frames into segments of nearly equal length, one per frame but at most `max_segments`: (first, end) each.

    Raises UserError if max_segments is below 2, since without its only segment no video would be left.
    """
    if max_segments < 2:
        raise UserError(f"max_segments is {max_segments}, expected at least 2")
    count = min(num_frames, max_segments)
    edges = [num_frames * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def without(video_input: Any, frames: Tensor, segment: tuple[int, int], prepared: Prepared) -> tuple[Tensor, bool]:
    """Return the prompt's visual tokens without those of a segment, (N, D).

    Also return True if the context rule had already cut all tokens of the segment.
    frames: tokens of all frames, (1, T, K, D). segment: (first, end) frame indices. prepared: the prompt, without the
    first `cut.visual` visual tokens, which the context rule cut.
    """
    first, end = segment
    tokens: Tensor = video_input(frames, [*range(first), *range(end, frames.shape[1])])[0]
    if not prepared.cut.visual:
        return tokens, False
    own = prepared.cut.visual + prepared.num_visual - len(tokens)  # number of the segment's tokens
    ahead = video_input(frames, list(range(first))).shape[1] if first else 0  # number of tokens before the segment
    own_cut = min(max(prepared.cut.visual - ahead, 0), own)
    return tokens[prepared.cut.visual - own_cut :], 0 < own == own_cut


# ---- the chart ------------------------------------------------------------------------------------------------------


def filmstrip(media: Media, num_frames: int, *, size: int = SIZE) -> np.ndarray:
    """Read the frames that the model sees, cropped as for the model: (T, size, size, 3) uint8. Raises MediaError.

    num_frames: the number of frames to read if `media.num_frames` is None.
    """
    return ClipReader(EvalTransform(size), num_frames)(media).frames.permute(0, 2, 3, 1).numpy()


def draw_evidence(path: str | Path, evidence: Evidence, pictures: np.ndarray) -> None:
    """Draw the chart of the evidence into a PNG file, atomically. pictures: the frames, (T, size, size, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = evidence_figure(evidence, pictures)
    FigureCanvasAgg(figure)
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters missing from the font are drawn as boxes
        figure.savefig(partial, format="png", dpi=120)


def evidence_figure(evidence: Evidence, pictures: np.ndarray) -> "Figure":
    """Return the chart: frames side by side, and below each its score in nats. pictures: (T, size, size, 3) uint8.

    A score below zero means that the segment made the answer less likely. Grey areas mark segments that were cut.
    """
    from matplotlib.figure import Figure

    count = len(pictures)
    answer = _lines(evidence.answer or "(an empty answer)", 3)
    found = "" if evidence.matters else f"; no part matters: no difference exceeds {evidence.bound:.2g} nats"
    title = f"{_lines(evidence.question, 2)}\n{answer}\n(log probability {evidence.log_probability:.3g} nats{found})"
    step = -(-count // MAX_PICTURES)
    height = (WIDTH - 2 * EDGE) * step / count  # of a square picture, in inches
    heading = 0.3 + 0.15 * len(title.splitlines())
    figure = Figure(figsize=(WIDTH, total := heading + height + 2.7))
    left, width = EDGE / WIDTH, 1 - 2 * EDGE / WIDTH
    figure.text(left, 1 - 0.15 / total, title, va="top", fontsize=9, parse_math=False)

    strip = figure.add_axes((left, 2.7 / total, width, height / total))
    for first in range(0, count, step):  # one picture of each `step` frames, as wide as they are below
        last = min(first + step, count)
        shown = pictures[min(first + step // 2, count - 1)]
        shown = shown[:, : round(shown.shape[1] * (last - first) / step)]
        strip.imshow(shown, extent=(first - 0.5, last - 0.5, 0, 1))
    strip.set_aspect("auto")
    strip.set_xlim(-0.5, count - 0.5)
    strip.set_ylim(0, 1)
    strip.set_axis_off()

    curve = figure.add_axes((left, 0.6 / total, width, 2.0 / total))
    scores = np.repeat(evidence.scores, [end - first for first, end in evidence.segments])  # (T,)
    edges = np.arange(count + 1) - 0.5
    for sign, colour in ((scores >= 0, FOR), (scores < 0, AGAINST)):
        curve.stairs(np.where(sign, scores, 0.0), edges, fill=True, color=colour, alpha=0.35)
    for first, end in (evidence.segments[number] for number in evidence.cut):
        curve.axvspan(first - 0.5, end - 0.5, color="grey", alpha=0.25, linewidth=0)
    if evidence.cut:
        curve.annotate("not read: cut from the prompt", (0.01, 0.97), xycoords="axes fraction", va="top", fontsize=8)
    curve.plot(range(count), scores, marker="o", markersize=3, color=FOR)
    curve.axhline(0, color="black", linewidth=0.8)
    places = range(0, count, step)
    curve.set_xticks(places, [f"{round(evidence.times[place], 2):g}" for place in places])
    curve.set_xlim(-0.5, count - 0.5)
    curve.set_xlabel("seconds")
    curve.ticklabel_format(axis="y", style="plain", useOffset=False)  # scores may be small and close together
    curve.set_ylabel("evidence (nats)")
    curve.grid(axis="y", alpha=0.3)
    curve.spines[["top", "right"]].set_visible(False)
    return figure


def _lines(text: str, most: int) -> str:
    """Wrap the text into at most `most` lines; unprintable characters become spaces."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.fill(printable, 120, max_lines=most, placeholder=" …")
