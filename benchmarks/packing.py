"""Packing: time and memory of packed batches against padded ones, with text lengths like those of the published data.

A batch holds samples of one corpus, as in training. The text lengths and the sizes of the corpora are chosen here,
close to those of VideoChat2-IT: class names of 1 to 5 tokens, answers of 1 to 3 words, captions of 20 to 40 words,
conversations of 60 to 200 words, 1.3 tokens a word. In the last row one data set holds all kinds of text. Packed and
padded batches must give the same losses.

"with a mask" is a packed batch as transformers computes it: torch's SDPA with a mask over all pairs of positions. The
share of padding is computed for many batches of 16, the published size for each GPU. Time (on a CPU: CPU time) is
measured on a few smaller batches, memory on the one of them with the most padding.

    python -m benchmarks.packing [--quick | --published]
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import arguments, cuda_device, exit_code, report, take_turns
from benchmarks.steps import (
    MASK_RATE,
    MIB,
    NUM_QUERY_TOKENS,
    PUBLISHED_CASE,
    Case,
    assert_same,
    new_batch,
    new_model,
    proportional_vocabulary,
    step,
    step_bytes,
)
from stllm.common.device import resolve_device
from stllm.models import language_model as lm

# smallest and largest number of tokens of instruction and question, and of the answer
TEXTS = {
    "class name": ((20, 40), (1, 5)),
    "short answer": ((25, 45), (1, 4)),
    "choice": ((50, 100), (4, 12)),
    "caption": ((15, 35), (26, 52)),
    "conversation": ((20, 45), (78, 256)),
}
# thousands of samples of each kind of corpus
QA = [("conversation", 13), ("class name", 40), ("class name", 40), ("choice", 34), ("choice", 42)]
QA += [("short answer", 40), ("short answer", 100)]
TALK = [("caption", 7), ("conversation", 14), ("conversation", 13), ("caption", 400), ("short answer", 100)]
# recipe -> corpora, frames of a sample (32 tokens each), whether it masks with MVM, whether a batch is of one corpus
RECIPES: Mapping[str, tuple[Sequence[tuple[str, int]], int, bool, bool]] = {
    "avp (32 visual tokens)": (QA, 1, False, True),
    "qa (512, masked)": (QA, 16, True, True),
    "conversation (512, masked)": (TALK, 16, True, True),
    "all kinds in one data set (32)": (QA, 1, False, False),
}
PUBLISHED_BATCH = 16
FULL = Case(width=256, depth=2, batch=8)
QUICK = Case(width=128, depth=2, batch=4)
MANY = 2000  # batches for the share of padding
NUM_BATCHES = 2  # batches that are timed


def draw_texts(corpora: Sequence[tuple[str, int]], batch: int, *, one_corpus: bool, rng: random.Random) -> list[int]:
    """Draw the number of text tokens of each sample of a batch."""
    kinds, sizes = zip(*corpora, strict=True)
    drawn = rng.choices(kinds, sizes) * batch if one_corpus else rng.choices(kinds, sizes, k=batch)
    return [rng.randint(*TEXTS[kind][0]) + rng.randint(*TEXTS[kind][1]) for kind in drawn]


def padding(texts: Sequence[int], visual: int) -> tuple[int, int]:
    """Return the number of padding positions and of all positions of a padded batch. visual: tokens of each sample."""
    positions = len(texts) * (max(texts) + visual)
    return positions - sum(texts) - len(texts) * visual, positions


def masked_states(model: Any, inputs_embeds: Tensor, attention_mask: Any, packed: Mapping[str, Any]) -> Tensor:
    """Compute `last_hidden_states` of packed samples with transformers' mask."""
    decoder = model.get_decoder()
    return decoder(inputs_embeds=inputs_embeds, position_ids=packed["position_ids"], use_cache=False).last_hidden_state


def measured(name: str, case: Case, num_batches: int, device: torch.device) -> dict[str, Any]:
    """Return a row of the table. Raises AssertionError if padded and packed batches give different losses."""
    corpora, frames, masks, one_corpus = RECIPES[name]
    padded, packed = ("ours", "packed") if masks else ("unmasked", "unmasked_packed")
    visual = frames * NUM_QUERY_TOKENS
    entering = visual - int(MASK_RATE * visual) if masks else visual
    draw = partial(draw_texts, corpora, one_corpus=one_corpus, rng=random.Random(0))
    many = [draw(batch=PUBLISHED_BATCH) for _ in range(MANY)]
    timed = [draw(batch=case.batch) for _ in range(num_batches)]
    cases = [replace(case, frames=frames, texts=tuple(texts)) for texts in timed]
    model, batches = new_model(case, device), [new_batch(one, device) for one in cases]
    assert_same(model, batches[0], padded, packed)

    def share(drawn: Sequence[Sequence[int]]) -> float:
        counts = [padding(texts, entering) for texts in drawn]
        return sum(count for count, _ in counts) / sum(positions for _, positions in counts)

    def steps(procedure: str) -> None:
        for batch in batches:
            step(model, batch, procedure)

    def steps_with_a_mask() -> None:
        with mock.patch.object(lm, "last_hidden_states", masked_states):
            steps(packed)

    works: dict[str, Callable[[], None]] = {
        "padded": partial(steps, padded),
        "packed": partial(steps, packed),
        "with a mask": steps_with_a_mask,
    }
    clock = perf_counter if device.type == "cuda" else process_time
    spent = take_turns(works, repeats=2, device=device, clock=clock)
    time = {name: seconds / num_batches for name, seconds in spent.items()}
    worst = max(range(num_batches), key=lambda i: share([cases[i].texts]))
    memory = {name: step_bytes(cases[worst], model, batches[worst], name) / MIB for name in (padded, packed)}
    return {
        "recipe": name,
        "padding": share(many),
        "of those timed": share(timed),
        **{f"{name}, s": seconds for name, seconds in time.items()},
        "time ratio": time["packed"] / time["padded"],
        "with a mask, time ratio": time["with a mask"] / time["padded"],
        "padded, MiB": memory[padded],
        "packed, MiB": memory[packed],
        "memory ratio": memory[packed] / memory[padded],
    }


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "", published=True)
    device = cuda_device(args.device) if args.published else resolve_device(args.device)
    case = replace(PUBLISHED_CASE, batch=8, checkpointing=True) if args.published else QUICK if args.quick else FULL
    case = replace(case, vocabulary=proportional_vocabulary(case), answer_tokens=256)
    rows = [measured(name, case, NUM_BATCHES, device) for name in RECIPES]
    left_out = ("frames", "text_tokens", "texts")
    sizes = {name: value for name, value in asdict(case).items() if name not in left_out} | {"batches": NUM_BATCHES}
    baseline = "the same samples, padded to the longest of their batch"
    report("packing", baseline, rows, sizes, args.output_dir, device=device, published=args.published)


if __name__ == "__main__":
    sys.exit(exit_code(main))
