"""The collator, which turns samples into the model's arguments: it tokenizes prompts, stacks media and draws masks.

The masks depend on the seed, the epoch and the sample, and not on the number of processes or workers.
Letters in shapes: B samples, T frames, S image size, P patches, C encoder width, K tokens per frame, Q Q-Former width,
N visual tokens of a clip.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stllm.datasets.samples import Sample, Stream, keyed_torch
from stllm.models.masking import draw_dropped, draw_mask_rate
from stllm.processors.prompts import PromptProcessor
from stllm.processors.sequences import share_beginning, training_sequences

MEDIA_FIELDS = ("pixel_values", "vision_features", "query_features")


class Collator:
    """The `collate_fn` of a DataLoader: converts samples of one data set to the arguments of `STLLM.forward`.

    num_tokens: computes N from T for the model's video input (`video_inputs.num_visual_tokens`).
    mask_rate: mean, std, min and max of the share of visual tokens that a clip drops (paper section 3.3); None: no
        token is dropped. Images are never masked. mask_bucket: see `masking.draw_dropped`.
    packing: concatenate the prompts into one row without padding; see `sequences.pad_sequences`.
    """

    def __init__(
        self,
        processor: PromptProcessor,
        *,
        seed: int,
        num_tokens: Callable[[int], int],
        mask_rate: Mapping[str, float] | None = None,
        mask_bucket: int = 1,
        packing: bool = False,
    ) -> None:
        self.processor, self.seed, self.num_tokens = processor, seed, num_tokens
        self.mask_rate, self.mask_bucket, self.packing = mask_rate, mask_bucket, packing

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the arguments by name.

        They are the output of `training_sequences`; the media as pixel_values (B, T, 3, S, S), vision_features
        (B, T, 1+P, C) or query_features (B, T, K, Q), unless the samples are text-only; and qformer_* if the Q-Former
        reads text. Two further keys are for the training loop: `names` of the samples, and their `failures`.
        """
        batch: dict[str, Any] = stacked(samples)
        num_visual = dropped = None
        if samples[0].media is not None:
            # The Q-Former reads only the first turn: the visual tokens come before all turns.
            batch |= self.processor.qformer_inputs([self.processor.template.text(s.turns[0]) for s in samples])
            num_visual = self.num_tokens(samples[0].num_frames)
            if self.mask_rate is not None and samples[0].num_frames > 1:
                # One rate for the global batch, so that all rows drop the same number: (B, N) bool, True = dropped.
                place = samples[0].key[:2]  # epoch and batch
                rate = draw_mask_rate(**self.mask_rate, generator=keyed_torch(self.seed, Stream.MASK_RATE, *place))
                rows = [(s.key.corpus, s.key.index, s.key.round) for s in samples]
                keyed = [keyed_torch(self.seed, Stream.MASK, *place, *row) for row in rows]
                draw = partial(draw_dropped, 1, num_visual, rate=rate, bucket=self.mask_bucket)
                dropped = torch.cat([draw(generator=row) for row in keyed])
        ids, labels, questions = zip(*(self._row(sample) for sample in samples), strict=True)
        batch |= training_sequences(
            ids,
            labels,
            pad_id=self.processor.pad_token_id,
            num_visual=num_visual,
            dropped=dropped,
            packing=self.packing,
            questions=questions if samples[0].together else None,
        )
        batch["names"] = [sample.name for sample in samples]
        batch["failures"] = [failure for sample in samples for failure in sample.failures]
        return batch

    def _row(self, sample: Sample) -> tuple[list[int], list[int], list[int]]:
        """Return a sample's token ids, their labels, and the question that each belongs to (1 in a conversation)."""
        train = partial(self.processor.training_ids, media=sample.media, judge_options=sample.judge_options)
        if sample.together:
            return share_beginning([train((turn,)) for turn in sample.turns])
        ids, labels = train(sample.turns)
        return ids, labels, [1] * len(ids)


def stacked(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stack the media of samples that have the same kind of medium. The result is empty for text-only samples."""
    result = {}
    for name in MEDIA_FIELDS:
        tensors = [tensor for sample in samples if (tensor := getattr(sample, name)) is not None]
        if tensors:
            assert len(tensors) == len(samples), "a batch comes from one data set, and that has one kind of media"
            result[name] = torch.stack(tensors)
    return result
