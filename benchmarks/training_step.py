"""A training step with masking and MVM: ours against the plain procedure, on the same model and batch, the same loss.

The plain procedure runs the causal LM's own forward for student and teacher: the teacher goes over the whole sequence,
both compute all logits and keep the hidden states of all layers. What that costs depends on the logits' share of the
work, 2 % in the published model: a small model with the published vocabulary exaggerates it, so both are measured, that
vocabulary and the one that keeps the share. Goal: at most 0.75 of the time and 0.6 of the memory.

Memory is a step's peak above weights, gradients and batch: of the resident set, in a process for each figure in which
tensors are mapped one by one (within 0.3 % of the allocator's own events), or of CUDA's allocator.

    python -m benchmarks.training_step [--quick]
"""

from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.common import arguments, report
from benchmarks.steps import MIB, Case, assert_same, logits_share, proportional_vocabulary, step_bytes, step_seconds
from stllm.common.device import resolve_device

# The published depth: with checkpointing, it is what memory stands in proportion to.
FULL = Case(width=512, depth=32)
QUICK = Case(width=256, depth=8, frames=8, text_tokens=64)
VARIED = ("vocabulary", "checkpointing")


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """A row of the table. Raises AssertionError when the two procedures do not compute the same."""
    assert_same(case, device, "plain", "ours")
    time = step_seconds(case, device, "plain", "ours")
    memory = {name: step_bytes(case, device, name) / MIB for name in time}
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
    """Measures, prints and writes."""
    args = arguments(__doc__ or "")
    device = resolve_device(args.device)
    published = QUICK if args.quick else FULL
    proportional = replace(published, vocabulary=proportional_vocabulary(published))
    rows = [
        measured(replace(case, checkpointing=checkpointing), device)
        for case in (proportional, published)
        for checkpointing in (False, True)
    ]
    sizes = {name: value for name, value in asdict(published).items() if name not in VARIED}
    baseline = "full teacher pass, logits at all positions, hidden states of all layers kept"
    report("training_step", baseline, rows, {**sizes, "dtype": "float32"}, args.output_dir)


if __name__ == "__main__":
    main()
