"""ST-LLM, composed: video -> vision -> qformer -> projection -> video_inputs -> masking -> language model.

Source: "ST-LLM: Large Language Models Are Effective Temporal Learners", arXiv 2404.00308, section 3.
B clips, T frames, P patches, C encoder width, K tokens a frame, D language-model width, N visual tokens of a clip,
L text positions, S positions of the joined sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from stllm.common.errors import UserError
from stllm.common.registry import models
from stllm.models import language_model as lm
from stllm.models.configuration import STLLMConfig
from stllm.models.initialization import initialize_parts
from stllm.models.masking import MVMDecoder, draw_token_mask, keep_tokens, kept_positions, mvm_loss
from stllm.models.qformer import FrameQFormer, PatchMerger
from stllm.models.sequences import VISUAL_TOKEN_ID, JoinedSequence, join_visual_tokens
from stllm.models.video_inputs import build_video_input
from stllm.models.vision import build_vision_encoder


@dataclass
class STLLMOutput(ModelOutput):
    """loss = loss_lm + loss_mvm (scalars); logits: (labelled tokens, vocabulary), or (B, S, vocabulary) without labels.

    kept_visual_tokens: visual tokens a clip that entered the language model after masking.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_lm: Tensor | None = None
    loss_mvm: Tensor | None = None
    kept_visual_tokens: int | None = None


@models.register("st_llm_hf", "st_llm")
class STLLM(PreTrainedModel):
    """The whole model. Saving, loading, sharding, device maps and quantisation are transformers'."""

    config_class = STLLMConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["EvaBlock", "SpatialLayer", "TemporalLayer", "InstructBlipQFormerLayer"]  # noqa: RUF012

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
        self.post_init()  # adds its children's own to _no_split_modules
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules or ()))  # FSDP refuses the absent
        self._freeze()

    # ---- the way of a video -------------------------------------------------------------------------------------

    def encode_video(self, pixel_values: Tensor) -> Tensor:
        """What does not depend on the question, so that it can be kept for every question about a video.

        pixel_values: (B, T, 3, H, W), normalised. Returns (B, T, 1+P, C) when the Q-Former reads text, else the
        finished frame tokens (B, T, K, D).
        """
        features = self.vision_features(pixel_values)
        return features if self.config.qformer_text_input else self.projection(self.qformer(features))

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """The encoder's output. pixel_values: (B, T, 3, H, W), normalised. Returns (B, T, 1+P, C)."""
        return self.vision_encoder(pixel_values.to(self.vision_encoder.ln_vision.weight.dtype))

    def frame_tokens(
        self, encoded: Tensor, qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None
    ) -> Tensor:
        """The frames' tokens in the language model's width, (B, T, K, D).

        encoded: what `encode_video` returned; qformer_*: (B, L) the question for a Q-Former that reads text.
        """
        if not self.config.qformer_text_input:
            return encoded
        return self.projection(self._query_features(encoded, qformer_input_ids, qformer_attention_mask))

    def join(
        self,
        visual_tokens: Sequence[Tensor] | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> JoinedSequence:
        """Embeds the text and puts each row's visual tokens, (N_b, D), where its placeholder stands."""
        embeds = self.get_input_embeddings()(input_ids.masked_fill(input_ids == VISUAL_TOKEN_ID, 0))
        return join_visual_tokens(
            embeds, input_ids, attention_mask, visual_tokens, labels=labels, padding_side=padding_side
        )

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        query_features: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        mask_generator: torch.Generator | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> STLLMOutput:
        """One training (or scoring) pass.

        input_ids, attention_mask, labels: (B, L), one `VISUAL_TOKEN_ID` a row where the video goes; none: text alone.
        pixel_values: (B, T, 3, H, W); or, precomputed, what the frozen encoder made of them, vision_features
            (B, T, 1+P, C), or a Q-Former that reads no text, query_features (B, T, K, Q).
        token_mask: (B, N) bool, True = dropped; drawn with `mask_generator` in training when the configuration says so.
        num_items_in_batch: what the language loss is divided by; the labelled tokens of this batch by default.
        """
        if pixel_values is not None:
            vision_features = self.vision_features(pixel_values)
        if vision_features is not None:
            query_features = self._query_features(vision_features, qformer_input_ids, qformer_attention_mask)
        if query_features is None:
            sequence = self.join(None, input_ids, attention_mask, labels=labels)
            return self._score(sequence, num_items=num_items_in_batch)
        frames = self.projection(query_features.to(self.projection.weight.dtype))  # (B, T, K, D)
        visual = self.video_input(frames)  # (B, N, D)
        if token_mask is None and self.training and self.config.use_mask and frames.shape[1] > 1:
            token_mask = draw_token_mask(*visual.shape[:2], **self.config.mask_rate, generator=mask_generator)
        if token_mask is None:
            sequence = self.join(list(visual), input_ids, attention_mask, labels=labels)
            output = self._score(sequence, num_items=num_items_in_batch)
            return STLLMOutput(**{**output, "kept_visual_tokens": visual.shape[1]})
        if token_mask.shape != visual.shape[:2]:
            raise UserError(
                f"the video input {self.config.video_input} gives {visual.shape[1]} tokens, but the token mask has "
                f"{token_mask.shape[1]}: make its num_tokens and its forward agree"
            )
        mask = token_mask.to(visual.device)
        return self._masked_forward(visual, mask, input_ids, attention_mask, labels, num_items_in_batch)

    def _query_features(self, features: Tensor, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """vision features (B, T, 1+P, C) through the Q-Former, with the question where it reads one: (B, T, K, Q)."""
        features = features.to(self.vision_encoder.ln_vision.weight.dtype)
        return self.qformer(features, text_ids, text_mask) if self.config.has_qformer else self.qformer(features)

    def _masked_forward(
        self,
        visual: Tensor,
        mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        num_items: Tensor | int | None,
    ) -> STLLMOutput:
        """Student on the kept tokens, teacher on all of them up to the last visual one (paper section 3.3).

        Without `use_mvm` there is no teacher: masking alone.
        """
        student = self.join(list(keep_tokens(visual, mask)), input_ids, attention_mask, labels=labels)
        hidden = lm.last_hidden_states(self.language_model, student.inputs_embeds, student.attention_mask)
        output = self._score(student, hidden, num_items)
        kept = kept_positions(mask)  # (B, M)
        if not self.config.use_mvm:
            return STLLMOutput(**{**output, "kept_visual_tokens": kept.shape[1]})
        teacher_hidden = self.teacher_hidden_states(visual.detach(), input_ids, attention_mask)  # (B, N, D)
        student_hidden = _gather_positions(hidden, student.visual_positions(kept.shape[1]))  # (B, M, D)
        loss_mvm = mvm_loss(self.mvm_decoder(student_hidden), _gather_positions(teacher_hidden, kept))
        total = loss_mvm if output.loss_lm is None else output.loss_lm + loss_mvm
        return STLLMOutput(
            loss=total,
            logits=output.logits,
            loss_lm=output.loss_lm,
            loss_mvm=loss_mvm,
            kept_visual_tokens=kept.shape[1],
        )

    @torch.no_grad()
    def teacher_hidden_states(self, visual: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (B, N, D) of all visual tokens, without a gradient.

        Attention is causal: nothing after the last visual token can change them, so the sequence ends there.
        """
        sequence = self.join(list(visual), input_ids, attention_mask)
        positions = sequence.visual_positions(visual.shape[1])
        end = int(positions.max()) + 1
        hidden = lm.last_hidden_states(
            self.language_model, sequence.inputs_embeds[:, :end], sequence.attention_mask[:, :end]
        )
        return _gather_positions(hidden, positions)

    def _score(
        self, sequence: JoinedSequence, hidden: Tensor | None = None, num_items: Tensor | int | None = None
    ) -> STLLMOutput:
        if hidden is None:
            hidden = lm.last_hidden_states(self.language_model, sequence.inputs_embeds, sequence.attention_mask)
        if sequence.labels is None:
            return STLLMOutput(logits=lm.logits_of(self.language_model, hidden))
        loss, logits = lm.language_loss(self.language_model, hidden, sequence.labels, num_items)
        return STLLMOutput(loss=loss, logits=logits, loss_lm=loss)

    @torch.no_grad()
    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        visual_tokens: Sequence[Tensor] | None = None,
        **generation: Any,
    ) -> Tensor:
        """New token ids, (B, up to max_new_tokens), without the prompt.

        visual_tokens: B tensors (N_b, D) from `video_input(frame_tokens(...))`; rows of different length are padded on
        the left. generation: arguments of transformers' `GenerationMixin.generate`.
        """
        sequence = self.join(visual_tokens, input_ids, attention_mask, padding_side="left")
        return self.language_model.generate(
            inputs_embeds=sequence.inputs_embeds, attention_mask=sequence.attention_mask, **generation
        )

    # ---- what transformers asks of a model ----------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the language model's output head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def train(self, mode: bool = True) -> "STLLM":
        """Training mode for what trains; frozen parts stay in evaluation mode (no dropout)."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def frozen_parts(self) -> list[nn.Module]:
        """The modules that the configuration freezes. The temporal adapter and LoRA train all the same."""
        frozen: list[nn.Module] = []
        if self.config.freeze_vit:
            frozen += [self.vision_encoder.backbone, self.vision_encoder.ln_vision]
        if self.config.freeze_qformer:
            frozen.append(self.qformer)
        if self.config.freeze_llm and self.config.lora is None:
            frozen.append(self.language_model)
        return frozen

    def _freeze(self) -> None:
        for part in self.frozen_parts():
            part.requires_grad_(False)
        if self.config.lora is not None:
            for name, parameter in self.language_model.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def initialize_weights(self) -> None:
        """Fresh values for whatever was not loaded from a file; transformers calls it once."""
        done = getattr(self, "_is_hf_initialized", False)
        super().initialize_weights()
        if not done:
            initialize_parts(self)


def _gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden: (B, S, D); positions: (B, M). Returns (B, M, D)."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def config_of(model: STLLM) -> STLLMConfig:
    """The model's configuration under its own type, which transformers' annotations don't keep."""
    assert isinstance(model.config, STLLMConfig)
    return model.config
