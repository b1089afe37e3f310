"""Masking: time and memory of training steps with masking (paper section 3.3), for several numbers of frames.

Half of the visual tokens are dropped, by masking without MVM and by masking with MVM, whose teacher pass reads all
tokens. The baseline is a step on all tokens. The vocabulary is chosen so that logits take the same share of the work as
in the published model. Memory is measured as in training_step.py. --published: the published language model in
bfloat16, on a GPU.

    python -m benchmarks.masking [--quick | --published]
"""

import sys
from dataclasses import asdict, replace
from typing import Any

from benchmarks.common import arguments, cuda_device, exit_code, report
from benchmarks.steps import (
    MASK_RATE,
    MIB,
    NUM_QUERY_TOKENS,
    PUBLISHED_CASE,
    Case,
    new_batch,
    new_model,
    proportional_vocabulary,
    step_bytes,
    step_seconds,
)
from stllm.common.device import resolve_device
from stllm.models.st_llm import STLLM

# Wide and shallow: a narrow model would exaggerate the saving, because attention, quadratic in tokens, would dominate.
FULL = Case(width=1024, depth=4)
QUICK = Case(width=256, depth=2, text_tokens=64)
FRAMES, QUICK_FRAMES = (8, 16, 32, 64), (16, 64)
LABELS = {"masked": "masked", "ours": "masked with MVM"}


def measured(case: Case, model: STLLM) -> dict[str, Any]:
    """Measure steps with the number of frames of `case`.

    Returns a row of the table. model: a model with the sizes of `case`.
    """
    batch = new_batch(case, model.device)
    time = step_seconds(model, batch, "unmasked", *LABELS)
    memory = {name: step_bytes(case, model, batch, name) / MIB for name in time}
    return {
        "frames": case.frames,
        "visual tokens": case.frames * NUM_QUERY_TOKENS,
        "unmasked, s": time["unmasked"],
        **{f"{label}, time": time[name] / time["unmasked"] for name, label in LABELS.items()},
        "unmasked, MiB": memory["unmasked"],
        **{f"{label}, memory": memory[name] / memory["unmasked"] for name, label in LABELS.items()},
    }


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "", published=True)
    device = cuda_device(args.device) if args.published else resolve_device(args.device)
    case = PUBLISHED_CASE if args.published else QUICK if args.quick else FULL
    case = replace(case, vocabulary=proportional_vocabulary(case))
    model = new_model(case, device)
    rows = [measured(replace(case, frames=frames), model) for frames in (QUICK_FRAMES if args.quick else FRAMES)]
    sizes = {name: value for name, value in asdict(case).items() if name != "frames"}
    report(
        "masking",
        "a step on all visual tokens",
        rows,
        {"dropped": MASK_RATE, **sizes},
        args.output_dir,
        device=device,
        published=args.published,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
