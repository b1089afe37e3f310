"""Evidence over time: exact log probabilities, independent of the batch; the decisive frame has the highest score."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat, Media, Request
from stllm.conversation.evidence import (
    answer_ids,
    draw_evidence,
    evidence_figure,
    filmstrip,
    measure_evidence,
    smallest_difference,
    split_frames,
)
from stllm.models.video_inputs import ResidualInput, residual_frame_indices
from stllm.processors.sequences import VISUAL_TOKEN_ID, training_sequences
from stllm.processors.templates import Turn
from tests.conversation.test_chat import new_chat
from tests.helpers.videos import write_video

QUESTION, ANSWER = "what moves first", "the red square"
NUM_FRAMES, LOCAL = 6, residual_frame_indices(6, 4)
WHITE = 3  # of the frames seen, and one of the local ones
VIDEO_INPUTS = ("mean", "all", "residual")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", num_frames=20)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a clip in which all sampled frames except one are black."""
    frames = [np.full((64, 64, 3), 255 * (number in (10, 11, 12)), np.uint8) for number in range(20)]
    return write_video(tmp_path_factory.mktemp("clips") / "flash.mp4", frames=frames, fps=10)


def request(path: Path, *before: Turn) -> Request:
    return Request(turns=(*before, Turn(QUESTION)), media=Media(str(path)))


def random_residual(chat: Chat) -> Chat:
    """Replace the zero initialisation of the global branch, so that it has an effect."""
    if isinstance(branch := chat.model.video_input, ResidualInput):
        torch.nn.init.normal_(branch.up_proj.weight, std=0.5)
    return chat


def by_hand(chat: Chat, frames: Tensor, kept: list[int]) -> Tensor:
    """Return the visual tokens of the kept frames, (N, D), computed from the formulas. frames: (T, K, D)."""
    name, rest = chat.model.config.video_input, torch.stack([frames[i] for i in kept])
    if name == "mean":
        return rest.sum(dim=0) / len(kept)
    if name == "all":
        return torch.cat(list(rest))
    branch = chat.model.video_input
    pooled = branch.up_proj(branch.down_proj(rest.sum(dim=0) / len(kept)).clamp(min=0))
    return torch.cat([frames[i] + pooled for i in LOCAL if i in kept])


def plain_log_probability(chat: Chat, ids: list[int], answer: list[int], visual: Tensor) -> float:
    """Return the log probability from a single pass of the language model without padding."""
    embed, at = chat.model.get_input_embeddings(), ids.index(VISUAL_TOKEN_ID)
    text = [embed(torch.tensor(part, dtype=torch.long)) for part in (ids[:at], ids[at + 1 :] + answer)]
    logits = chat.model.language_model(inputs_embeds=torch.cat([text[0], visual, text[1]])[None]).logits[0]
    steps = logits[-len(answer) - 1 : -1].log_softmax(-1)
    return sum(float(step[token]) for step, token in zip(steps, answer, strict=True))


@pytest.mark.parametrize("family", ["instructblip", "minigpt4"])
@pytest.mark.parametrize("video_input", VIDEO_INPUTS)
@torch.no_grad()
def test_scores_are_exact_log_probabilities(clip: Path, family: str, video_input: str) -> None:
    chat = random_residual(new_chat(family, video_input=video_input))
    asked = request(clip, Turn("and before", "a ball"))
    found = measure_evidence(chat, asked, ANSWER)
    seen = chat.see(Media(str(clip)))
    frames, ids = chat.frame_tokens(asked, seen)[0], chat.prepare(asked).ids
    answer = answer_ids(chat, asked, ANSWER)
    everything = list(range(NUM_FRAMES))
    whole = plain_log_probability(chat, ids, answer, by_hand(chat, frames, everything))
    parts = [
        plain_log_probability(chat, ids, answer, by_hand(chat, frames, [i for i in everything if i != left_out]))
        for left_out in everything
    ]
    assert found.log_probability == pytest.approx(whole, abs=1e-9)
    assert found.scores == pytest.approx([whole - part for part in parts], abs=1e-9)
    assert max(found.scores) - min(found.scores) > 0.1  # the test would be idle on equal scores
    assert found.segments == list(pairwise(range(NUM_FRAMES + 1)))
    assert found.times == seen.times


@torch.no_grad()
def test_the_whole_videos_log_probability_is_the_training_loss(clip: Path) -> None:
    chat = new_chat("minigpt4")
    found = chat.evidence(clip, QUESTION, ANSWER)
    ids, labels = chat.processor.training_ids([Turn(QUESTION, ANSWER)])
    frames = chat.read(Media(str(clip))).frames[None]
    num_visual = chat.model.video_input.num_tokens(frames.shape[1], chat.model.config.tokens_per_frame)
    batch = training_sequences([ids], [labels], pad_id=chat.processor.pad_token_id, num_visual=num_visual)
    loss = chat.model(pixel_values=frames, **batch).loss_lm
    num_labels = sum(label >= 0 for label in labels)
    assert found.log_probability == pytest.approx(-float(loss) * num_labels, rel=1e-5)  # the loss is in float32


@pytest.mark.parametrize("video_input", VIDEO_INPUTS)
def test_evidence_scores_do_not_depend_on_the_batch(clip: Path, video_input: str) -> None:
    chat = random_residual(new_chat(video_input=video_input))
    passes: list[int] = []
    chat.model.language_model.get_decoder().register_forward_pre_hook(
        lambda _, __, named: passes.append(len(named["inputs_embeds"])), with_kwargs=True
    )
    together = measure_evidence(chat, request(clip), ANSWER)
    assert passes == [NUM_FRAMES + 1]
    alone = measure_evidence(chat, request(clip), ANSWER, max_positions=1)
    assert passes == [NUM_FRAMES + 1] + [1] * (NUM_FRAMES + 1)
    assert together.scores == pytest.approx(alone.scores, abs=1e-9)


def averaging(chat: Chat, answer: list[int], direction: Callable[[Chat], Tensor]) -> Chat:
    """Make the language model average its inputs, and prefer the answer's tokens along one direction."""
    layers = chat.model.language_model.get_decoder().layers
    width = chat.model.config.text_config.hidden_size
    with torch.no_grad():
        for layer in layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj):
                projection.weight.zero_()  # attention is even, the rest is silent
            layer.self_attn.v_proj.weight.copy_(torch.eye(width))
            layer.self_attn.o_proj.weight.zero_()
        layers[0].self_attn.o_proj.weight.copy_(100 * torch.eye(width))
        head = chat.model.get_output_embeddings().weight
        head.zero_()
        head[answer] = F.normalize(direction(chat), dim=0)
    return chat


@pytest.mark.parametrize("video_input", VIDEO_INPUTS)
def test_the_decisive_frame_has_the_highest_score(flash: Path, video_input: str) -> None:
    chat = new_chat("minigpt4", video_input=video_input)

    def from_black_to_white(chat: Chat) -> Tensor:
        frames = chat.frame_tokens(request(flash), chat.see(Media(str(flash))))[0].mean(dim=1)  # (T, D)
        return frames[WHITE] - frames[0]

    averaging(chat, answer_ids(chat, request(flash), ANSWER), from_black_to_white)
    found = chat.evidence(flash, QUESTION, ANSWER)
    assert found.peak == WHITE
    assert found.times[found.peak] == pytest.approx(1.1)
    others = [score for number, score in enumerate(found.scores) if number != WHITE]
    assert found.scores[WHITE] > 0 >= max(others) - 1e-9


@pytest.mark.parametrize(
    ("dtype", "log_probability", "bound"),
    [
        (torch.float32, -50.0, 0.01),
        (torch.bfloat16, -0.001, 0.01),  # a sure answer is exact in any type
        (torch.bfloat16, -2.0, 20 * 2**-7),
        (torch.bfloat16, -50.0, 40 * 2**-7),  # of four tokens
    ],
)
def test_the_bound_covers_rounding_errors(dtype: torch.dtype, log_probability: float, bound: float) -> None:
    assert smallest_difference(dtype, log_probability, 4) == pytest.approx(bound)


def test_by_default_the_models_answer_is_explained(clip: Path) -> None:
    chat = new_chat()
    found = chat.evidence(clip, QUESTION)
    assert found.answer == chat.ask(clip, QUESTION).text
    again = chat.evidence(clip, QUESTION, found.answer)
    assert again == found
    assert chat.evidence(clip, QUESTION, max_new_tokens=2).answer != found.answer


def test_few_segments_contain_several_frames(clip: Path) -> None:
    found = measure_evidence(new_chat(), request(clip), ANSWER, max_segments=4)
    assert found.segments == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert len(found.scores) == 4
    assert split_frames(64, 64) == list(pairwise(range(65)))
    with pytest.raises(UserError, match="max_segments is 1, expected at least 2"):
        split_frames(8, 1)


def test_evidence_needs_a_video(tmp_path: Path, clip: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 30)).save(picture)
    chat = new_chat()
    with pytest.raises(UserError, match="gives one frame, and evidence over time needs at least 2"):
        chat.evidence(picture, QUESTION)
    with pytest.raises(UserError, match="without a video"):
        measure_evidence(chat, Request(turns=(Turn(QUESTION),)))
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens \(24 of the video\), but"):
        chat.evidence(clip, QUESTION, "red " * 600)


def test_the_filmstrip_shows_the_models_frames(flash: Path) -> None:
    strip = filmstrip(Media(str(flash)), NUM_FRAMES, size=32)
    assert strip.shape == (NUM_FRAMES, 32, 32, 3)
    assert [int(picture.mean()) > 200 for picture in strip] == [n == WHITE for n in range(NUM_FRAMES)]
    reversed_strip = filmstrip(Media(str(flash), view="reversed"), NUM_FRAMES, size=32)
    assert np.array_equal(reversed_strip, strip[::-1])


def test_the_figure_shows_frames_over_their_scores(clip: Path, tmp_path: Path) -> None:
    question = "does $x^ <b>move</b>\n" + "a lot " * 100
    found = measure_evidence(new_chat(), Request((Turn(question),), Media(str(clip))), "$\\frac$")
    figure = evidence_figure(found, filmstrip(Media(str(clip)), NUM_FRAMES, size=32))
    pictures, curve = figure.axes
    assert len(pictures.images) == NUM_FRAMES
    assert np.asarray(curve.lines[0].get_ydata()).tolist() == found.scores
    assert [label.get_text() for label in curve.get_xticklabels()] == [f"{time:g}" for time in found.times]
    path = tmp_path / "new folder" / "evidence.png"
    draw_evidence(path, found, filmstrip(Media(str(clip)), NUM_FRAMES))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_long_strip_shows_some_of_its_frames(clip: Path) -> None:
    found = measure_evidence(new_chat(), Request((Turn(QUESTION),), Media(str(clip), num_frames=20)), ANSWER)
    strip = np.zeros((20, 32, 32, 3), np.uint8)
    pictures, curve = evidence_figure(found, strip).axes
    assert len(pictures.images) == 10
    assert np.asarray(curve.lines[0].get_ydata()).shape == (20,)
    assert len(curve.get_xticks()) == 10
