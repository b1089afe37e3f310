"""Training step: time and memory of a step with masking and MVM, ours against a plain implementation of the same loss.

The plain implementation runs the causal LM's own forward for student and teacher. Its teacher pass reads the whole
sequence; both passes compute all logits and keep the hidden states of all layers. The difference depends on the share
of the work that computes logits, which is 2 % in the published model. A small model with the published vocabulary has a
larger share and exaggerates the difference. So two vocabularies are measured: the published one and one with the
published share (--quick: only the latter). Goal: at most 0.75 of the time and 0.6 of the memory.

Memory is the peak of a step above weights, gradients and batch. On a GPU it is measured by CUDA's allocator. On a CPU
it is the resident memory of a new process that maps each tensor separately (within 0.3 % of the allocator's events).
--published: the published language model in bfloat16, on a GPU.

    python -m benchmarks.training_step [--quick | --published]
"""

import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.common import arguments, cuda_device, exit_code, report
from benchmarks.steps import (
    MIB,
    PUBLISHED_CASE,
    Case,
    assert_same,
    logits_share,
    new_batch,
    new_model,
    proportional_vocabulary,
    step_bytes,
    step_seconds,
)
from stllm.common.device import resolve_device

# The published depth, because memory with gradient checkpointing is proportional to it.
FULL = Case(width=512, depth=32)
QUICK = Case(width=256, depth=4, frames=8, text_tokens=64)
VARIED = ("vocabulary", "checkpointing")


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """Return a row of the table. Raises AssertionError if the two procedures give different losses or gradients."""
    model, batch = new_model(case, device), new_batch(case, device)
    assert_same(model, batch, "plain", "ours")
    time = step_seconds(model, batch, "plain", "ours")
    memory = {name: step_bytes(case, model, batch, name) / MIB for name in time}
    return {
        "vocabulary": case.vocabulary,
        "logits' share": logits_share(case),
        "checkpointing": "yes" if case.checkpointing else "no",
        **{f"{name}, s": spent for name, spent in time.items()},
        "time ratio": time["ours"] / time["plain"],
        **{f"{name}, MiB": taken for name, taken in memory.items()},
        "memory ratio": memory["ours"] / memory["plain"],
    }


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "", published=True)
    device = cuda_device(args.device) if args.published else resolve_device(args.device)
    case = PUBLISHED_CASE if args.published else QUICK if args.quick else FULL
    vocabularies = {proportional_vocabulary(case)}
    if not args.quick:
        vocabularies.add(case.vocabulary)  # at the published size both are equal
    rows = [
        measured(replace(case, vocabulary=vocabulary, checkpointing=checkpointing), device)
        for vocabulary in sorted(vocabularies)
        for checkpointing in (False, True)
    ]
    sizes = {name: value for name, value in asdict(case).items() if name not in VARIED}
    baseline = "full teacher pass, logits at all positions, hidden states of all layers kept"
    report("training_step", baseline, rows, sizes, args.output_dir, device=device, published=args.published)


if __name__ == "__main__":
    sys.exit(exit_code(main))
