"""Engine: compares answers from an inference engine (vLLM) with those of this package, and measures the speed of both.

Questions about the example clips are encoded once, here. The answers are then decoded here, one at a time and in
batches, and by the engine with 1, 8 and 32 requests in flight. Decoding is greedy, so in float32 the token ids must be
the same everywhere; otherwise the exit code is 1. With VLLM_SERVER_DEV_MODE=1 the engine also reports its torch
version.

    stllm convert stllm/assets/stllm-tiny --to lm --format language-model
    VLLM_SERVER_DEV_MODE=1 vllm serve lm --enable-prompt-embeds --dtype float32 --port 8001
    python -m benchmarks.engine --engine http://127.0.0.1:8001 [--ckpt-path DIR] [--dtype TYPE] [--quick]

The result is named engine, or engine_NAME for a checkpoint folder NAME. engine_smollm2 is an ST-LLM whose language
model is SmolLM2-135M with LoRA, with a small vision part. These commands train it for 20 steps from a folder
./SmolLM2-135M:

    stllm toy --output toy_world
    stllm train --cfg-path configs/tiny/train_lora.yaml --options model.llama_model=SmolLM2-135M run.max_steps=20 \
        run.per_device_train_batch_size=2 run.warmup_steps=2 run.output_dir=smollm2
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import RESULTS, exit_code, report
from stllm.common.errors import UserError
from stllm.conversation.chat import FOLDER, find_examples, load_chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.remote import RemoteLanguageModel
from stllm.conversation.requests import Media, Request
from stllm.processors.templates import Turn

TOGETHER = (1, 8, 32)  # questions in a batch here, requests in flight with the engine


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, metavar="URL", help="address of the engine")
    parser.add_argument(
        "--ckpt-path", default=str(FOLDER), metavar="DIR", help="the checkpoint (default: the tiny model)"
    )
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="also the engine's (default: float32)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="tokens of an answer (default: 40)")
    parser.add_argument("--quick", action="store_true", help="8 questions, one about each clip, instead of 64")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result and write it. Raises UserError if token ids differ in float32."""
    args = arguments(argv)
    chat = load_chat(args.ckpt_path, device=args.device, dtype=args.dtype)
    decoding = Decoding(num_beams=1, max_new_tokens=args.max_new_tokens)
    clips = find_examples()
    asked = clips if args.quick else [(path, question) for path, _ in clips for _, question in clips]
    prepared = [chat.prepare(Request((Turn(question),), Media(str(path))), decoding) for path, question in asked]
    prepared.sort(key=lambda one: one.length)  # as in an evaluation, to reduce padding
    embeds, stopping = [chat.embeds(one) for one in prepared], chat.processor.stopping()
    rows: list[dict[str, Any]] = []
    ids: list[list[list[int]]] = []

    def measure(name: str, answer: Callable[[int], list[list[int]]]) -> None:
        answer(1)  # warm-up
        start = time.perf_counter()
        found = answer(len(prepared))
        spent = time.perf_counter() - start
        ids.append([unpadded(one, stopping["pad_token_id"]) for one in found])
        equal = sum(one == other for one, other in zip(ids[0], ids[-1], strict=True))
        first = rows[0]["seconds"] if rows else spent
        row = {"": name, "seconds": spent, "answers/s": len(prepared) / spent, "speed-up": first / spent}
        rows.append({**row, "equal ids": f"{equal}/{len(prepared)}"})

    def here(batch_size: int, count: int) -> list[list[int]]:
        batches = (prepared[first : first + batch_size] for first in range(0, count, batch_size))
        return [row.tolist() for batch in batches for row in chat._generate(batch, decoding)]

    with ExitStack() as stack:
        remotes = [RemoteLanguageModel(args.engine, max_in_flight=in_flight) for in_flight in TOGETHER]
        for remote in remotes:
            stack.callback(remote.close)
            remote.find_model()
        remotes[0].compare(chat.model.get_input_embeddings())
        for batch_size in TOGETHER:
            measure(f"here, {batch_size} in a batch" if rows else "here, one at a time", partial(here, batch_size))
        for remote in remotes:
            measure(
                f"the engine, {remote.max_in_flight} in flight",
                lambda count: remote.complete(embeds[:count], decoding, stopping),  # noqa: B023  (called at once)
            )
    sizes = {
        "checkpoint": Path(args.ckpt_path).name,
        "questions": len(prepared),
        "new tokens": args.max_new_tokens,
        "type": args.dtype,
        "prompt tokens": max(len(one) for one in embeds),
    }
    baseline = "the same prompts decoded here by transformers, one at a time; reading and encoding are not counted"
    own = Path(args.ckpt_path).resolve() != FOLDER.resolve()
    name = f"engine_{Path(args.ckpt_path).name}" if own else "engine"
    also = {"engine": versions(args.engine), "load average of the machine": round(os.getloadavg()[1], 1)}
    report(name, baseline, rows, sizes, args.output_dir, also, device=chat.model.device)
    if args.dtype == "float32" and any(found != ids[0] for found in ids[len(TOGETHER) :]):
        raise UserError("the engine gives other ids than transformers here: serve the same language model in float32")


def versions(url: str) -> dict[str, str]:
    """Return the versions of the engine and of its torch, "unknown" if it does not report them."""
    address = url.rstrip("/").removesuffix("/v1")
    found = {"vLLM": "unknown", "torch": "unknown"}
    with suppress(httpx.HTTPError):  # another server, or not in vLLM's development mode
        found["vLLM"] = httpx.get(f"{address}/version").raise_for_status().json()["version"]
        about = httpx.get(f"{address}/server_info", timeout=120).raise_for_status().json()
        found["torch"] = about["system_env"]["torch_version"]
    return found


def unpadded(ids: list[int], pad: int) -> list[int]:
    """Return the ids of an answer without the padding at their end."""
    return list(reversed(list(dropwhile(lambda one: one == pad, reversed(ids)))))


if __name__ == "__main__":
    sys.exit(exit_code(main))
