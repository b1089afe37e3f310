"""`STLLMConfig`: all sizes and options of an ST-LLM model, as saved in its `config.json`.

Only builder functions and st_llm.py read it; the parts of the model take plain keyword arguments.
Sizes and names come from the paper (arXiv 2404.00308), section 3. The defaults are those of the published 7B model.
"""

from dataclasses import field
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, InstructBlipQFormerConfig, PretrainedConfig

from stllm.common.errors import UserError
from stllm.common.registry import templates

VISION_DEFAULTS: dict[str, Any] = {
    "encoder": "eva_clip_g",  # a registered vision encoder
    "image_size": 224,
    "patch_size": 14,
    "embed_dim": 1408,
    "depth": 39,
    "num_heads": 16,
    "mlp_ratio": 4.3637,
    "drop_path_rate": 0.0,
    "adapter_depth": 3,  # layers of the temporal adapter, one for each of the encoder's last blocks
    "max_frames": 64,  # entries of the adapter's time embedding
    "ln_eps": 1e-5,  # epsilon of ln_vision; transformers' InstructBLIP checkpoints have 1e-6
}
QFORMER_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30523,  # bert-base-uncased and the added [DEC]
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "cross_attention_frequency": 2,
}
MASK_RATE_DEFAULTS = {"mean": 0.5, "std": 0.1, "min": 0.1, "max": 0.7}
# what transformers raises for values that no model can be built with; `common.errors.reason` turns them into words
CONFIG_ERRORS = (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError)


def _known(kind: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f"{kind} has unknown keys {unknown}: known are {sorted(defaults)}")
    return {**defaults, **given}


class STLLMConfig(PretrainedConfig):
    """Sizes and options of an ST-LLM.

    arch: the registered name of the model class.
    vision_config: the encoder's sizes, see `VISION_DEFAULTS`.
    qformer_config: an `InstructBlipQFormerConfig` or its dictionary; unused if `has_qformer` is False.
    qformer_text_input: the Q-Former reads the question, too.
    text_config: the configuration of the causal language model (any of transformers'), or its dictionary.
    video_input: the registered name of the video input. residual_size, residual_bottleneck: sizes of the input
        `residual`, the number of local frames, and the width of its bottleneck (0: a quarter of the language model's
        width).
    num_frames: frames sampled from a video unless the user sets another number (None: 64 for residual, otherwise 16, as
        published).
    use_mask: visual tokens are dropped in training. mask_rate: mean, std, min and max of the dropped share (paper
        section 3.3). use_mvm: adds the loss of masked video modelling. mvm_decode: for this loss, the hidden states
        pass through a decoder.
    lora: {r, alpha, dropout, target_modules}, or None.
    vit_chunk_size: frames encoded at once (None: depends on the device).
    template, system, max_txt_len, end_sym: the form of the prompts for these weights (processors/templates.py).
    """

    model_type = "stllm"
    sub_configs = {"text_config": AutoConfig, "qformer_config": InstructBlipQFormerConfig}  # noqa: RUF012
    has_no_defaults_at_init = True  # a language model must be named

    arch: str = "st_llm_hf"
    vision_config: dict[str, Any] = field(default_factory=dict)
    qformer_config: Any = None
    text_config: Any = None
    has_qformer: bool = True
    qformer_text_input: bool = True
    num_query_tokens: int = 32
    video_input: str = "all"
    residual_size: int = 16
    residual_bottleneck: int = 0
    num_frames: int | None = None
    use_mask: bool = False
    use_mvm: bool = True
    mvm_decode: bool = False
    mask_rate: dict[str, float] = field(default_factory=dict)
    freeze_vit: bool = True
    freeze_qformer: bool = True
    freeze_llm: bool = False
    lora: dict[str, Any] | None = None
    vit_chunk_size: int | None = None
    template: str = "instructblip"
    system: str | None = None
    max_txt_len: int = 512
    end_sym: str = "###"

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _known("vision_config", self.vision_config or {}, VISION_DEFAULTS)
        self.mask_rate = _known("mask_rate", self.mask_rate or {}, MASK_RATE_DEFAULTS)
        if not isinstance(self.qformer_config, InstructBlipQFormerConfig):
            defaults = {**QFORMER_DEFAULTS, "encoder_hidden_size": self.vision_config["embed_dim"]}
            self.qformer_config = InstructBlipQFormerConfig(**{**defaults, **(self.qformer_config or {})})
        self.text_config = language_model_config(self.text_config)
        image_size, patch_size = self.vision_config["image_size"], self.vision_config["patch_size"]
        if image_size % patch_size:
            raise UserError(f"image_size {image_size} is no multiple of patch_size {patch_size}: choose one that is")
        if not self.has_qformer and self.num_patches % 4:
            raise UserError(
                f"an image of {image_size} pixels has {self.num_patches} patches; without a Q-Former every 4 are "
                "merged: choose an image_size with an even number of patches a side"
            )
        self.qformer_text_input = self.qformer_text_input and self.has_qformer
        self.residual_bottleneck = self.residual_bottleneck or self.text_config.hidden_size // 4
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        counts = ("num_query_tokens", "residual_size", "residual_bottleneck", "num_frames", "vit_chunk_size")
        for name in (*counts, "max_txt_len"):
            if not isinstance(value := getattr(self, name), int) and value is not None:
                raise UserError(
                    f"{name} is {value!r} in the model's configuration, expected a whole number: correct it"
                )

    @property
    def num_patches(self) -> int:
        """The number of patch tokens of one frame, without the class token."""
        return int(self.vision_config["image_size"] // self.vision_config["patch_size"]) ** 2

    @property
    def tokens_per_frame(self) -> int:
        """The number of tokens of one frame: the Q-Former's queries, or a quarter of the patches without a Q-Former."""
        return self.num_query_tokens if self.has_qformer else self.num_patches // 4

    @property
    def adds_pad(self) -> bool:
        """True if the prompt template's family adds `[PAD]` to the tokenizer."""
        return bool(templates.get(self.template).bos_is_eos)


def model_card(config: STLLMConfig, num_parameters: int) -> str:
    """Return the README.md of a saved model: assets/model_card.md, filled in from the configuration."""
    text, vision, rate = config.get_text_config(), config.vision_config, config.mask_rate
    qformer = config.qformer_config
    size = f"{config.num_query_tokens} queries, width {qformer.hidden_size}, {qformer.num_hidden_layers} layers; it "
    masked = f"{rate['min']:g} to {rate['max']:g} of the visual tokens, {rate['mean']:g} in the mean"
    trained = {
        "vision encoder": not config.freeze_vit,
        "Q-Former": config.has_qformer and not config.freeze_qformer,
        "language model": not config.freeze_llm and config.lora is None,
        "LoRA": config.lora is not None,
        "projection and new parts": True,
    }
    return Template((Path(__file__).parents[1] / "assets" / "model_card.md").read_text(encoding="utf-8")).substitute(
        model_type=text.model_type,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        adapted="" if config.lora is None else f", with LoRA of rank {config.lora['r']}",
        encoder=vision["encoder"],
        image_size=vision["image_size"],
        encoder_width=vision["embed_dim"],
        depth=vision["depth"],
        qformer=size + ("reads the question" if config.qformer_text_input else "reads no text")
        if config.has_qformer
        else "none: every 4 patches are merged into a token",
        video_input=config.video_input,
        tokens_per_frame=config.tokens_per_frame,
        frames="" if config.num_frames is None else f"; {config.num_frames} frames of a video by default",
        masking=(masked + (", with MVM" if config.use_mvm else "")) if config.use_mask else "none",
        trained=", ".join(name for name, is_trained in trained.items() if is_trained),
        template=config.template,
        parameters=f"{num_parameters:,}",
    )


def language_model_config(given: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    """Return the language model's configuration from a dictionary with `model_type` (default: llama) and its fields."""
    if isinstance(given, PretrainedConfig):
        return given
    fields = dict(given or {"model_type": "llama"})
    return AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
