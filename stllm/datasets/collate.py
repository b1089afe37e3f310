"""Samples to the model's arguments: prompts tokenized and padded, media stacked, masks drawn.

Masks are drawn here, keyed by epoch and sample, so that they do not depend on how many processes or workers there are.
Letters: B samples, L text positions, T frames, S image size, P patches, C encoder width, K tokens a frame, Q Q-Former
width, N visual tokens of a clip.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stllm.datasets.samples import Sample, SampleKey, Stream, keyed_torch
from stllm.models.masking import draw_dropped, draw_mask_rate
from stllm.processors.prompts import PromptProcessor

MEDIA_FIELDS = ("pixel_values", "vision_features", "query_features")


@dataclass(frozen=True)
class TokenMasker:
    """Draws which visual tokens a clip drops in training (paper section 3.3).

    mask_rate: mean, std, min and max of the share dropped.
    num_tokens: T to N, as the model's video input counts them (`video_inputs.num_visual_tokens`).
    """

    mask_rate: Mapping[str, float]
    num_tokens: Callable[[int], int]

    def draw(self, keys: Sequence[SampleKey], num_frames: int, *, seed: int) -> Tensor:
        """(B, N) bool, True = dropped: one rate for the global batch, so that all its rows drop equally many."""
        batch = (keys[0].epoch, keys[0].batch)
        rate = draw_mask_rate(**self.mask_rate, generator=keyed_torch(seed, Stream.MASK_RATE, *batch))
        num_tokens = self.num_tokens(num_frames)
        rows = [
            draw_dropped(
                1,
                num_tokens,
                rate=rate,
                generator=keyed_torch(seed, Stream.MASK, *batch, key.corpus, key.index, key.round),
            )
            for key in keys
        ]
        return torch.cat(rows)


class Collator:
    """A DataLoader's `collate_fn`: samples of one data set to the arguments of `STLLM.forward`.

    masker: draws visual tokens to drop; None: none are dropped. A single image is never masked.
    """

    def __init__(self, processor: PromptProcessor, *, seed: int, masker: TokenMasker | None = None) -> None:
        self.processor = processor
        self.seed = seed
        self.masker = masker

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """input_ids, attention_mask, labels (B, L); pixel_values (B, T, 3, S, S) or vision_features (B, T, 1+P, C) or
        query_features (B, T, K, Q), none for text alone; qformer_* where the Q-Former reads text; token_mask (B, N).

        Besides, for whoever trains: names, the samples' own, and failures, what could not be read in their place.
        """
        rows = [self.processor.training_ids(sample.turns, media=sample.media) for sample in samples]
        batch: dict[str, Any] = self.processor.pad([ids for ids, _ in rows], labels=[labels for _, labels in rows])
        batch |= stacked(samples)
        if samples[0].media is not None:
            # Visual tokens come before every turn, so they can answer to the first one alone.
            batch |= self.processor.qformer_inputs([self.processor.template.text(s.turns[0]) for s in samples])
            num_frames = next(batch[name] for name in MEDIA_FIELDS if name in batch).shape[1]
            if self.masker is not None and num_frames > 1:
                batch["token_mask"] = self.masker.draw([s.key for s in samples], num_frames, seed=self.seed)
        batch["names"] = [sample.name for sample in samples]
        batch["failures"] = [failure for sample in samples for failure in sample.failures]
        return batch


def stacked(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The media of samples that all have the same kind, stacked; empty for text alone."""
    result = {}
    for name in MEDIA_FIELDS:
        tensors = [tensor for sample in samples if (tensor := getattr(sample, name)) is not None]
        if tensors:
            assert len(tensors) == len(samples), "a batch comes from one data set, and that has one kind of media"
            result[name] = torch.stack(tensors)
    return result
