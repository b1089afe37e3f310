"""Quantizes the language model's linear layers to 4 or 8 bits with bitsandbytes, on CUDA and on CPUs.

All other parts keep their precision. The layers are replaced on the meta device, and each weight is quantized when it
is read, so memory never holds the whole language model in full precision. In training the quantized weights are frozen;
LoRA and the other parts are trained (QLoRA). A quantized model is saved with its original weights.
Sources: LLM.int8() (arXiv 2208.07339), QLoRA (arXiv 2305.14314).
"""

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from stllm.common.errors import UserError, unknown_name
from stllm.common.schema import QUANTIZATIONS

KEPT_PRECISE = (
    *("vision_encoder", "qformer", "projection", "video_input", "mvm_decoder", "lm_head", "embed_out"),
    r".*\.lora_[AB]",
)
PACKED = 64  # layer sizes must be multiples of this for bitsandbytes' repacked 4-bit weights on CPUs
PIECE = 1 << 18  # numbers quantized at a time: a megabyte in float32


def quantization_config(name: str, dtype: torch.dtype, device: torch.device | None = None) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings for the language model's linear layers except its output head.

    name: 4bit or 8bit. dtype: the type that is computed in. device: where the model will run; None: not checked.
    Raises UserError for another name or device, and if bitsandbytes is not installed.
    """
    if name not in QUANTIZATIONS:
        raise UserError(unknown_name("quantization", name, QUANTIZATIONS))
    if device is not None and device.type not in ("cuda", "cpu"):
        raise UserError(f"{name} loading works on CUDA GPUs and on CPUs, not on {device}: use --device cpu")
    try:
        import bitsandbytes  # noqa: F401  # checks that it is installed
    except ImportError as error:
        advice = "`pip install 'stllm[quantization]'`, or load in bfloat16 (--dtype bfloat16)"
        raise UserError(f"{name} loading needs bitsandbytes: {advice}") from error
    # LLM.int8() multiplies in float16 by definition; bitsandbytes would warn about it at every layer
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_news)
    return BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(KEPT_PRECISE),
    )


def _is_no_news(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def quantize_layers(model: PreTrainedModel, config: BitsAndBytesConfig, *, training: bool) -> None:
    """Replace the language model's linear layers by bitsandbytes' layers, in place, on the meta device.

    Their weights are added later, by `quantized_weight`. training: gradients will pass through the layers.
    Raises UserError if transformers does not accept the installed bitsandbytes.
    """
    biases = {name: bias for name, bias in model.named_parameters() if name.endswith(".bias")}
    head = model.get_output_embeddings()
    names = [re.escape(name) for name, module in model.named_modules() if module is head]
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or ()), *names]
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    try:
        quantizer.validate_environment()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"quantized loading is not possible here: {error}") from error
    quantizer.preprocess_model(model, device_map=None)
    for name, layer in quantized_layers(model).items():
        if layer.bias is not None:
            layer.bias = nn.Parameter(biases[f"{name}.bias"].data, requires_grad=False)
        # On CPUs bitsandbytes repacks 4-bit weights for inference. Repacked weights give no gradients, and their sizes
        # must be multiples of PACKED.
        if training or layer.in_features % PACKED or layer.out_features % PACKED:
            layer.support_avx512bf16_for_cpu = False
    quantizer.remove_quantization_config(model)  # the model is saved with its original weights


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the quantized layers of a model by name; empty if nothing is quantized."""
    names = ("Linear4bit", "Linear8bitLt")  # compared by name, because bitsandbytes may not be installed
    return {name: module for name, module in model.named_modules() if type(module).__name__ in names}


def quantized_weight(layer: Any, weight: Tensor, device: torch.device) -> nn.Parameter:
    """Return the quantized parameter of a `layer` made by `quantize_layers`, on the device.

    weight: in main memory, in the layout of the layer that was replaced.
    """
    weight = weight.T if issubclass(layer.source_cls, Conv1D) else weight
    settings = {**vars(layer.weight), "requires_grad": False}
    kind: Any = type(layer.weight)
    if device.type == "cpu" and settings.get("quant_type") == "nf4" and weight.numel() % settings["blocksize"] == 0:
        weight, state = quantize_nf4(weight, settings["blocksize"])
        layer.quant_state = state
        settings |= {"quant_state": state, "bnb_quantized": True}
    parameter: nn.Parameter = kind(weight, **settings).to(device)
    return parameter


def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Any]:
    """Quantize a weight on a CPU as bitsandbytes does, but in 0.3 of its time.

    bitsandbytes makes several float32 copies of the weight, and searches for each number between 15 bounds. Here small
    pieces stay in the cache, and the bounds below a number are counted. blocksize: how many numbers share a scale; it
    must divide the number of weights. Returns the packed bytes (two numbers a byte) and bitsandbytes' QuantState.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type

    levels = get_4bit_type("nf4", device="cpu")  # ascending
    bounds = ((levels[1:] + levels[:-1]) / 2).tolist()
    packed: list[Tensor] = []
    scales: list[Tensor] = []
    for piece in weight.flatten().split(PIECE):
        blocks = piece.float().view(-1, blocksize)
        scales.append(blocks.abs().amax(dim=1))
        blocks = blocks * (1 / scales[-1].clamp(min=1e-38))[:, None]
        codes = torch.zeros(blocks.shape, dtype=torch.uint8)
        for bound in bounds:
            codes += blocks > bound
        first, second = codes.view(-1, 2).unbind(dim=1)
        packed.append(first << 4 | second)
    state = QuantState(
        absmax=torch.cat(scales),
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=blocksize,
        code=levels,
        quant_type="nf4",
    )
    return torch.cat(packed)[:, None], state


def precise_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state dict without the weights and scales of quantized layers, but with their biases."""
    layers = tuple(f"{name}." for name in quantized_layers(model))
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if not key.startswith(layers) or key.endswith(".bias")}
