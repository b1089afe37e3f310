"""Evidence over time: how much each part of a video mattered to an answer.

One segment of the frames is left out at a time, and the answer's log probability is measured again. What is left out is
absent, as tokens are under dynamic masking, for which the model was trained; positions close up. Nothing is encoded
anew: an encoder with a temporal adapter has let the other frames see the one that is left out.
T frames, K tokens a frame, D width of the language model, S positions of a sequence, A tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.conversation.context import PUBLISHED, has_position_table, num_positions
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Request, RequestError
from stllm.conversation.seeing import Prepared, Seen
from stllm.models import language_model as lm

if TYPE_CHECKING:
    from stllm.conversation.chat import Chat

MAX_SEGMENTS = 64
MIN_DIFFERENCE = 0.01  # nats: a probability that changes by 1 %
MAX_POSITIONS = 16_384  # of all sequences in one pass: what bounds the memory


@dataclass(frozen=True)
class Evidence:
    """What an answer rests on.

    log_probability: of the answer and its end mark with the whole video in view, in nats.
    times: seconds of the T frames seen. segments: (first, end) positions among them, end excluded.
    scores: nats a segment, log_probability minus the one without it: above 0 the segment spoke for the answer.
    bound: nats; smaller differences do not matter, see `smallest_difference`.
    cut: the numbers of the segments that the language model did not read, as the context rule cut their tokens.
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
        """The segment that mattered most to the answer."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    @property
    def matters(self) -> bool:
        """Whether leaving out any segment changes the answer's log probability by more than `bound`."""
        return max(map(abs, self.scores)) > self.bound

    @property
    def supports(self) -> bool:
        """Whether leaving out any segment makes the answer less likely, by more than `bound`."""
        return max(self.scores) > self.bound


def measure_evidence(
    chat: "Chat",
    request: Request,
    answer: str | None = None,
    *,
    decoding: Decoding | None = None,
    max_segments: int = MAX_SEGMENTS,
    max_positions: int = MAX_POSITIONS,
    seen: Seen | None = None,
    stop: Event | None = None,
) -> Evidence:
    """Leaves out one segment of the request's video at a time.

    answer: None for the model's own, generated with `decoding`; of an empty one the end mark is measured.
    decoding: its context rule may cut the prompt; a segment is then left out of what is left of the prompt.
    max_segments: a segment is one frame up to that many frames, several neighbours beyond.
    max_positions: of one pass; the scores do not depend on it.
    seen: the request's video, encoded. stop: ends the measurement when it is set.
    Raises UserError for a request without a video of at least two frames, and when it was stopped, and what
    `Chat.prepare` raises.
    """
    if request.media is None:
        raise UserError("evidence over time was asked for without a video: name one")
    seen = seen or chat.see(request.media)
    if len(seen.times) < 2:
        raise UserError(f"{request.media.path} gives one frame, and evidence over time needs at least 2: take a video")
    decoding = decoding or chat.decoding
    prepared = chat.prepare(request, decoding, seen)
    text = chat.complete([prepared], decoding, stop)[0].text if answer is None else answer
    ids = answer_ids(chat, request, text)
    _check_length(chat, prepared, len(ids), decoding.context)
    frames = chat.frame_tokens(request, seen)  # (1, T, K, D)
    segments = split_frames(len(seen.times), max_segments)
    left = [without(chat, frames, segment, prepared) for segment in segments]
    variants = [replace(prepared, visual=visual) for visual, _ in left]
    whole, *parts = log_probabilities(chat, [prepared, *variants], ids, max_positions=max_positions, stop=stop)
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


def smallest_difference(dtype: torch.dtype, log_probability: float, num_tokens: int) -> float:
    """The difference in nats between two log probabilities of an answer up to which it is ignored. Chosen here.

    0.01 nats change a probability by 1 %. Rounding may change more: logits are of the order of 10, so the log
    probability of a token of probability p changes by about 10 (1 - p) times the type's epsilon. Over the answer, the
    sum of 1 - p is at most its number of tokens, and at most minus its log probability.
    """
    return max(MIN_DIFFERENCE, 10 * torch.finfo(dtype).eps * min(num_tokens, -log_probability))


def _check_length(chat: "Chat", prepared: Prepared, num_answer: int, context: str) -> None:
    """Raises RequestError if prompt and answer together have more tokens than the model has positions."""
    config = chat.model.config.text_config
    positions = num_positions(config)
    if positions is None or prepared.length + num_answer <= positions:
        return
    if context == PUBLISHED or has_position_table(config):
        raise RequestError(
            f"the prompt has {prepared.length} tokens ({prepared.num_visual} of the video), but with the answer's "
            f"{num_answer} that is more than the language model's {positions} positions: give a shorter answer"
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
def without(chat: "Chat", frames: Tensor, segment: tuple[int, int], prepared: Prepared) -> tuple[Tensor, bool]:
    """The prompt's visual tokens (N, D) without a segment's, and True if the segment's own had all been cut before.

    frames: (1, T, K, D), all of them. prepared: the prompt, whose first `cut.visual` visual tokens were cut.
    """
    first, end = segment
    num_frames = frames.shape[1]
    video_input = chat.model.video_input
    tokens: Tensor = video_input(frames, [*range(first), *range(end, num_frames)])[0]
    if not prepared.cut.visual:
        return tokens, False
    own = prepared.cut.visual + prepared.num_visual - len(tokens)  # tokens that the segment alone gives
    ahead = video_input(frames, list(range(first))).shape[1] if first else 0  # those of the frames before it
    own_cut = min(max(prepared.cut.visual - ahead, 0), own)
    return tokens[prepared.cut.visual - own_cut :], 0 < own == own_cut


def answer_ids(chat: "Chat", request: Request, answer: str) -> list[int]:
    """The answer's tokens and its end mark, as they follow the prompt in training; not cut."""
    *before, last = request.turns
    prompt = chat.processor.prompt_ids(request.turns)
    return chat.processor.prompt_ids([*before, replace(last, answer=answer)])[len(prompt) :]


@torch.inference_mode()
def log_probabilities(
    chat: "Chat",
    prepared: Sequence[Prepared],
    answer: Sequence[int],
    *,
    max_positions: int = MAX_POSITIONS,
    stop: Event | None = None,
) -> list[float]:
    """The answer's log probability in nats after each of the prompts, teacher-forced: exact, nothing is sampled.

    All rows in one padded pass, or in several where one would hold more than `max_positions`.
    Raises UserError when `stop` was set before a pass.
    """
    size = max(1, max_positions // (max(one.length for one in prepared) + len(answer)))
    found: list[float] = []
    for start in range(0, len(prepared), size):
        if stop is not None and stop.is_set():
            raise UserError("evidence over time was stopped before it was measured")
        found += _score(chat, prepared[start : start + size], list(answer))
    return found


def _score(chat: "Chat", prepared: Sequence[Prepared], answer: list[int]) -> list[float]:
    """One pass of the language model over B rows; logits of one row at a time, where the answer is: (A, vocabulary)."""
    batch = chat.batch(prepared, answer)
    targets = torch.tensor(answer, device=chat.model.device)
    with chat.lock:
        embeds = chat.model.embed(batch["input_ids"], batch["visual_positions"], batch["visual_tokens"])
        hidden = lm.last_hidden_states(chat.model.language_model, embeds, batch["attention_mask"])  # (B, S, D)
        found = []
        for states in hidden.flatten(0, 1).index_select(0, batch["label_positions"]).split(len(answer)):  # (A, D)
            logits = lm.logits_of(chat.model.language_model, states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            found.append(float(logits.log_softmax(-1).gather(-1, targets[:, None]).sum()))
        return found
