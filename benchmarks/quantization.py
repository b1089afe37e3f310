"""Quantization: memory and time of the whole published model (EVA-ViT-g, Q-Former, LLaMA of 7B) in 4 and 8 bits.

Random weights in float16 are written to a folder in the released format (15 GiB). For each number of bits, a new
process runs `stllm chat --quantization BITS` with it: 16 tokens, greedy, about 8 frames of an example clip. All parts
except the language model's linear layers are in bfloat16. Times are CPU seconds. The time of loading includes the
quantization. If the processor multiplies in bfloat16, the time of the prompt includes bitsandbytes' repacking of 4-bit
weights. Memory is the peak of the whole process.

    python -m benchmarks.quantization [--quick] [--layers N] [--bits BITS ...] [--folder DIR]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, exit_code, report, resident_bytes
from benchmarks.loading import write_released
from benchmarks.published_size import GIB, published_config
from stllm.common.errors import UserError
from stllm.common.schema import QUANTIZATIONS

PRECISE = "none"
SHARDS = 10
FRAMES, NEW_TOKENS = 8, 16
PARTS = ("VisionEncoder", "LlamaModel")  # encoding starts at the first call of the one, answering at that of the other
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "qformer_tokenizer")  # the tiny model's
LAYERS, QUICK_LAYERS = 32, 2  # of the language model


def write_model(folder: Path, layers: int) -> None:
    """Write the checkpoint, unless the folder holds it already. Its output head gives only tokens of the tokenizer."""
    from stllm.conversation.chat import FOLDER

    if (folder / "config.json").is_file():
        return
    config = published_config("all")
    config.text_config.num_hidden_layers = layers
    config.qformer_config.vocab_size = 513  # the tiny tokenizer's, with [DEC]
    num_tokens = len(json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()

    def new(key: str, shape: torch.Size) -> Tensor:
        if "norm" in key.lower() and key.endswith("weight"):
            return torch.ones(shape, dtype=torch.float16)
        weight = drawn.repeat(-(-shape.numel() // len(drawn)))[: shape.numel()].view(shape).clone()
        if key == "lm_head.weight":
            weight[num_tokens:] = weight[:3] = 0
        return weight

    folder.mkdir(parents=True, exist_ok=True)
    write_released(config, folder, [1 / SHARDS] * SHARDS, new)
    for name in TOKENIZERS:
        copy = shutil.copytree if (FOLDER / name).is_dir() else shutil.copyfile
        copy(FOLDER / name, folder / name)


def measure(folder: str, bits: str) -> dict[str, Any]:
    """Run `stllm chat` in this process, which prints its answer. Returns CPU seconds and GiB by column."""
    from stllm.cli import main as stllm
    from stllm.conversation.chat import find_examples

    marks: dict[str, list[float]] = {}  # class of a module -> CPU seconds at each of its calls
    peaks: dict[str, int] = {}

    def note(module: torch.nn.Module, _: Any) -> None:
        name = type(module).__name__
        if name in PARTS:
            marks.setdefault(name, []).append(time.process_time())
            peaks.setdefault(name, resident_bytes("VmHWM"))

    torch.nn.modules.module.register_module_forward_pre_hook(note)
    clip, question = find_examples()[0]
    command = ["chat", "--ckpt-path", folder, "--device", "cpu", "--dtype", "bfloat16", "--video", str(clip)]
    command += ["--question", question, "--num-frames", str(FRAMES), "--num-beams", "1", "--json"]
    command += ["--max-new-tokens", str(NEW_TOKENS), *([] if bits == PRECISE else ["--quantization", bits])]
    if code := stllm(command):
        sys.exit(code)
    encoder, steps = (marks[name] for name in PARTS)
    return {
        "load, s": encoder[0],
        "encode, s": steps[0] - encoder[0],
        "prompt, s": steps[1] - steps[0],
        "a token, s": (steps[-1] - steps[1]) / (len(steps) - 2),
        "loaded, GiB": peaks[PARTS[0]] / GIB,
        "peak, GiB": resident_bytes("VmHWM") / GIB,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write the model, measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N", help="language model's layers (default: 32)")
    parser.add_argument("--quick", action="store_true", help="two layers and rough figures")
    choices = (*QUANTIZATIONS, PRECISE)
    parser.add_argument("--bits", nargs="+", choices=choices, default=QUANTIZATIONS, help="(default: 4bit 8bit)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder of the model, which is kept (default: a temporary folder)"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "BITS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    layers = QUICK_LAYERS if args.quick else args.layers
    rows: list[dict[str, Any]] = []
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), layers)
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.bin"))
        for bits in args.bits:
            command = [sys.executable, "-m", "benchmarks.quantization", "--measure", str(folder), bits]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"{bits} could not be measured (exit code {done.returncode}): see above")
            line, last = done.stdout.splitlines()[-2:]
            print(f"{bits}: {line}", file=sys.stderr)
            found = json.loads(last)
            rows.append({"": bits, **found, "peak / float16 weights": found["peak, GiB"] * GIB / stored})
    sizes = {
        "layers": layers,
        "float16 GiB": round(stored / GIB, 2),
        "frames": FRAMES,
        "visual tokens": json.loads(line)["visual_tokens"],
        "new tokens": NEW_TOKENS,
    }
    report("quantization", "the size of the weights in float16", rows, sizes, args.output_dir)


if __name__ == "__main__":
    sys.exit(exit_code(main))
