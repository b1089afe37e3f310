"""Turns frames into query tokens with transformers' Q-Former, which reads the question (InstructBLIP) or not (BLIP-2).

Sources: BLIP-2 (arXiv 2301.12597), InstructBLIP (arXiv 2305.06500), `transformers.InstructBlipQFormerModel`.
Letters in shapes: B clips, T frames, P patches, C encoder width, K queries, Q Q-Former width, L text tokens.
"""

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from stllm.models.language_model import masks_without_reads


class FrameQFormer(nn.Module):
    """K learned queries that attend to each frame and, with `text_input`, to the question."""

    def __init__(self, *, config: InstructBlipQFormerConfig, num_query_tokens: int, text_input: bool) -> None:
        super().__init__()
        self.text_input = text_input
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.bert = InstructBlipQFormerModel(config)
        if not text_input:  # drop the layers for text, half of the Q-Former, which BLIP-2's checkpoints lack
            embeddings: nn.Module = self.bert.embeddings
            embeddings.word_embeddings = embeddings.position_embeddings = None  # type: ignore[assignment]
            for layer in self.bert.encoder.layer:
                layer.intermediate = layer.output = None  # type: ignore[assignment]

    def forward(
        self, features: Tensor, text_ids: Tensor | None = None, text_attention_mask: Tensor | None = None
    ) -> Tensor:
        """features: (B, T, 1+P, C). text_ids, text_attention_mask: (B, L), the question, used for all frames of a clip.

        Returns (B, T, K, Q). Raises ValueError when the Q-Former reads text but none is given.
        """
        num_clips, num_frames = features.shape[:2]
        frames = features.flatten(0, 1)  # (B*T, 1+P, C)
        queries = self.query_tokens.expand(len(frames), -1, -1)
        mask = None
        if self.text_input:
            if text_ids is None or text_attention_mask is None:
                raise ValueError("this Q-Former reads the question, but no text was given: pass qformer_input_ids")
            text_ids = text_ids.repeat_interleave(num_frames, dim=0)  # (B*T, L)
            text_attention_mask = text_attention_mask.repeat_interleave(num_frames, dim=0)
            mask = torch.cat([text_attention_mask.new_ones(queries.shape[:2]), text_attention_mask], dim=1)
        with masks_without_reads(self.bert):
            out = self.bert(
                input_ids=text_ids if self.text_input else None,
                attention_mask=mask,
                query_embeds=queries,
                encoder_hidden_states=frames,
            ).last_hidden_state[:, : queries.shape[1]]  # (B*T, K, Q), without the states of the text
        return out.unflatten(0, (num_clips, num_frames))


class PatchMerger(nn.Module):
    """Replaces the Q-Former when `has_qformer` is False: joins every 4 neighbouring patches, drops the class token."""

    def forward(self, features: Tensor) -> Tensor:
        """features: (B, T, 1+P, C). Returns (B, T, P/4, 4*C)."""
        patches = features[:, :, 1:]
        return patches.reshape(*patches.shape[:2], patches.shape[2] // 4, 4 * patches.shape[3])
