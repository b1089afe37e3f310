"""`stllm verify DIR...`: recompute a golden folder and show the largest difference of every tensor.

Source of the numbers: the published system at a tiny size (model.md, section 9). In float32 on the CPU, through the
loading and the prompts that everything else uses.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stllm.common.errors import UserError
from stllm.conversation.templates import BOS, VISUAL, Turn
from stllm.models import language_model as lm
from stllm.models.checkpoints.formats import locate, read_json
from stllm.models.checkpoints.load import load_pretrained
from stllm.models.checkpoints.tables import RELEASED, UnknownKeyError
from stllm.models.masking import keep_tokens
from stllm.models.st_llm import STLLM
from stllm.models.video_inputs import residual_frame_indices
from stllm.processors.prompts import PromptProcessor

PLACEHOLDER = "<ImageHere>"  # the visual tokens in meta.json's instructions
MARK = "\x00"  # stands for the question while a template is taken apart


@dataclass(frozen=True)
class Row:
    """One comparison. difference: the largest; kind: tensor (absolute), gradient (relative to its largest), equal."""

    name: str
    kind: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within tolerance; a difference that is no number is not."""
        return self.difference <= self.tolerance


def run(args: argparse.Namespace) -> int:
    """Run the command: print a table for each folder; 1 when anything is beyond tolerance."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    failed = []
    for folder in args.dir:
        rows = verify_folder(folder, atol=args.atol, rtol=args.rtol)
        table = Table(title=escape(str(folder)))
        for column in ("tensor", "compared", "largest difference", "tolerance", ""):
            numeric = column in ("largest difference", "tolerance")
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            words = {"tensor": "absolute", "gradient": "relative", "equal": "equality"}[row.kind]
            difference = ("same" if row.passed else "differs") if row.kind == "equal" else f"{row.difference:.1e}"
            tolerance = f"{row.tolerance:.0e}" if row.tolerance else ""
            table.add_row(row.name, words, difference, tolerance, "ok" if row.passed else "[red]FAIL")
        Console().print(table)
        failed += [f"{Path(folder).name}: {row.name}" for row in rows if not row.passed]
    if failed:
        print(f"error: beyond tolerance: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def verify_folder(
    folder: str | Path, *, checkpoint: str | Path | None = None, atol: float = 1e-4, rtol: float = 1e-3
) -> list[Row]:
    """Make every comparison that the golden folder allows. checkpoint: where to take the weights from instead."""
    place = locate(folder)
    meta = read_json(place / "meta.json")
    if not (place / "expected.safetensors").is_file() or "instructions" not in meta:
        raise UserError(
            f"{folder} is no golden folder: expected expected.safetensors and meta.json with instructions in it"
        )
    expected = load_file(place / "expected.safetensors")
    model, processor = load_pretrained(checkpoint or place, device="cpu", dtype="float32")
    golden = _Golden(model.requires_grad_(True), processor, meta, expected, atol, rtol)
    golden.compare_encoder()
    golden.compare_training()
    golden.compare_generation()
    return golden.rows


class _Golden:
    """One folder being recomputed; each step adds its rows."""

    def __init__(
        self,
        model: STLLM,
        processor: PromptProcessor,
        meta: Mapping[str, Any],
        expected: Mapping[str, Tensor],
        atol: float,
        rtol: float,
    ) -> None:
        self.model, self.processor, self.meta, self.expected = model, processor, meta, expected
        self.atol, self.rtol = atol, rtol
        self.rows: list[Row] = []
        before, after = self._instruction(MARK).split(MARK)
        for text in meta["instructions"]:
            if not (text.startswith(before) and text.endswith(after)):
                raise UserError(
                    f"meta.json's instruction {text!r} does not have the form {before + '{question}' + after!r}: "
                    "name a folder whose prompts are of this family"
                )
        self.questions = [text[len(before) : len(text) - len(after)] for text in meta["instructions"]]
        self.texts = processor.qformer_inputs(self.questions)

    def compare_encoder(self) -> None:
        """Compare frames to projected tokens, and the visual tokens that evaluation makes of the first video."""
        video = self.expected["video"]
        with torch.no_grad():
            encoder = self.model.vision_encoder
            tokens = encoder.encode(video)
            self._tensor("vit", tokens)
            self._tensor("vit_ln", encoder.ln_vision(tokens))
            frames = self.model.frame_tokens(self.model.encode_video(video), **self.texts)  # (B, T, K, D)
            self.visual = self.model.video_input(frames)  # (B, N, D)
        self._tensor("frame_tokens", frames)
        self._tensor("infer_frame_tokens", frames[0])
        self._tensor("infer_visual_tokens", self.visual[:1])
        if "residual_index" in self.expected:
            indices = residual_frame_indices(video.shape[1], self.model.config.residual_size)
            self._equal("residual_index", indices, self.expected["residual_index"].tolist())

    def compare_training(self) -> None:
        """Compare prompts, joined sequences, logits at all positions and at labels, losses, and gradients."""
        rows = [
            self.processor.training_ids([Turn(question, answer)])
            for question, answer in zip(self.questions, self.meta["answers"], strict=True)
        ]
        batch = self.processor.pad([ids for ids, _ in rows], labels=[labels for _, labels in rows])
        ids, attention = batch["input_ids"], batch["attention_mask"]
        rendered = [self._instruction(question) for question in self.questions]
        self._equal("instructions", rendered, list(self.meta["instructions"]))
        mask = self.expected.get("mask")
        with torch.no_grad():
            kept = self.visual if mask is None else keep_tokens(self.visual, mask)
            student = self.model.join(list(kept), ids, attention, labels=batch["labels"])
            assert student.labels is not None  # they were given
            self._tensor("inputs_embeds", student.inputs_embeds)
            self._equal("attention_mask", student.attention_mask.tolist(), self.expected["attention_mask"].tolist())
            self._equal("labels", student.labels.tolist(), self.expected["labels"].tolist())
            hidden = lm.last_hidden_states(self.model.language_model, student.inputs_embeds, student.attention_mask)
            logits = lm.logits_of(self.model.language_model, hidden)
            real = student.attention_mask.bool()
            self._tensor("logits", logits[real], self.expected["logits"][real])
            if mask is not None:  # the teacher sees all tokens
                teacher = self.model.join(list(self.visual), ids, attention)
                wanted = self.expected["teacher_attention_mask"]
                self._tensor("teacher_inputs_embeds", teacher.inputs_embeds)
                self._equal("teacher_attention_mask", teacher.attention_mask.tolist(), wanted.tolist())
                # stopping at the last visual token leaves its states as they are
                whole = lm.last_hidden_states(self.model.language_model, teacher.inputs_embeds, teacher.attention_mask)
                positions = teacher.visual_positions(self.visual.shape[1])[..., None].expand(-1, -1, whole.shape[-1])
                prefix = self.model.teacher_hidden_states(self.visual, ids, attention)
                self._tensor("teacher (prefix only)", prefix, whole.gather(1, positions))
        output = self.model(pixel_values=self.expected["video"], token_mask=mask, **batch, **self.texts)
        for name in ("loss", "loss_lm", "loss_mvm"):
            found = getattr(output, name)  # None without masking: no such loss
            self._tensor(name, torch.zeros(()) if found is None else found.detach())
        labelled = self.expected["labels"][:, 1:] != -100
        self._tensor("logits (labels only)", output.logits.detach(), self.expected["logits"][:, :-1][labelled])

        output.loss.backward()
        parameters = dict(self.model.named_parameters())
        for name, expected in self.expected.items():
            if name.startswith("grad."):
                try:
                    parameter = parameters.get(RELEASED.to_ours(name.removeprefix("grad.")) or "")
                except UnknownKeyError:
                    parameter = None
                gradient = None if parameter is None else parameter.grad
                difference = (
                    math.inf if gradient is None else _largest(gradient, expected) / expected.abs().max().item()
                )
                self.rows.append(Row(name, "gradient", difference, self.rtol))
        self.model.zero_grad(set_to_none=True)

    def compare_generation(self) -> None:
        """Compare the prompt of the first question, and the tokens that greedy search and beams make of it."""
        prompt = self.processor.prompt_ids([Turn(self.questions[0])], system="")
        names = ("prompt_ids",) if "prompt_ids" in self.expected else ("prompt_ids_before", "prompt_ids_after")
        published = [token for name in names for token in self.expected[name][0].tolist()]
        self._equal("prompt_ids", [token for token in prompt if token >= 0], published)
        batch = self.processor.pad([prompt], side="left")
        with torch.no_grad():
            sequence = self.model.join(list(self.visual[:1]), batch["input_ids"], batch["attention_mask"])
        self._tensor("generate_inputs_embeds", sequence.inputs_embeds)
        for name, beams in (("greedy_ids", 1), ("beam3_ids", 3)):
            expected = self.expected[name][0, 1:].tolist()  # the first id is an artefact of the old library
            found = self.model.generate(
                **batch,
                visual_tokens=list(self.visual[:1]),
                max_new_tokens=len(expected),
                num_beams=beams,
                do_sample=False,
                eos_token_id=self.processor.eos_token_id,
                pad_token_id=self.processor.pad_token_id,
            )
            self._equal(name, found[0].tolist(), expected)

    def _instruction(self, question: str) -> str:
        """The question as the published template renders it."""
        pieces = self.processor.template.render(Turn(question), first=True, media="video")
        return "".join({VISUAL: PLACEHOLDER, BOS: ""}.get(piece, piece) for piece in pieces)

    def _tensor(self, name: str, found: Tensor, expected: Tensor | None = None) -> None:
        difference = _largest(found, self.expected[name] if expected is None else expected)
        self.rows.append(Row(name, "tensor", difference, self.atol))

    def _equal(self, name: str, found: list[Any], expected: list[Any]) -> None:
        self.rows.append(Row(name, "equal", 0.0 if found == expected else math.inf, 0.0))


def _largest(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite when the shapes differ or anything is no number."""
    if found.shape != expected.shape:
        return math.inf
    difference = (found.float() - expected.float()).abs().max().item() if found.numel() else 0.0
    return difference if difference == difference else math.inf
