"""Evidence over time: how much each part of a video mattered to an answer.

One segment of the frames is left out at a time, and the answer's log probability is measured again. What is left out is
absent, as tokens are under dynamic masking, for which the model was trained; positions close up. Nothing is encoded
anew: an encoder with a temporal adapter has let the other frames see the one that is left out.
T frames, K tokens a frame, D width of the language model, S positions of a sequence, A tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Request
from stllm.conversation.seeing import Prepared
from stllm.models import language_model as lm
from stllm.models.sequences import IGNORE_INDEX

if TYPE_CHECKING:
    from stllm.conversation.chat import Chat

MAX_SEGMENTS = 64
MAX_POSITIONS = 16_384  # of all sequences in one pass: what bounds the memory


@dataclass(frozen=True)
class Evidence:
    """What an answer rests on.

    log_probability: of the answer and its end mark with the whole video in view, in nats.
    times: seconds of the T frames seen. segments: (first, end) positions among them, end excluded.
    scores: nats a segment, log_probability minus the one without it: above 0 the segment spoke for the answer.
    """

    question: str
    answer: str
    log_probability: float
    times: list[float]
    segments: list[tuple[int, int]]
    scores: list[float]

    @property
    def peak(self) -> int:
        """The segment that mattered most to the answer."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)


def measure_evidence(
    chat: "Chat",
    request: Request,
    answer: str | None = None,
    *,
    decoding: Decoding | None = None,
    max_segments: int = MAX_SEGMENTS,
    max_positions: int = MAX_POSITIONS,
) -> Evidence:
    """Leaves out one segment of the request's video at a time.

    answer: None for the model's own, generated with `decoding`; of an empty one the end mark is measured.
    max_segments: a segment is one frame up to that many frames, several neighbours beyond.
    max_positions: of one pass; the scores do not depend on it.
    Raises UserError for a request without a video of at least two frames, and what `Chat.prepare` raises.
    """
    if request.media is None:
        raise UserError("evidence over time was asked for without a video: name one")
    seen = chat.see(request.media)
    if len(seen.times) < 2:
        raise UserError(f"{request.media.path} gives one frame, and evidence over time needs at least 2: take a video")
    prepared = chat.prepare(request, seen)
    text = chat.complete([prepared], decoding)[0].text if answer is None else answer
    ids = answer_ids(chat, request, text)
    frames = chat.frame_tokens(request, seen)  # (1, T, K, D)
    segments = split_frames(len(seen.times), max_segments)
    variants = [replace(prepared, visual=without(chat, frames, segment)) for segment in segments]
    whole, *parts = log_probabilities(chat, [prepared, *variants], ids, max_positions=max_positions)
    return Evidence(
        question=request.turns[-1].question,
        answer=text,
        log_probability=whole,
        times=seen.times,
        segments=segments,
        scores=[whole - part for part in parts],
    )


def split_frames(num_frames: int, max_segments: int) -> list[tuple[int, int]]:
    """(first, end) of neighbouring segments of nearly equal length: one a frame, at most `max_segments`.

    Raises UserError for fewer than 2: without its only segment there is no video left.
    """
    if max_segments < 2:
        raise UserError(f"max_segments is {max_segments}, expected at least 2")
    count = min(num_frames, max_segments)
    edges = [num_frames * i // count for i in range(count + 1)]
    return list(pairwise(edges))


@torch.inference_mode()
def without(chat: "Chat", frames: Tensor, segment: tuple[int, int]) -> Tensor:
    """The visual tokens (N, D) of all frames but that segment's. frames: (1, T, K, D)."""
    kept = [frame for frame in range(frames.shape[1]) if not segment[0] <= frame < segment[1]]
    tokens: Tensor = chat.model.video_input(frames, kept)[0]
    return tokens


def answer_ids(chat: "Chat", request: Request, answer: str) -> list[int]:
    """The answer's tokens and its end mark, as they follow the prompt in training; not cut."""
    *before, last = request.turns
    prompt = chat.processor.prompt_ids(request.turns)
    return chat.processor.prompt_ids([*before, replace(last, answer=answer)])[len(prompt) :]


@torch.inference_mode()
def log_probabilities(
    chat: "Chat", prepared: Sequence[Prepared], answer: Sequence[int], *, max_positions: int = MAX_POSITIONS
) -> list[float]:
    """The answer's log probability in nats after each of the prompts, teacher-forced: exact, nothing is sampled.

    All rows in one padded pass, or in several where one would hold more than `max_positions`.
    Raises RequestError where prompt and answer are longer than the language model's positions.
    """
    num_visual = max(0 if one.visual is None else len(one.visual) for one in prepared)
    num_text = max(len(one.ids) for one in prepared) + len(answer)
    chat.check_length(num_text, num_visual)
    size = max(1, max_positions // (num_text + num_visual))
    found: list[float] = []
    for start in range(0, len(prepared), size):
        found += _score(chat, prepared[start : start + size], list(answer))
    return found


def _score(chat: "Chat", prepared: Sequence[Prepared], answer: list[int]) -> list[float]:
    """One pass of the language model over B rows."""
    model = chat.model
    labels = [[IGNORE_INDEX] * len(one.ids) + answer for one in prepared]
    rows = chat.processor.pad([one.ids + answer for one in prepared], labels=labels)
    batch = {name: tensor.to(model.device) for name, tensor in rows.items()}
    visual = [one.visual for one in prepared if one.visual is not None]
    with chat.lock:
        sequence = model.join(visual or None, **batch)
        hidden = lm.last_hidden_states(model.language_model, sequence.inputs_embeds, sequence.attention_mask)
        assert sequence.labels is not None
        return [_row_score(chat, *row) for row in zip(hidden, sequence.labels, strict=True)]


def _row_score(chat: "Chat", hidden: Tensor, labels: Tensor) -> float:
    """hidden: (S, D); labels: (S,). Logits are computed for one row at a time, where the answer is: (A, vocabulary)."""
    targets = labels[1:]
    wanted = targets != IGNORE_INDEX
    logits = lm.logits_of(chat.model.language_model, hidden[:-1][wanted])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.log_softmax(-1).gather(-1, targets[wanted][:, None])  # (A, 1)
    return float(chosen.sum())
