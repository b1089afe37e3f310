"""`stllm verify DIR...`: recomputes a golden folder and shows the largest difference of every tensor.

Source of the numbers: the published system at a tiny size (model.md, section 9). In float32 on the CPU, through the
loading and the prompts that everything else uses.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stllm.common.errors import UserError
from stllm.common.terminal import console
from stllm.conversation.templates import BOS, VISUAL, Turn
from stllm.models import language_model as lm
from stllm.models.checkpoints.formats import locate, read_json
from stllm.models.checkpoints.keys import UnknownKeyError
from stllm.models.checkpoints.loading import load_pretrained
from stllm.models.checkpoints.tables import RELEASED
from stllm.models.st_llm import STLLM
from stllm.models.video_inputs import residual_frame_indices
from stllm.processors.prompts import PromptProcessor
from stllm.processors.sequences import pad_sequences, training_sequences

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
    """The command: a table for each folder; 1 when anything is beyond tolerance."""
    failed = []
    for folder in args.dir:
        rows = verify_folder(folder, atol=args.atol, rtol=args.rtol)
        console().print(_table(str(folder), rows))
        failed += [f"{Path(folder).name}: {row.name}" for row in rows if not row.passed]
    if failed:
        print(f"error: beyond tolerance: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def verify_folder(
    folder: str | Path, *, checkpoint: str | Path | None = None, atol: float = 1e-4, rtol: float = 1e-3
) -> list[Row]:
    """Every comparison that the golden folder allows. checkpoint: where to take the weights from instead."""
    place = locate(folder)
    meta = read_json(place / "meta.json")
    if not (place / "expected.safetensors").is_file() or "instructions" not in meta:
        raise UserError(
            f"{folder} is no golden folder: expected expected.safetensors and meta.json with instructions in it"
        )
    expected = load_file(place / "expected.safetensors")
    model, processor = load_pretrained(checkpoint or place, device="cpu", dtype="float32")
    golden = _Golden(model, processor, meta, expected, atol, rtol)
    golden.compare_encoder()
    golden.compare_training()
    golden.compare_gradients()
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
        self.model = model.requires_grad_(True)
        self.processor = processor
        self.meta = meta
        self.expected = expected
        self.atol, self.rtol = atol, rtol
        self.rows: list[Row] = []
        self.questions = [_question(processor, text) for text in meta["instructions"]]
        self.texts = processor.qformer_inputs(self.questions)

    def compare_encoder(self) -> None:
        """Frames to projected tokens, and what evaluation makes of the first video."""
        video = self.expected["video"]
        with torch.no_grad():
            encoder = self.model.vision_encoder
            tokens = encoder.encode(video)
            self._tensor("vit", tokens)
            self._tensor("vit_ln", encoder.ln_vision(tokens))
            self.frames = self.model.frame_tokens(self.model.encode_video(video), **self.texts)  # (B, T, K, D)
            self.visual = self.model.video_input(self.frames)  # (B, N, D)
        self._tensor("frame_tokens", self.frames)
        self._tensor("infer_frame_tokens", self.frames[0])
        self._tensor("infer_visual_tokens", self.visual[:1])
        if "residual_index" in self.expected:
            indices = residual_frame_indices(video.shape[1], self.model.config.residual_size)
            self._equal("residual_index", indices, self.expected["residual_index"].tolist())

    def compare_training(self) -> None:
        """Prompts, the joined sequences, the losses; logits both everywhere and only where there is a label."""
        rows = [
            self.processor.training_ids([Turn(question, answer)])
            for question, answer in zip(self.questions, self.meta["answers"], strict=True)
        ]
        ids, labels = zip(*rows, strict=True)
        dropped, num_visual, pad_id = self.expected.get("mask"), self.visual.shape[1], self.processor.pad_token_id
        batch = training_sequences(ids, labels, pad_id=pad_id, num_visual=num_visual, dropped=dropped)
        self._equal("instructions", self._rendered(), list(self.meta["instructions"]))
        for name in ("attention_mask", "labels"):
            self._equal(name, batch[name].tolist(), self.expected[name].tolist())
        visual = self.visual.flatten(0, 1)  # (B*N, D)
        with torch.no_grad():
            kept = visual if dropped is None else visual[batch["kept"]]
            embeds = self.model.embed(batch["input_ids"], batch["visual_positions"], kept)
            self._tensor("inputs_embeds", embeds)
            hidden = lm.last_hidden_states(self.model.language_model, embeds, batch["attention_mask"])
            logits = lm.logits_of(self.model.language_model, hidden)
            real = batch["attention_mask"].bool()
            self._tensor("logits", logits[real], self.expected["logits"][real])
            if dropped is not None:
                self._teacher(pad_sequences(ids, pad_id=pad_id, num_visual=[num_visual] * len(ids)), batch["teacher"])
        self.output = self.model(pixel_values=self.expected["video"], **batch, **self.texts)
        for name in ("loss", "loss_lm", "loss_mvm"):
            found = getattr(self.output, name)  # None without masking: no such loss
            self._tensor(name, torch.zeros(()) if found is None else found.detach())
        wanted = self.expected["labels"][:, 1:] != -100
        self._tensor("logits (labels only)", self.output.logits.detach(), self.expected["logits"][:, :-1][wanted])

    def compare_gradients(self) -> None:
        """Gradients of the total loss, relative to each one's largest entry."""
        self.output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        for name, expected in self.expected.items():
            if name.startswith("grad."):
                try:
                    found = gradients.get(RELEASED.to_ours(name.removeprefix("grad.")) or "")
                except UnknownKeyError:
                    found = None
                difference = float("inf") if found is None else _largest(found, expected) / expected.abs().max().item()
                self.rows.append(Row(name, "gradient", difference, self.rtol))
        self.model.zero_grad(set_to_none=True)

    def compare_generation(self) -> None:
        """The prompt of the first question, and the tokens that greedy search and beams make of it."""
        prompt = self.processor.prompt_ids([Turn(self.questions[0])], system="")
        self._equal("prompt_ids", [token for token in prompt if token >= 0], self._expected_prompt())
        visual = self.visual[0]  # (N, D)
        batch = pad_sequences([prompt], pad_id=self.processor.pad_token_id, num_visual=[len(visual)], side="left")
        with torch.no_grad():
            embeds = self.model.embed(batch["input_ids"], batch["visual_positions"], visual)
        self._tensor("generate_inputs_embeds", embeds)
        for name, beams in (("greedy_ids", 1), ("beam3_ids", 3)):
            expected = self.expected[name][0, 1:].tolist()  # the first id is an artefact of the old library
            found = self.model.generate(
                **batch,
                visual_tokens=visual,
                max_new_tokens=len(expected),
                num_beams=beams,
                do_sample=False,
                eos_token_id=self.processor.eos_token_id,
                pad_token_id=self.processor.pad_token_id,
            )
            self._equal(name, found[0].tolist(), expected)

    def _teacher(self, whole: Mapping[str, Tensor], short: Mapping[str, Tensor]) -> None:
        """The teacher's sequence; and that stopping at the last visual token leaves its states as they are."""
        visual, mask = self.visual.flatten(0, 1), "attention_mask"  # (B*N, D)
        self._tensor("teacher_inputs_embeds", self.model.embed(whole["input_ids"], whole["visual_positions"], visual))
        self._equal("teacher_attention_mask", whole[mask].tolist(), self.expected["teacher_attention_mask"].tolist())
        found, full = (self.model.teacher_hidden_states(visual, **batch) for batch in (short, whole))
        self._tensor("teacher (prefix only)", found, full)

    def _rendered(self) -> list[str]:
        template = self.processor.template
        rendered = [template.render(Turn(question), first=True, media="video") for question in self.questions]
        return ["".join({VISUAL: PLACEHOLDER, BOS: ""}.get(piece, piece) for piece in pieces) for pieces in rendered]

    def _expected_prompt(self) -> list[int]:
        names = ("prompt_ids",) if "prompt_ids" in self.expected else ("prompt_ids_before", "prompt_ids_after")
        return [token for name in names for token in self.expected[name][0].tolist()]

    def _tensor(self, name: str, found: Tensor, expected: Tensor | None = None) -> None:
        self.rows.append(
            Row(name, "tensor", _largest(found, self.expected[name] if expected is None else expected), self.atol)
        )

    def _equal(self, name: str, found: list[Any], expected: list[Any]) -> None:
        self.rows.append(Row(name, "equal", 0.0 if found == expected else float("inf"), 0.0))


def _question(processor: PromptProcessor, instruction: str) -> str:
    """The question inside an instruction that the published template has rendered."""
    pieces = processor.template.render(Turn(MARK), first=True, media="video")
    around = "".join({VISUAL: PLACEHOLDER, BOS: ""}.get(piece, piece) for piece in pieces)
    before, after = around.split(MARK)
    if not (instruction.startswith(before) and instruction.endswith(after)):
        raise UserError(
            f"meta.json's instruction {instruction!r} does not have the form {around.replace(MARK, '{question}')!r}: "
            "name a folder whose prompts are of this family"
        )
    return instruction[len(before) : len(instruction) - len(after)]


def _largest(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite when the shapes differ or anything is no number."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.float() - expected.float()).abs().max().item() if found.numel() else 0.0
    return difference if difference == difference else float("inf")


def _table(title: str, rows: Iterable[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for column in ("tensor", "compared", "largest difference", "tolerance", ""):
        numeric = column in ("largest difference", "tolerance")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        words = {"tensor": "absolute", "gradient": "relative", "equal": "equality"}[row.kind]
        difference = ("same" if row.passed else "differs") if row.kind == "equal" else f"{row.difference:.1e}"
        table.add_row(
            row.name,
            words,
            difference,
            f"{row.tolerance:.0e}" if row.tolerance else "",
            "ok" if row.passed else Text("FAIL", style="red"),
        )
    return table
