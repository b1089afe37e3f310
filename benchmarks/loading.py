"""Loading: peak memory compared with the size of the loaded weights, in the stored type and in other types.

A synthetic checkpoint is written in the released format (float16, one large shard and three small ones) and in our
format. Each case is measured in a new process. The baseline is transformers' `from_pretrained` on our format. Goal: a
ratio of at most 1.15.

    python -m benchmarks.loading [--quick] [--gib 2.2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, report, resident_bytes
from stllm.models.checkpoints.convert import meta_of
from stllm.models.checkpoints.formats import RELEASED
from stllm.models.checkpoints.load import meta_model
from stllm.models.configuration import STLLMConfig

GIB = 2**30
SHARES = (0.6, 0.15, 0.15, 0.1)  # of all weights, for each shard
LAYER_BYTES = 2 * (4 * 2048**2 + 3 * 2048 * 5504)  # float16
VOCABULARY_BYTES = 2 * 2 * 32000 * 2048
CASES = (  # format, library that loads it, type to load
    ("released", "ours", "float16"),
    ("released", "ours", "float32"),
    ("released", "ours", "bfloat16"),
    ("stllm", "ours", "float16"),
    ("stllm", "ours", "float32"),
    ("stllm", "transformers", "float16"),
    ("stllm", "transformers", "float32"),
)


def new_config(size: float) -> STLLMConfig:
    """Return the configuration of a model with tiny vision parts and a LLaMA of about `size` bytes in float16."""
    layers = max(1, round((size - VOCABULARY_BYTES) / LAYER_BYTES))
    return STLLMConfig(
        vision_config={"image_size": 28, "embed_dim": 32, "depth": 4, "num_heads": 4},
        qformer_config={"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64},
        text_config={
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
        },
        qformer_text_input=False,
        template="minigpt4",
    )


def write_released(
    config: STLLMConfig,
    folder: Path,
    shares: Sequence[float] = SHARES,
    new: Callable[[str, torch.Size], torch.Tensor] = lambda key, shape: torch.full(shape, 0.01, dtype=torch.float16),
) -> None:
    """Write a checkpoint in the released format, with only one shard in memory at a time.

    shares: the share of all weights in each shard. new: returns the float16 weight of a key and a shape.
    """
    specs = {
        RELEASED.to_theirs(key): tensor.shape for key, tensor in meta_model(config, torch.float16).state_dict().items()
    }
    total = sum(shape.numel() for shape in specs.values())
    shards: list[list[str]] = [[] for _ in shares]
    number, written = 0, 0
    for key, shape in specs.items():
        if number + 1 < len(shares) and written >= total * sum(shares[: number + 1]):
            number += 1
        shards[number].append(key)
        written += shape.numel()
    filled = [keys for keys in shards if keys]  # in a small model the embeddings are larger than a share
    for number, keys in enumerate(filled, start=1):
        path = folder / f"pytorch_model-{number:05d}-of-{len(filled):05d}.bin"
        torch.save({key: new(key, specs[key]) for key in keys}, path)
    (folder / "config.json").write_text(json.dumps({**config.text_config.to_dict(), "model_type": "st_llm_hf"}))
    (folder / "meta.json").write_text(json.dumps(meta_of(config)))


def measure(folder: str, loader: str, dtype: str) -> dict[str, float]:
    """Load a checkpoint in this process. Returns sizes in bytes and seconds.

    peak: the largest growth of the resident memory. peak_ratio: peak divided by the size of the weights.
    """
    from stllm.models.checkpoints.load import load_model
    from stllm.models.st_llm import STLLM

    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    if loader == "ours":
        model = load_model(folder, device="cpu", dtype=dtype)
    else:
        model = STLLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map={"": "cpu"}, trust_remote_code=False
        )
    spent = time.perf_counter() - start
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    # reads all weights, which may be only mapped; in pieces, because the sum converts a copy to float32
    checksum = sum(piece.sum().item() for tensor in model.parameters() for piece in tensor.flatten().split(1 << 20))
    peak = resident_bytes("VmHWM") - before
    return {"weights": weights, "peak": peak, "peak_ratio": peak / weights, "seconds": spent, "checksum": checksum}


def in_new_process(*words: str) -> dict[str, float]:
    """Run `measure` in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", "--measure", *words], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Write the checkpoints, measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.2, help="size of the float16 weights (default: 2.2)")
    parser.add_argument("--quick", action="store_true", help="0.5 GiB and rough figures")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=3, metavar=("DIR", "LOADER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    size = 0.5 if args.quick else args.gib
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        released, ours = Path(folder) / "released", Path(folder) / "stllm"
        released.mkdir()
        write_released(new_config(size * GIB), released)
        from stllm.models.checkpoints.load import load_model

        load_model(released, device="cpu", dtype="float16").save_pretrained(ours, max_shard_size="5GB")
        for layout, loader, dtype in CASES:
            found = in_new_process(str(released if layout == "released" else ours), loader, dtype)
            rows.append(
                {
                    "layout": f"{layout}, float16",
                    "loaded by": loader,
                    "as": dtype,
                    "weights GiB": found["weights"] / GIB,
                    "peak GiB": found["peak"] / GIB,
                    "peak / weights": found["peak_ratio"],
                    "seconds": found["seconds"],
                }
            )
    shards = [f"{share:.0%}" for share in SHARES]
    report(
        "loading", "transformers' from_pretrained on our format", rows, {"GiB": size, "shards": shards}, args.output_dir
    )
    print(
        json.dumps(
            {"peak_ratio": max(row["peak / weights"] for row in rows if row["loaded by"] == "ours"), "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
