"""Training steps by several procedures, for training_step.py, masking.py, packing.py and published_size.py.

A step is a forward and a backward pass. It starts from the output of the frozen Q-Former, as with precomputed features,
because encoding the frames takes the same time in every procedure. The language model has the published proportions
(the width of the feed-forward layers is 2.69 times the width), and all of it is trained.

    python -m benchmarks.steps CASE PROCEDURE DEVICE    measures the memory of one procedure in this process

B clips, N visual tokens of a clip, V visual tokens of the batch, D width.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from benchmarks.common import resident_bytes, take_turns
from stllm.models import language_model as lm
from stllm.models.checkpoints.load import assemble
from stllm.models.configuration import STLLMConfig
from stllm.models.masking import draw_dropped, mvm_loss
from stllm.models.st_llm import STLLM
from stllm.processors.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID, training_sequences

PUBLISHED = {"vocab_size": 32001, "hidden_size": 4096, "num_hidden_layers": 32}  # Vicuna-7B with [PAD]
NUM_QUERY_TOKENS = 32
QFORMER_WIDTH = 768
MASK_RATE = 0.5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # relative tolerance of losses and of gradient norms
MIB = 2**20
Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Sizes of a model and a batch.

    text_tokens: text tokens of the first row, including the answer; each further row has 8 fewer. texts: the text
    tokens of each row, instead of text_tokens.
    """

    width: int = 512
    depth: int = 32
    vocabulary: int = PUBLISHED["vocab_size"]
    batch: int = 1
    frames: int = 16
    text_tokens: int = 96
    answer_tokens: int = 32
    texts: tuple[int, ...] = ()
    checkpointing: bool = False
    dtype: str = "float32"  # of weights, gradients and activations


PUBLISHED_CASE = Case(width=PUBLISHED["hidden_size"], depth=PUBLISHED["num_hidden_layers"], dtype="bfloat16")


def proportional_vocabulary(case: Case) -> int:
    """Return the vocabulary size at which logits take the same share of a forward pass as in the published model."""
    shrunk = case.width * case.depth / (PUBLISHED["hidden_size"] * PUBLISHED["num_hidden_layers"])
    return round(PUBLISHED["vocab_size"] * shrunk)


def logits_share(case: Case) -> float:
    """Return the share of a position's multiplications that computes logits. Attention is not counted."""
    layers = case.depth * (4 * case.width + 3 * _inner_width(case))
    return case.vocabulary / (case.vocabulary + layers)


def _inner_width(case: Case) -> int:
    return 11008 * case.width // 4096


def new_model(case: Case, device: torch.device) -> STLLM:
    """Return a model with random weights, in training mode. Its encoder and Q-Former, which steps skip, are tiny."""
    config = STLLMConfig(
        vision_config={"image_size": 28, "embed_dim": 32, "depth": 4, "num_heads": 4},
        qformer_config={"vocab_size": 8, "num_hidden_layers": 1, "intermediate_size": 8},
        text_config={
            "model_type": "llama",
            "vocab_size": case.vocabulary,
            "hidden_size": case.width,
            "intermediate_size": _inner_width(case),
            "num_hidden_layers": case.depth,
            "num_attention_heads": case.width // 128,
            "max_position_embeddings": 4096,
        },
        num_query_tokens=NUM_QUERY_TOKENS,
        mvm_decode=True,
    )
    model = draw_model(config, device, getattr(torch, case.dtype)).train()
    if case.checkpointing:
        checkpoint(model)
    return model


def draw_model(config: STLLMConfig, device: torch.device, dtype: torch.dtype) -> STLLM:
    """Return a model with random weights, drawn on the device and in this type. Frees unused memory first."""
    gc.collect()
    torch.manual_seed(0)
    return assemble(config, [], device=device, dtype=dtype, training=True)[0]


def checkpoint(model: STLLM) -> None:
    """Turn on gradient checkpointing: activations are computed again in the backward pass instead of stored."""
    # newer versions of transformers use the first name, and warn about the second
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def new_batch(case: Case, device: torch.device) -> Batch:
    """Return arguments of `STLLM.forward` by kind of batch: masked, whole, masked packed, whole packed.

    In masked batches half of the visual tokens are dropped. The visual tokens precede the text, as in the InstructBLIP
    family.
    """
    generator = torch.Generator().manual_seed(0)
    texts = case.texts or [case.text_tokens - 8 * number for number in range(case.batch)]
    ids = torch.randint(case.vocabulary, (case.batch, max(texts)), generator=generator)
    ids[:, 0] = VISUAL_TOKEN_ID
    rows = [row[:length] for length, row in zip(texts, ids.tolist(), strict=True)]
    answers = [min(case.answer_tokens, len(row) // 2) for row in rows]
    labels = [[IGNORE_INDEX] * (len(row) - n) + row[-n:] for row, n in zip(rows, answers, strict=True)]
    features = torch.randn(case.batch, case.frames, NUM_QUERY_TOKENS, QFORMER_WIDTH, generator=generator)
    features = features.to(device, getattr(torch, case.dtype))
    num_visual = case.frames * NUM_QUERY_TOKENS
    dropped = draw_dropped(case.batch, num_visual, rate=MASK_RATE, generator=generator)
    prompts = partial(training_sequences, rows, labels, pad_id=0, num_visual=num_visual)
    kinds = {
        "masked": prompts(dropped=dropped),
        "whole": prompts(),
        "masked packed": prompts(dropped=dropped, packing=True),
        "whole packed": prompts(packing=True),
    }
    return {name: {"query_features": features, **send_to_device(batch, device)} for name, batch in kinds.items()}


# ---- procedures: functions from a model and a batch to a loss -------------------------------------------------------


def ours(model: STLLM, batch: Batch) -> Tensor:
    """Compute the loss as `stllm train` does: masking, and MVM whose teacher pass ends after the visual tokens."""
    return model(**batch["masked"]).loss


def plain(model: STLLM, batch: Batch) -> Tensor:
    """Compute masking and MVM with the causal LM's own forward.

    Student and teacher pass read all positions, compute all logits, and keep the hidden states of all layers.
    """
    whole, student = batch["whole"], batch["masked"]
    visual, kept = visual_tokens(model, whole), student["kept"]
    with torch.no_grad():
        _, teacher_hidden = _full_pass(model, whole, visual.detach())
    loss, student_hidden = _full_pass(model, student, visual[kept])
    return loss + mvm_loss(model.mvm_decoder(student_hidden), teacher_hidden[kept])


def masked(model: STLLM, batch: Batch) -> Tensor:
    """Compute the language loss on the kept tokens, without MVM."""
    student = batch["masked"]
    embeds = model.embed(
        student["input_ids"], student["visual_positions"], visual_tokens(model, student)[student["kept"]]
    )
    hidden = lm.last_hidden_states(model.language_model, embeds, student["attention_mask"])
    return lm.language_loss(model.language_model, hidden, student["labels"], student["label_positions"])[0]


def unmasked(model: STLLM, batch: Batch) -> Tensor:
    """Compute the language loss on all tokens."""
    return model(**batch["whole"]).loss


def packed(model: STLLM, batch: Batch) -> Tensor:
    """Compute the loss of `ours` on packed samples."""
    return model(**batch["masked packed"]).loss


def unmasked_packed(model: STLLM, batch: Batch) -> Tensor:
    """Compute the loss of `unmasked` on packed samples."""
    return model(**batch["whole packed"]).loss


PROCEDURES: Mapping[str, Callable[[STLLM, Batch], Tensor]] = {
    procedure.__name__: procedure for procedure in (ours, plain, masked, unmasked, packed, unmasked_packed)
}


def visual_tokens(model: STLLM, batch: Mapping[str, Tensor]) -> Tensor:
    """Return all visual tokens of the batch, (B*N, D)."""
    return model.video_input(model.projection(batch["query_features"])).flatten(0, 1)


def _full_pass(model: STLLM, batch: Mapping[str, Tensor], visual: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the last hidden states of the visual tokens, (V, D). visual: (V, D)."""
    output = model.language_model(
        inputs_embeds=model.embed(batch["input_ids"], batch["visual_positions"], visual),
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        output_hidden_states=True,
        use_cache=False,
    )
    return output.loss, output.hidden_states[-1].flatten(0, 1)[batch["visual_positions"]]


# ---- measuring ------------------------------------------------------------------------------------------------------


def step(model: STLLM, batch: Batch, procedure: str) -> float:
    """Run a forward and a backward pass and return the loss. Gradients stay allocated between steps."""
    model.zero_grad(set_to_none=False)
    loss = PROCEDURES[procedure](model, batch)
    loss.backward()
    return loss.item()


def assert_same(model: STLLM, batch: Batch, *procedures: str) -> None:
    """Assert that the procedures agree, within `TOLERANCE`, on the loss and on the norm of each gradient."""
    found = []
    for procedure in procedures:
        loss = step(model, batch, procedure)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).item() for gradient in gradients]
        found.append(torch.tensor([loss, *norms]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=TOLERANCE[model.dtype], atol=1e-6)


def step_seconds(model: STLLM, batch: Batch, *procedures: str, repeats: int = 3) -> dict[str, float]:
    """Return the shortest time of a step by each procedure, in seconds. They take turns on the same model and batch."""
    works = {name: lambda name=name: step(model, batch, name) for name in procedures}
    return take_turns(works, repeats=repeats, device=model.device)


def step_bytes(case: Case, model: STLLM, batch: Batch, procedure: str) -> int:
    """Return `measured_bytes`, measured here on a GPU, and in a new process on a CPU.

    In that process each tensor of 64 KiB or more is mapped separately, so freed tensors leave the resident memory at
    once, and its peak is that of the living tensors. This takes time, so time is measured in the usual process.
    """
    if model.device.type == "cuda":
        return measured_bytes(model, batch, procedure)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.steps", json.dumps(asdict(case)), procedure, str(model.device)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.splitlines()[-1])


def measured_bytes(model: STLLM, batch: Batch, procedure: str) -> int:
    """Return the peak memory of a step in bytes, without what is held between steps: weights, gradients and batch."""
    step(model, batch, procedure)  # warm-up: allocates gradients, threads and buffers of libraries
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        step(model, batch, procedure)
        return torch.cuda.max_memory_allocated(model.device) - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    before = resident_bytes("VmRSS")
    step(model, batch, procedure)
    return resident_bytes("VmHWM") - before


if __name__ == "__main__":
    case, device = Case(**json.loads(sys.argv[1])), torch.device(sys.argv[3])
    print(measured_bytes(new_model(case, device), new_batch(case, device), sys.argv[2]))
