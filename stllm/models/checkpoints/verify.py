"""`stllm verify DIR...`: recomputes a golden folder and shows the largest difference of every tensor.

A golden folder holds tiny weights and the results that the published code computed with them. They are recomputed here
in float32 on the CPU, with the package's usual loading and prompts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.models import language_model as lm
from stllm.models.checkpoints.formats import RELEASED, read_json
from stllm.models.checkpoints.load import load_pretrained
from stllm.models.checkpoints.weights import WeightFiles
from stllm.models.st_llm import STLLM
from stllm.models.video_inputs import residual_frame_indices
from stllm.processors.prompts import PromptProcessor
from stllm.processors.sequences import pad_sequences, training_sequences
from stllm.processors.templates import BOS, VISUAL, Turn

PLACEHOLDER = "<ImageHere>"  # marks the visual tokens in meta.json's instructions
MARK = "\x00"  # replaces the question, to find out what the template puts before and after it

Comparison = tuple[str, Any, Any]  # name, found, expected


@dataclass(frozen=True)
class Row:
    """The result of one comparison.

    difference: the largest difference of any element. kind: tensor (absolute difference), gradient (relative to the
    largest expected gradient), or equal (0 if equal, otherwise infinite).
    """

    name: str
    kind: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the difference is within tolerance. A NaN is not."""
        return self.difference <= self.tolerance


def verify_folder(
    folder: str | Path, *, checkpoint: str | Path | None = None, atol: float = 1e-4, rtol: float = 1e-3
) -> list[Row]:
    """Compare everything that a golden folder holds with what this package computes.

    checkpoint: weights to use instead of the folder's. atol: tolerance of tensors. rtol: tolerance of gradients,
    relative to the largest. Raises UserError if the folder is no golden folder.
    """
    place = user_path(folder)  # a name on the hub is not looked up
    tensors, about = place / "expected.safetensors", place / "meta.json"
    fault = meta = None
    if not place.is_dir():
        fault = "found a file" if place.exists() else "there is no such folder"
    elif lacking := [file.name for file in (tensors, about) if not file.is_file()]:
        fault = f"found a folder without {' and '.join(lacking)}"
    elif "instructions" not in (meta := read_json(about)):
        fault = "found a meta.json without instructions"
    if meta is None or fault is not None:
        raise UserError(
            f"{folder}: {fault}, expected a folder of golden tensors (expected.safetensors and meta.json beside "
            "weights), such as tests/golden/minigpt4_plain_all in the repository: name one, or look at other weights "
            "with `stllm inspect`"
        )
    weights = WeightFiles([tensors])
    expected = {name: weights.read(name) for name in weights.specs}
    model, processor = load_pretrained(checkpoint or place, device="cpu", dtype="float32")
    comparisons = _recomputed(model.requires_grad_(True), processor, meta, expected)
    return [_row(*comparison, atol, rtol) for comparison in comparisons]


def _row(name: str, found: Any, expected: Any, atol: float, rtol: float) -> Row:
    """Compare floating-point tensors by their largest difference (infinite for another shape), others for equality."""
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        found, expected = (one.tolist() if isinstance(one, Tensor) else one for one in (found, expected))
        return Row(name, "equal", 0.0 if found == expected else math.inf, 0.0)
    difference = math.inf
    if found is not None and found.shape == expected.shape:
        difference = (found.float() - expected.float()).abs().max().item() if found.numel() else 0.0
    if not name.startswith("grad."):
        return Row(name, "tensor", difference, atol)
    return Row(name, "gradient", difference / expected.abs().max().item(), rtol)


def _recomputed(
    model: STLLM, processor: PromptProcessor, meta: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> list[Comparison]:
    """Compute what the published code computed: encoder outputs, training losses and gradients, and generated ids."""
    video, mask = expected["video"], expected.get("mask")
    before, after = _instruction(processor, MARK).split(MARK)
    for text in meta["instructions"]:
        if not (text.startswith(before) and text.endswith(after)):
            raise UserError(
                f"meta.json's instruction {text!r} does not have the form {before + '{question}' + after!r}: "
                "name a folder whose prompts are of this family"
            )
    questions = [text[len(before) : len(text) - len(after)] for text in meta["instructions"]]
    texts = processor.qformer_inputs(questions)
    with torch.no_grad():
        tokens = model.vision_encoder.encode(video)
        frames = model.frame_tokens(model.encode_video(video), **texts)  # (B, T, K, D)
        visual = model.video_input(frames)  # (B, N, D)
        found: list[Comparison] = [
            ("vit", tokens, expected["vit"]),
            ("vit_ln", model.vision_encoder.ln_vision(tokens), expected["vit_ln"]),
            ("frame_tokens", frames, expected["frame_tokens"]),
            ("infer_frame_tokens", frames[0], expected["infer_frame_tokens"]),
            ("infer_visual_tokens", visual[:1], expected["infer_visual_tokens"]),
        ]
    if "residual_index" in expected:
        indices = residual_frame_indices(video.shape[1], model.config.residual_size)
        found.append(("residual_index", indices, expected["residual_index"]))

    rendered = [_instruction(processor, question) for question in questions]
    found.append(("instructions", rendered, list(meta["instructions"])))
    turns = [[Turn(question, answer)] for question, answer in zip(questions, meta["answers"], strict=True)]
    ids, labels = zip(*(processor.training_ids(turn) for turn in turns), strict=True)
    num_visual, pad_id = visual.shape[1], processor.pad_token_id
    batch = training_sequences(ids, labels, pad_id=pad_id, num_visual=num_visual, dropped=mask)
    found += [(name, batch[name], expected[name]) for name in ("attention_mask", "labels")]
    flat = visual.flatten(0, 1)  # (B*N, D)
    with torch.no_grad():
        kept = flat if mask is None else flat[batch["kept"]]
        embeds = model.embed(batch["input_ids"], batch["visual_positions"], kept)
        found.append(("inputs_embeds", embeds, expected["inputs_embeds"]))
        hidden = lm.last_hidden_states(model.language_model, embeds, batch["attention_mask"])
        real = batch["attention_mask"].bool()
        found.append(("logits", lm.logits_of(model.language_model, hidden)[real], expected["logits"][real]))
        if mask is not None:  # the teacher sees all tokens
            teacher = pad_sequences(ids, pad_id=pad_id, num_visual=[num_visual] * len(ids))
            teacher_embeds = model.embed(teacher["input_ids"], teacher["visual_positions"], flat)
            found.append(("teacher_inputs_embeds", teacher_embeds, expected["teacher_inputs_embeds"]))
            found.append(("teacher_attention_mask", teacher["attention_mask"], expected["teacher_attention_mask"]))
            # the teacher stops at the last visual token, which must not change the states
            prefix, whole = (model.teacher_hidden_states(flat, **one) for one in (batch["teacher"], teacher))
            found.append(("teacher (prefix only)", prefix, whole))
    output = model(pixel_values=video, **batch, **texts)
    for name in ("loss", "loss_lm", "loss_mvm"):
        loss = getattr(output, name)  # None without masking, which has no MVM loss
        found.append((name, torch.zeros(()) if loss is None else loss.detach(), expected[name]))
    labelled = expected["labels"][:, 1:] != -100
    found.append(("logits (labels only)", output.logits.detach(), expected["logits"][:, :-1][labelled]))
    output.loss.backward()
    gradients = {RELEASED.to_theirs(name): parameter.grad for name, parameter in model.named_parameters()}
    for name in expected:
        if name.startswith("grad."):
            found.append((name, gradients.get(name.removeprefix("grad.")), expected[name]))
    model.zero_grad(set_to_none=True)
    return found + _generated(model, processor, questions[0], visual[0], expected)


def _generated(
    model: STLLM, processor: PromptProcessor, question: str, visual: Tensor, expected: Mapping[str, Tensor]
) -> list[Comparison]:
    """Compute the prompt of a question, and the ids that greedy search and beam search generate from it."""
    prompt = processor.prompt_ids([Turn(question)], system="")
    names = ("prompt_ids",) if "prompt_ids" in expected else ("prompt_ids_before", "prompt_ids_after")
    published = [token for name in names for token in expected[name][0].tolist()]
    batch: dict[str, Any] = pad_sequences(
        [prompt], pad_id=processor.pad_token_id, num_visual=[len(visual)], side="left"
    )
    with torch.no_grad():
        embeds = model.embed(batch["input_ids"], batch["visual_positions"], visual)
    found: list[Comparison] = [
        ("prompt_ids", [token for token in prompt if token >= 0], published),
        ("generate_inputs_embeds", embeds, expected["generate_inputs_embeds"]),
    ]
    for name, beams in (("greedy_ids", 1), ("beam3_ids", 3)):
        wanted = expected[name][0, 1:]  # the first id is an artefact of the old library
        answers = model.generate(
            **batch,
            visual_tokens=visual,
            max_new_tokens=len(wanted),
            num_beams=beams,
            do_sample=False,
            eos_token_id=processor.eos_token_id,
            pad_token_id=processor.pad_token_id,
        )
        found.append((name, answers[0], wanted))
    return found


def _instruction(processor: PromptProcessor, question: str) -> str:
    """Return the prompt of a question about a video, as in meta.json: `PLACEHOLDER` for the video, no BOS."""
    pieces = processor.template.render(Turn(question), first=True, media="video")
    return "".join({VISUAL: PLACEHOLDER, BOS: ""}.get(piece, piece) for piece in pieces)
