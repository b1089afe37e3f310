"""Beams: CPU seconds of generation with 1 and 5 beams, ours against transformers' `generate` on the same prompts.

The model is a random LLaMA of about 135 million parameters in float32. A prompt has 578 tokens: 512 visual tokens (16
local frames of 32 tokens, from a video of 64 frames) and a question of 66 tokens. An answer has 40 tokens. The prompts
of a batch have different lengths.

    python -m benchmarks.beams [--quick]
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import arguments, now, report
from stllm.common.device import resolve_device
from stllm.models.generation import generate

PROMPT, NEW_TOKENS = 578, 40
CASES = ((1, 1), (1, 5), (4, 5))  # prompts, beams
WIDTH, LAYERS, QUICK_LAYERS = 768, 12, 4


def new_model(layers: int, device: torch.device) -> Any:
    """Return a LLaMA with random weights, which are scaled up so that the beams differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12, vocab_size=32_000
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def new_prompts(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the embeddings of `count` prompts, (B, S, D), padded on the left, and their attention mask, (B, S).

    Each prompt is 20 tokens shorter than the one before.
    """
    embeds = torch.randn(count, PROMPT, WIDTH, generator=torch.Generator().manual_seed(1)) / 20
    starts = 20 * torch.arange(count)
    mask = (torch.arange(PROMPT) >= starts[:, None]).long()
    return embeds.to(device), mask.to(device)


@torch.inference_mode()
def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "")
    device = resolve_device(args.device)
    model = new_model(QUICK_LAYERS if args.quick else LAYERS, device)
    rows: list[dict[str, Any]] = []
    for count, beams in CASES[:2] if args.quick else CASES:
        embeds, mask = new_prompts(count, device)
        options: dict[str, Any] = {"num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options |= {"max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.0}
        works = {
            "plain": lambda: model.generate(inputs_embeds=embeds, attention_mask=mask, **options),  # noqa: B023
            "ours": lambda: generate(model, embeds, mask, **options),  # noqa: B023
        }
        spent: dict[str, list[float]] = {name: [] for name in works}
        ids = {}
        for _ in range(2):
            for name, work in works.items():
                start = now(device)
                ids[name] = work()
                spent[name].append(now(device) - start)
        plain, ours = (min(spent[name]) for name in works)
        equal = sum(torch.equal(a, b) for a, b in zip(ids["plain"], ids["ours"], strict=True))
        row: dict[str, Any] = {"prompts": str(count), "beams": str(beams), "plain, s": plain, "ours, s": ours}
        rows.append(row | {"speed-up": plain / ours, "equal ids": f"{equal}/{count}"})
    millions = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    sizes: dict[str, Any] = {
        "repeats (fastest counts)": 2,
        "millions of parameters": millions,
        "prompt tokens": PROMPT,
        "new tokens": NEW_TOKENS,
    }
    report("beams", "transformers' generate on the same prompts", rows, sizes, args.output_dir, device=device)


if __name__ == "__main__":
    main()
