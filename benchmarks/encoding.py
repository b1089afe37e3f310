"""Encoding: EVA-ViT-g at its published size on 8 frames, ours against one frame at a time with eager attention.

The result also compares the speed with the peak of the machine, which is measured in the same run: the matrix products
of the encoder's linear layers, with nothing between them. Below the table are the operators that take most of the time
in bfloat16, with their shares of it.

    python -m benchmarks.encoding [--quick]
"""

from functools import partial

import torch
from timm.models.eva import EvaAttention
from torch import Tensor
from torch.profiler import profile

from benchmarks.common import arguments, report, seconds
from stllm.common.device import resolve_device
from stllm.common.registry import vision_encoders
from stllm.models.configuration import VISION_DEFAULTS
from stllm.models.st_llm import initialize_parts
from stllm.models.vision import VisionEncoder

NUM_FRAMES = 8
NUM_OPERATORS = 6  # that are named
IN_WORDS = {  # torch's name of an operator -> what it does in the encoder
    "aten::addmm": "linear layers",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention without its linear layers",
    "aten::_scaled_dot_product_flash_attention": "attention without its linear layers",
    "aten::_scaled_dot_product_efficient_attention": "attention without its linear layers",
    "aten::_scaled_dot_product_cudnn_attention": "attention without its linear layers",
    "aten::copy_": "copies and conversions of tensors",
    "aten::gelu": "GELU",
    "aten::add": "additions",
    "aten::native_layer_norm": "layer norm",
}


def build(sizes: dict, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    """Return the encoder with random weights. sizes: as `VISION_DEFAULTS`."""
    torch.manual_seed(0)
    with device:
        encoder = vision_encoders.get("eva_clip_g")(vision=sizes, chunk_size=16)
    initialize_parts(encoder)
    return encoder.eval().to(dtype)


def products(sizes: dict, rows: int) -> list[tuple[int, int, int, int]]:
    """Return (count, rows, inner, columns) of the matrix products of all linear layers. rows: the number of tokens."""
    width, depth = sizes["embed_dim"], sizes["depth"]
    hidden = int(width * sizes["mlp_ratio"])
    shapes = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    return [(depth, rows, inner, columns) for inner, columns in shapes]


def matmul_peak(
    shapes: list[tuple[int, int, int, int]], device: torch.device, dtype: torch.dtype, repeats: int = 5
) -> float:
    """Return the FLOP/s of matrix products computed one after another. shapes: result of `products`."""
    flops = time = 0.0
    for count, rows, inner, columns in shapes:
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        layer = torch.nn.Linear(inner, columns, device=device, dtype=dtype)
        # on a GPU all products of a shape are timed together, because waiting for each takes longer than the product
        calls = 1 if device.type == "cpu" else count
        time += count / calls * seconds(partial(_repeat, layer, x, calls), repeats=repeats, device=device)
        flops += count * 2 * rows * inner * columns
    return flops / time


def _repeat(layer: torch.nn.Linear, x: Tensor, calls: int) -> None:
    for _ in range(calls):
        layer(x)


def attention_flops(sizes: dict, frames: int, tokens: int) -> float:
    """Return the FLOP of all attention blocks, apart from their linear layers.

    tokens: number of tokens of each frame.
    """
    return 4.0 * frames * sizes["depth"] * tokens * tokens * sizes["embed_dim"]


def operators(encoder: VisionEncoder, video: Tensor) -> dict[str, float]:
    """Return each slow operator's share of the time, without the time of the operators that it calls.

    The keys name the operator in words, with torch's name in brackets.
    """
    with profile() as run:
        encoder(video)
    kind = "self_cpu_time_total" if video.device.type == "cpu" else "self_device_time_total"
    times = {event.key: float(getattr(event, kind)) for event in run.key_averages()}
    most = sorted(times, key=times.__getitem__, reverse=True)[:NUM_OPERATORS]
    words = {name: f"{IN_WORDS[name]} ({name})" if name in IN_WORDS else name for name in most}
    return {words[name]: round(times[name] / sum(times.values()), 3) for name in most}


def eager_one_by_one(encoder: VisionEncoder, video: Tensor) -> Tensor:
    """Encode a video as the baseline does: one frame at a time, with explicit softmax attention."""
    for module in encoder.backbone.modules():
        if isinstance(module, EvaAttention):
            module.fused_attn = False  # type: ignore[misc]  # timm chooses it for the whole process
    encoder.chunk_size = 1
    return encoder(video)


@torch.inference_mode()
def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "")
    device = resolve_device(args.device)
    # --quick uses one block and few repeats, because bfloat16 is slow on processors without support for it
    sizes = {**VISION_DEFAULTS, **({"depth": 1} if args.quick else {})}
    repeats = 2 if args.quick else 5
    tokens = (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1
    shapes = products(sizes, NUM_FRAMES * tokens)
    flops = sum(c * 2 * r * i * o for c, r, i, o in shapes) + attention_flops(sizes, NUM_FRAMES, tokens)
    video = torch.randn(1, NUM_FRAMES, 3, sizes["image_size"], sizes["image_size"], device=device)

    encoder = build(sizes, device, torch.float32)
    baseline = seconds(lambda: eager_one_by_one(encoder, video), repeats=3, device=device)
    rows = [_row("eager, float32, frame by frame", baseline, baseline, flops, None)]
    for dtype in (torch.float32, torch.bfloat16):
        encoder = build(sizes, device, dtype)
        pixels = video.to(dtype)
        peak = matmul_peak(shapes, device, dtype, repeats)  # measured before and after, as the machine may be busy
        time = seconds(partial(encoder, pixels), repeats=repeats, device=device)
        peak = max(peak, matmul_peak(shapes, device, dtype, repeats))
        name = f"ours, {str(dtype).removeprefix('torch.')}"
        rows.append(_row(name, time, baseline, flops, peak))
    measured = {key: sizes[key] for key in ("embed_dim", "depth", "num_heads", "image_size")}
    report(
        "encoding",
        "eager softmax attention in float32, one frame at a time",
        rows,
        {"frames": NUM_FRAMES, **measured},
        args.output_dir,
        operators(encoder, pixels),
        device=device,
    )


def _row(name: str, time: float, baseline: float, flops: float, peak: float | None) -> dict:
    return {
        "": name,
        "seconds": time,
        "speed-up": baseline / time,
        "GFLOP/s": flops / time / 1e9,
        "matmul peak GFLOP/s": "-" if peak is None else peak / 1e9,
        "share of peak": "-" if peak is None else flops / time / peak,
    }


if __name__ == "__main__":
    main()
