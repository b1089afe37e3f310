"""Masked against unmasked training, over the number of frames: the saving of the paper's section 3.3.

Half of the visual tokens dropped, by masking alone and with MVM (whose teacher passes over all of them), as ratios to a
step on all tokens. The vocabulary keeps the published model's share of the logits; memory is measured as in
training_step.py.

    python -m benchmarks.masking [--quick]
"""

from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.common import arguments, report
from benchmarks.steps import MASK_RATE, MIB, NUM_QUERY_TOKENS, Case, proportional_vocabulary, step_bytes, step_seconds
from stllm.common.device import resolve_device

# Wide and shallow: in a narrow model attention, quadratic in tokens, would exaggerate the saving.
FULL = Case(width=1024, depth=4)
QUICK = Case(width=256, depth=4, text_tokens=64)
FRAMES = (8, 16, 32, 64)
LABELS = {"masked": "masked", "ours": "masked with MVM"}


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """A row of the table."""
    time = step_seconds(case, device, "unmasked", *LABELS)
    memory = {name: step_bytes(case, device, name) / MIB for name in time}
    return {
        "frames": case.frames,
        "visual tokens": case.frames * NUM_QUERY_TOKENS,
        "unmasked, s": time["unmasked"],
        **{f"{label}, time": time[name] / time["unmasked"] for name, label in LABELS.items()},
        "unmasked, MiB": memory["unmasked"],
        **{f"{label}, memory": memory[name] / memory["unmasked"] for name, label in LABELS.items()},
    }


def main() -> None:
    """Measures, prints and writes."""
    args = arguments(__doc__ or "")
    device = resolve_device(args.device)
    case = QUICK if args.quick else FULL
    case = replace(case, vocabulary=proportional_vocabulary(case))
    rows = [measured(replace(case, frames=frames), device) for frames in FRAMES]
    sizes = {name: value for name, value in asdict(case).items() if name != "frames"}
    report(
        "masking",
        "a step on all visual tokens",
        rows,
        {"dropped": MASK_RATE, **sizes, "dtype": "float32"},
        args.output_dir,
    )


if __name__ == "__main__":
    main()
