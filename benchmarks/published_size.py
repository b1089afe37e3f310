"""Published size: the whole model (EVA-ViT-g, Q-Former, LLaMA of 7B) with random weights in bfloat16 on a GPU.

Answering: the seconds to encode the prepared frames, the seconds from them to the first token, and the tokens a second
after it, with greedy decoding. Training: a forward and backward pass with gradient checkpointing, frozen encoder and
Q-Former, MVM, and half of the visual tokens dropped, compared with a pass on all tokens. Memory is the allocator's
peak, including the weights.

    python -m benchmarks.published_size [--quick]    # --quick: only the first row
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, cuda_device, exit_code, report, resident_bytes, seconds, take_turns
from benchmarks.steps import MASK_RATE, PUBLISHED, Batch, Case, checkpoint, draw_model, new_batch
from stllm.models.configuration import STLLMConfig
from stllm.models.st_llm import STLLM

ROWS = ((16, "all"), (64, "residual"))  # frames, video input; residual passes 16 frames on to the language model
NEW_TOKENS = 32
GIB = 2**30


def published_config(video_input: str) -> STLLMConfig:
    """Return the configuration of the published 7B model of the InstructBLIP family."""
    text = {"model_type": "llama", "vocab_size": PUBLISHED["vocab_size"], "max_position_embeddings": 4096}
    return STLLMConfig(text_config=text, video_input=video_input, mvm_decode=True)


def measured(config: STLLMConfig, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return a row of the table."""
    model = draw_model(config, device, dtype)
    size = config.vision_config["image_size"]
    pixels = torch.randn(1, frames, 3, size, size, generator=torch.Generator().manual_seed(0))
    num_tokens = model.video_input.num_tokens(frames, config.tokens_per_frame)
    case = Case(vocabulary=config.text_config.vocab_size, frames=num_tokens // config.tokens_per_frame)
    batch = new_batch(case, device)
    question = batch["whole"]["input_ids"][:, -16:] % config.qformer_config.vocab_size
    for prompts in batch.values():
        del prompts["query_features"]
        prompts |= {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    row = {"frames": frames, "video input": config.video_input, "visual tokens": num_tokens}
    return row | answering(model, pixels, batch) | training(model, pixels, batch)


@torch.inference_mode()
def answering(model: STLLM, pixels: Tensor, batch: Batch) -> dict[str, float]:
    """Return the columns about answering. pixels: (1, T, 3, H, W), in main memory."""
    whole = batch["whole"]
    prompt = {name: whole[name] for name in ("input_ids", "attention_mask", "visual_positions")}
    question = {name: whole[name] for name in ("qformer_input_ids", "qformer_attention_mask")}

    def encode() -> Tensor:
        encoded = model.encode_video(pixels.to(model.device))
        return model.video_input(model.frame_tokens(encoded, **question))[0]  # (N, D)

    def generate(visual: Tensor, num_tokens: int) -> None:
        exactly: dict[str, Any] = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        ids = model.generate(**prompt, visual_tokens=visual, do_sample=False, pad_token_id=0, **exactly)
        assert ids.shape == (1, num_tokens)

    visual = encode()
    works = {count: partial(generate, visual, count) for count in (1, NEW_TOKENS)}
    peak = peak_bytes(lambda: generate(encode(), NEW_TOKENS), model.device)
    first, all_tokens = (seconds(work, repeats=3, device=model.device) for work in works.values())
    return {
        "encode, s": seconds(encode, repeats=3, device=model.device),
        "first token, s": first,
        "tokens/s after": (NEW_TOKENS - 1) / (all_tokens - first),
        "answering, GiB": peak / GIB,
    }


def training(model: STLLM, pixels: Tensor, batch: Batch) -> dict[str, float]:
    """Return the columns about training. pixels: (1, T, 3, H, W), in main memory."""
    model.train()
    checkpoint(model)

    def step(**prompts: Any) -> None:
        model.zero_grad(set_to_none=False)
        model(pixel_values=pixels.to(model.device), **prompts).loss.backward()

    steps = {"unmasked": partial(step, **batch["whole"]), "masked with MVM": partial(step, **batch["masked"])}
    time = take_turns(steps, device=model.device)
    peaks = {name: peak_bytes(work, model.device) for name, work in steps.items()}
    return {
        "unmasked step, s": time["unmasked"],
        "masked with MVM, time": time["masked with MVM"] / time["unmasked"],
        "unmasked step, GiB": peaks["unmasked"] / GIB,
        "masked with MVM, GiB": peaks["masked with MVM"] / GIB,
    }


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return the peak memory of `work` on a GPU in bytes; on a CPU, the peak of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "")
    device = cuda_device(args.device)
    rows = [
        measured(published_config(video_input), frames, device, torch.bfloat16)
        for frames, video_input in (ROWS[:1] if args.quick else ROWS)
    ]
    sizes = {"new tokens": NEW_TOKENS, "text tokens": Case.text_tokens, "dropped": MASK_RATE, "dtype": "bfloat16"}
    baseline = "for the step's ratio, the same step on all visual tokens"
    report("published_size", baseline, rows, sizes, args.output_dir, device=device)


if __name__ == "__main__":
    sys.exit(exit_code(main))
