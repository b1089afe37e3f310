"""A check of a real engine: `--engine` must give the ids that the language model gives here, and how fast it is.

Questions about the example clips are encoded once, here; then transformers decodes them one at a time, and the engine
with 1, 8 and 32 requests in flight. Greedy, so in float32 all ids must be equal; otherwise the exit code is 1.

    stllm convert stllm/assets/stllm-tiny --to lm --format language-model
    vllm serve lm --enable-prompt-embeds --dtype float32 --port 8001
    python -m benchmarks.engine --engine http://127.0.0.1:8001 [--ckpt-path DIR] [--dtype TYPE] [--quick]
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, exit_code, report
from stllm.common.errors import UserError
from stllm.conversation.chat import FOLDER, find_examples, load_chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.remote import RemoteLanguageModel
from stllm.conversation.requests import Media, Request
from stllm.processors.templates import Turn

IN_FLIGHT = (1, 8, 32)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, metavar="URL", help="its address")
    parser.add_argument(
        "--ckpt-path", default=str(FOLDER), metavar="DIR", help="the checkpoint (default: the tiny model)"
    )
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="here; the engine's must be the same")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="of an answer (default: 40)")
    parser.add_argument("--quick", action="store_true", help="8 questions, one about each clip, instead of 64")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the JSON goes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write. Raises UserError when ids differ in float32."""
    args = arguments(argv)
    chat = load_chat(args.ckpt_path, device=args.device, dtype=args.dtype)
    decoding = Decoding(num_beams=1, max_new_tokens=args.max_new_tokens)
    clips = find_examples()
    asked = clips if args.quick else [(path, question) for path, _ in clips for _, question in clips]
    prepared = [chat.prepare(Request((Turn(question),), Media(str(path))), decoding) for path, question in asked]
    embeds, stopping = [chat.embeds(one) for one in prepared], chat.processor.stopping()
    rows: list[dict[str, Any]] = []
    ids: list[list[list[int]]] = []

    def measure(name: str, answer: Callable[[int], list[list[int]]]) -> None:
        answer(1)  # warm-up
        start = time.perf_counter()
        ids.append(answer(len(prepared)))
        spent = time.perf_counter() - start
        equal = sum(one == other for one, other in zip(ids[0], ids[-1], strict=True))
        first = rows[0]["seconds"] if rows else spent
        row = {"": name, "seconds": spent, "answers/s": len(prepared) / spent, "speed-up": first / spent}
        rows.append({**row, "equal ids": f"{equal}/{len(prepared)}"})

    measure(
        "here, one at a time", lambda count: [chat._generate([one], decoding)[0].tolist() for one in prepared[:count]]
    )
    for in_flight in IN_FLIGHT:
        remote = RemoteLanguageModel(args.engine, max_in_flight=in_flight)
        try:
            remote.find_model()
            remote.compare(chat.model.get_input_embeddings())
            measure(
                f"the engine, {in_flight} in flight",
                lambda count: remote.complete(embeds[:count], decoding, stopping),  # noqa: B023  (called at once)
            )
        finally:
            remote.close()
    sizes = {
        "checkpoint": Path(args.ckpt_path).name,
        "questions": len(prepared),
        "new tokens": args.max_new_tokens,
        "type": args.dtype,
        "prompt tokens": max(len(one) for one in embeds),
    }
    baseline = "the same prompts decoded here by transformers, one at a time; reading and encoding are not counted"
    report("engine", baseline, rows, sizes, args.output_dir, also={"engine": remote.server}, device=chat.model.device)
    if args.dtype == "float32" and any(found != ids[0] for found in ids[1:]):
        raise UserError("the engine gives other ids than transformers here: serve the same language model in float32")


if __name__ == "__main__":
    sys.exit(exit_code(main))
