"""The ST-LLM model: video -> vision -> qformer -> projection -> video_inputs -> masking -> language model.

Source: "ST-LLM: Large Language Models Are Effective Temporal Learners", arXiv 2404.00308, section 3.
Letters in shapes: B clips, T frames, P patches, C encoder width, Q Q-Former width, K tokens a frame, D language-model
width, N visual tokens of a clip, V visual tokens of the batch, L positions of the Q-Former's text, S positions of a
prompt including its visual tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from stllm.common.errors import UserError
from stllm.common.registry import models
from stllm.models import language_model as lm
from stllm.models.configuration import STLLMConfig, model_card
from stllm.models.generation import Prefix, generate
from stllm.models.masking import MVMDecoder, mvm_loss
from stllm.models.qformer import FrameQFormer, PatchMerger
from stllm.models.temporal_adapter import TemporalAdapter, TemporalLayer
from stllm.models.video_inputs import ResidualInput, build_video_input
from stllm.models.vision import build_vision_encoder, sine_cosine_positions

INIT_STD = 0.02


@dataclass
class STLLMOutput(ModelOutput):
    """The losses and logits of one forward pass.

    loss: the sum of loss_lm and loss_mvm; all three are scalars. logits: (labelled tokens, vocabulary) with labels,
    (B, S, vocabulary) without; None with Liger's fused loss. kept_visual_tokens: the number of visual tokens of one
    clip that entered the language model after masking.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_lm: Tensor | None = None
    loss_mvm: Tensor | None = None
    kept_visual_tokens: int | None = None


@models.register("st_llm_hf", "st_llm")
class STLLM(PreTrainedModel):
    """The whole model. It inherits saving, loading, sharding, device maps and quantisation from transformers."""

    config_class = STLLMConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["EvaBlock", "SpatialLayer", "TemporalLayer", "InstructBlipQFormerLayer"]  # noqa: RUF012

    precise_weights: Mapping[str, Any] = {}  # key of a quantized layer's weight -> its original (source, entry)

    def __init__(self, config: STLLMConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_encoder = build_vision_encoder(config)
        self.qformer: nn.Module = PatchMerger()
        frame_width = 4 * config.vision_config["embed_dim"]
        if config.has_qformer:
            frame_width = config.qformer_config.hidden_size
            self.qformer = FrameQFormer(
                config=config.qformer_config,
                num_query_tokens=config.num_query_tokens,
                text_input=config.qformer_text_input,
            )
        self.projection = nn.Linear(frame_width, width)
        self.video_input: Any = build_video_input(config)
        self.mvm_decoder = MVMDecoder(width) if config.mvm_decode else nn.Identity()
        self.language_model: Any = lm.build_language_model(config.text_config, lora=config.lora)
        self.post_init()  # adds the children's _no_split_modules to this model's
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules or ()))  # FSDP refuses others
        for part in self.frozen_parts():
            part.requires_grad_(False)
        if config.lora is not None:
            for name, parameter in self.language_model.named_parameters():
                parameter.requires_grad_("lora_" in name)

    # ---- from a video to a loss or an answer --------------------------------------------------------------------

    def encode_video(self, pixel_values: Tensor) -> Tensor:
        """Encode videos as far as that does not depend on the question, so that all questions can reuse the result.

        pixel_values: (B, T, 3, H, W), bytes or normalised. Returns the encoder's features (B, T, 1+P, C) when the
        Q-Former reads text, otherwise the frame tokens (B, T, K, D).
        """
        features = self.vision_features(pixel_values)
        return features if self.config.qformer_text_input else self.projection(self.qformer(features))

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """Return the encoder's features, (B, T, 1+P, C). pixel_values: (B, T, 3, H, W), bytes or normalised."""
        return self.vision_encoder(pixel_values)

    def frame_tokens(
        self, encoded: Tensor, qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the frames' tokens in the language model's width, (B, T, K, D).

        encoded: the result of `encode_video`. qformer_input_ids, qformer_attention_mask: (B, L), the question; used
        only by a Q-Former that reads text.
        """
        if not self.config.qformer_text_input:
            return encoded
        return self.projection(self._query_features(encoded, qformer_input_ids, qformer_attention_mask))

    def embed(self, input_ids: Tensor, visual_positions: Tensor, visual_tokens: Tensor | None = None) -> Tensor:
        """Embed prompts and put the visual tokens in their places. Returns (B, S, D).

        input_ids: (B, S), see `processors.sequences.pad_sequences`. visual_tokens: (V, D), in the order of the rows.
        visual_positions: (V,), the position of each visual token, counted over the flattened B*S positions.
        """
        embeds = self.get_input_embeddings()(input_ids.clamp(min=0))  # the placeholder's id is negative
        if visual_tokens is None:
            return embeds
        return embeds.flatten(0, 1).index_copy(0, visual_positions, visual_tokens.to(embeds)).view_as(embeds)

    def forward(
        self,
        *,
        input_ids: Tensor,
        visual_positions: Tensor,
        attention_mask: Tensor | None = None,
        packed: Mapping[str, Any] | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        query_features: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        kept: Tensor | None = None,
        teacher: Mapping[str, Any] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> STLLMOutput:
        """Run one training or scoring pass. It never copies a value from the device to the CPU, so a GPU never waits.

        input_ids, attention_mask, visual_positions, labels, label_positions, kept, teacher: a batch padded on the
            right, from `processors.sequences.training_sequences`. A packed batch has `packed` instead of
            attention_mask; one of questions that share their media has both. If `kept` is given, the other visual
            tokens are dropped (dynamic masking), and the MVM loss is added unless the configuration disables it
            (`use_mvm`).
        pixel_values: (B, T, 3, H, W), bytes or normalised. Instead, precomputed features can be given: vision_features
            (B, T, 1+P, C) of a frozen encoder, or query_features (B, T, K, Q) of a frozen Q-Former that reads no text.
            Without any of the three, the batch is text only.
        num_items_in_batch: the divisor of the language loss (default: the number of labelled tokens in this batch).
        Raises UserError if the video input returns another number of tokens than the prompts have places for.
        """
        if pixel_values is not None:
            vision_features = self.vision_features(pixel_values)
        if vision_features is not None:
            query_features = self._query_features(vision_features, qformer_input_ids, qformer_attention_mask)
        visual, num_clips = None, 0
        if query_features is not None:
            frames = self.projection(query_features.to(self.projection.weight.dtype))  # (B, T, K, D)
            visual = self.video_input(frames)  # (B, N, D)
            num_clips = len(visual)
            places = len(visual_positions if teacher is None else teacher["visual_positions"]) // num_clips
            if visual.shape[1] != places:
                raise UserError(
                    f"the video input {self.config.video_input} gives {visual.shape[1]} tokens, but the prompts have "
                    f"places for {places}: make its num_tokens and its forward agree"
                )
            visual = visual.flatten(0, 1)  # (B*N, D)
        present = visual if kept is None or visual is None else visual.index_select(0, kept)  # (V, D)
        embeds = self.embed(input_ids, visual_positions, present)
        hidden = lm.last_hidden_states(self.language_model, embeds, attention_mask, packed)  # (B, S, D)
        loss_lm, loss_mvm = None, None
        if labels is None or label_positions is None:
            logits: Tensor | None = lm.logits_of(self.language_model, hidden)
        else:
            loss_lm, logits = lm.language_loss(self.language_model, hidden, labels, label_positions, num_items_in_batch)
        if visual is not None and kept is not None and teacher is not None and self.config.use_mvm:
            # paper section 3.3: pull the kept tokens' states (student) towards their states in the full clip (teacher)
            student_hidden = hidden.flatten(0, 1).index_select(0, visual_positions)  # (V, D)
            teacher_hidden = self.teacher_hidden_states(visual.detach(), **teacher).index_select(0, kept)  # (V, D)
            loss_mvm = mvm_loss(self.mvm_decoder(student_hidden), teacher_hidden)
        return STLLMOutput(
            loss=loss_mvm if loss_lm is None else loss_lm if loss_mvm is None else loss_lm + loss_mvm,
            logits=logits,
            loss_lm=loss_lm,
            loss_mvm=loss_mvm,
            kept_visual_tokens=None if present is None else len(present) // num_clips,
        )

    def _query_features(self, features: Tensor, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Run features (B, T, 1+P, C) through the Q-Former, with the question if it reads text: (B, T, K, Q)."""
        features = features.to(self.vision_encoder.ln_vision.weight.dtype)
        return self.qformer(features, text_ids, text_mask) if self.config.has_qformer else self.qformer(features)

    @torch.no_grad()
    def teacher_hidden_states(
        self,
        visual: Tensor,
        input_ids: Tensor,
        visual_positions: Tensor,
        attention_mask: Tensor | None = None,
        packed: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the last hidden states of all visual tokens, (B*N, D), without gradients.

        visual: (B*N, D), all visual tokens. The other arguments describe the unmasked prompts, as in `forward`.
        """
        embeds = self.embed(input_ids, visual_positions, visual)
        hidden = lm.last_hidden_states(self.language_model, embeds, attention_mask, packed)
        return hidden.flatten(0, 1).index_select(0, visual_positions)

    @torch.no_grad()
    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        visual_positions: Tensor,
        visual_tokens: Tensor | None = None,
        prefixes: Sequence[list[Prefix]] | None = None,
        **generation: Any,
    ) -> Tensor:
        """Generate token ids, (B, up to max_new_tokens), without the prompt.

        input_ids, attention_mask, visual_positions: see `embed`; padded on the left. visual_tokens: (V, D) from
        `video_input(frame_tokens(...))`. prefixes: see generation.py. generation: arguments of transformers'
        `GenerationMixin.generate`.
        """
        embeds = self.embed(input_ids, visual_positions, visual_tokens)
        return generate(self.language_model, embeds, attention_mask, prefixes=prefixes, **generation)

    # ---- methods that transformers expects ----------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's output head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's output head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def keep_embedding(self) -> None:
        """Remove the language model except its token embedding, for when another process runs the language model."""
        embedding = self.get_input_embeddings()
        for part in list(self.language_model.modules()):
            for name, child in list(part.named_children()):
                if all(inner is not embedding for inner in child.modules()):
                    setattr(part, name, nn.Identity())

    def save_pretrained(  # type: ignore[override]  # by keywords
        self, save_directory: Any, *, state_dict: Any = None, **options: Any
    ) -> None:
        """Save as transformers does, with a model card (README.md) if there is none.

        Quantized layers are saved with their original weights, in full precision.
        """
        if self.precise_weights and state_dict is None:
            from stllm.models.quantization import precise_state

            kind = self.get_input_embeddings().weight.dtype  # the type of all frozen weights
            read = {key: source.weights.read(entry.key) for key, (source, entry) in self.precise_weights.items()}
            state_dict = precise_state(self) | {key: weight.to(kind) for key, weight in read.items()}
        super().save_pretrained(save_directory, state_dict=state_dict, **options)
        card = Path(save_directory) / "README.md"
        if options.get("is_main_process", True) and not card.exists():
            saved = self.state_dict() if state_dict is None else state_dict  # unquantized, whole
            count = sum(saved.get(name, weight).numel() for name, weight in self.named_parameters())
            card.write_text(model_card(config_of(self), count), encoding="utf-8")

    def train(self, mode: bool = True) -> "STLLM":
        """Set training mode for the parts that train; frozen parts stay in evaluation mode (no dropout)."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        if self.language_model in self.frozen_parts():  # gradients pass through it, so it is checkpointed as well
            for layer in self.language_model.modules():
                if isinstance(layer, GradientCheckpointingLayer) and not getattr(layer, "dropout", 0):
                    layer.training = mode  # only this flag: the modules inside stay in evaluation mode
        return self

    def frozen_parts(self) -> list[nn.Module]:
        """Return the modules that the configuration freezes. The temporal adapter and LoRA are never frozen."""
        frozen: list[nn.Module] = []
        if self.config.freeze_vit:
            frozen += [self.vision_encoder.backbone, self.vision_encoder.ln_vision]
        if self.config.freeze_qformer:
            frozen.append(self.qformer)
        if self.config.freeze_llm and self.config.lora is None:
            frozen.append(self.language_model)
        return frozen

    def copied_weights(self) -> dict[str, str]:
        """Return weights that start as copies, as key -> key of the original.

        The spatial layers of the temporal adapter start as copies of the encoder's last blocks.
        """
        encoder = self.vision_encoder
        if encoder.adapter is None:
            return {}
        first = len(encoder.backbone.blocks) - encoder.adapter.depth
        return {
            f"vision_encoder.adapter.spatial.{number}.{name}": f"vision_encoder.backbone.blocks.{first + number}.{name}"
            for number, layer in enumerate(encoder.adapter.spatial)
            for name, _ in layer.named_parameters()
        }

    def initialize_weights(self) -> None:
        """Initialize everything that was not loaded from a file; transformers calls it once."""
        done = getattr(self, "_is_hf_initialized", False)
        super().initialize_weights()
        if not done:
            initialize_parts(self)


@torch.no_grad()
def initialize_parts(model: STLLM) -> None:
    """Initialize the parts that transformers doesn't know: timm's encoder, the adapter, the queries, the bottleneck.

    transformers' `init` functions do not change weights that were loaded from a file. This function can therefore be
    called on a new model and on one with some pretrained parts. Source of the values: paper section 3.
    """
    for module in model.modules():
        if isinstance(module, EvaAttention):
            for bias in (module.q_bias, module.k_bias, module.v_bias):  # k_bias is a buffer that stays zero
                assert bias is not None
                init.zeros_(bias)
        elif isinstance(module, Eva):
            assert module.cls_token is not None and module.pos_embed is not None
            init.trunc_normal_(module.cls_token, std=INIT_STD)
            init.copy_(module.pos_embed, sine_cosine_positions(module.patch_embed.grid_size, module.embed_dim))
        elif isinstance(module, TemporalAdapter):
            init.zeros_(module.class_token)
        elif isinstance(module, TemporalLayer):
            init.zeros_(module.temporal_fc.weight)
        elif isinstance(module, FrameQFormer):
            init.normal_(module.query_tokens, std=INIT_STD)
        elif isinstance(module, ResidualInput):
            init.zeros_(module.up_proj.weight)
    copied = model.copied_weights() if isinstance(model, STLLM) else {}
    for key, block in copied.items():  # after the backbone was initialized
        init.copy_(model.get_parameter(key), model.get_parameter(block))


def config_of(model: STLLM) -> STLLMConfig:
    """Return `model.config`, typed as STLLMConfig; transformers annotates it as a PretrainedConfig."""
    assert isinstance(model.config, STLLMConfig)
    return model.config
