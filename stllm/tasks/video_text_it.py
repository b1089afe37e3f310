"""Instruction tuning on videos, images and text: the training task of all published recipes.

It builds data sets, prompts and model from a configuration. The runner does the training.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from stllm.common.errors import UserError
from stllm.common.registry import tasks
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.collate import Collator
from stllm.datasets.corpora import build_corpora
from stllm.datasets.features import FeatureSource, FeatureStore
from stllm.datasets.mixture import Mixture, MixtureSampler
from stllm.datasets.samples import TOO_LONG, Corpus, Sample
from stllm.models import precomputed
from stllm.models.build import build_audited
from stllm.models.checkpoints.infer_config import Opened, decide_config, open_sources
from stllm.models.checkpoints.load import Division, processor_of
from stllm.models.configuration import STLLMConfig
from stllm.models.language_model import PACKING, packing_fault
from stllm.models.lora import save_adapter
from stllm.models.settings import model_section, quantization_of
from stllm.models.st_llm import STLLM
from stllm.models.video_inputs import num_visual_tokens
from stllm.processors.prompts import PromptProcessor
from stllm.processors.templates import Turn

log = logging.getLogger(__name__)

ADAPTER_FOLDER = "lora_adapter"


@tasks.register("video_text_it", "video_text_pretrain", "image_text_pretrain")
@dataclass
class VideoTextTask:
    """Data sets, prompts and model for training. Data sets and tokenizers are opened before weights are loaded.

    mixture: training data. held_out: validation data; None without validation. base_model: folder of the language
    model; None if a checkpoint of the whole model has the language model.
    """

    cfg: DictConfig
    config: STLLMConfig
    processor: PromptProcessor
    mixture: Mixture
    held_out: Mixture | None = None
    base_model: str | None = None

    runner = "trainer"

    @classmethod
    def from_config(cls, cfg: DictConfig, *, seed: int) -> "VideoTextTask":
        """Build the task from a checked configuration. seed: seed for the order of samples and for masking.

        Raises UserError for missing data, weights or tokenizers; for precomputed features that are missing or cannot
        replace pixels with this model; for a data set whose visual tokens leave no positions for text; and for settings
        of quantization or packing that contradict others.
        """
        opened = open_configured(cfg)
        config, run = opened.config, cfg.run
        if bits := quantization_of(opened.settings):
            if config.lora is None and not config.freeze_llm:
                raise UserError(
                    f"a language model in {bits} (model.quantization) can't be trained itself: train LoRA on it "
                    "(model.lora_r=16), or freeze it (model.freeze_LLM=True)"
                )
            launched = [os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")]
            if run.get("fsdp") or run.get("deepspeed") or "true" in launched:
                raise UserError(
                    f"a language model in {bits} (model.quantization) is not divided among processes, each holds all "
                    "of it: leave out run.fsdp and run.deepspeed (and those of `accelerate launch`), or "
                    "model.quantization"
                )
        if run.packing and (fault := packing_fault(config.text_config)):
            raise UserError(f"run.packing is True, but {fault}: leave out run.packing, or train another language model")
        if run.packing and (name := opened.settings.get("attn_implementation")) not in PACKING:
            raise UserError(
                f"run.packing is True, but model.attn_implementation is {name}, which is not implemented for packed "
                "samples: take auto, which has flash attention for each sample on a GPU, or leave out run.packing"
            )
        if run.packing and any(run.get(f"torch_compile{name}") for name in ("", "_backend", "_mode")):
            raise UserError(
                "run.packing is True, but run.torch_compile is set, and packed samples have other lengths in every "
                "batch: torch would compile the layers anew until it gives up; leave out run.packing or "
                "run.torch_compile"
            )
        processor = processor_of(opened, download=True)
        limit, image_size = PositionLimit.of(config, processor), config.vision_config["image_size"]
        mixed = partial(Mixture, seed=seed, max_tries=run.max_tries, check=limit, media_seconds=run.media_seconds)
        mixture, held_out = mixed(build_corpora(cfg, image_size=image_size, split="train")), None
        if run.get("eval_strategy", "no") != "no":
            held = build_corpora(cfg, image_size=image_size, train=False, split="val")
            held_out = mixed(held) if held else None
        for corpus in [*mixture.corpora, *(held_out.corpora if held_out is not None else ())]:
            if getattr(corpus, "together", False) and (fault := _sharing_fault(opened, run.packing)):
                raise UserError(f"data set {corpus.name} has qa_sampling=together, but {fault}: set it to all or one")
            store = _features_of(corpus)
            if store is not None and (fault := precomputed.fault(config, store.stage)):
                named = f"data set {corpus.name} is read from precomputed features ({store.folder})"
                raise UserError(f"{named}, but {fault}")
            if store is None and cfg.model.pre_encoding and corpus.media is not None:
                raise UserError(
                    f"model.pre_encoding is True, but data set {corpus.name} has no precomputed features: set "
                    "datasets.features_root to what `stllm extract` has written, or model.pre_encoding=False"
                )
            if limit is not None:
                limit.check_room(corpus)
        whole = any(source.is_whole_model for source in opened.sources)
        base_model = None if whole else opened.settings.get("llama_model")
        return cls(cfg, config, processor, mixture, held_out, base_model)

    def build_model(
        self,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        trained_dtype: torch.dtype | None,
        division: Division | None = None,
    ) -> STLLM:
        """Load the configured weights, and return the model. Notes list the weights that were initialised randomly.

        trained_dtype: type of trained weights. division: as in `assemble`.
        Raises UserError for precomputed features that were made with other weights than the model's.
        """
        model, report = build_audited(
            self.cfg, device=device, dtype=dtype, trained_dtype=trained_dtype, division=division
        )
        counts = Counter(
            "LoRA" if "lora_" in key else part for part, audit in report.parts.items() for key in audit["fresh"]
        )
        if fresh := [f"{part} ({count} weights)" for part, count in counts.items()]:
            log.info("from random weights, as no file gives them: %s", ", ".join(fresh))
        for note in report.notes:
            log.info(note)
        digests: dict[str, str] = {}
        for store in filter(None, map(_features_of, self.mixture.corpora)):
            if store.stage not in digests:
                digests[store.stage] = precomputed.weights_digest(model, store.stage)
            expected, found = digests[store.stage], store.settings.get("digest")
            if found != expected:
                raise UserError(
                    f"{store.folder}: the features there were made with other weights than the model's (digest "
                    f"{found}, expected {expected}): name the weights that they were made with, or run `stllm extract` "
                    "with this configuration into another folder (with --dtype float16 only where training is in fp16)"
                )
        return model

    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> MixtureSampler:
        """Return the sampler, which determines the order of batches. batch_size: samples per process."""
        return MixtureSampler(self.mixture, batch_size=batch_size, rank=rank, world_size=world_size)

    def collator(self, *, masks: bool = True) -> Collator:
        """Return the collator of samples. masks: False for no masking even if it is configured."""
        return Collator(
            self.processor,
            seed=self.mixture.seed,
            num_tokens=partial(num_visual_tokens, self.config),
            mask_rate=self.config.mask_rate if masks and self.config.use_mask else None,
            mask_bucket=self.cfg.run.mask_bucket,
            packing=self.cfg.run.packing,
        )

    def export(self, model: nn.Module, folder: Path, *, sharded: bool) -> None:
        """Write the LoRA adapter, if there is one, to a subfolder of `folder`. A sharded model's adapter is skipped."""
        assert isinstance(model, STLLM)
        if self.config.lora is not None and not sharded:
            save_adapter(model, folder / ADAPTER_FOLDER, base_model=self.base_model)


@dataclass(frozen=True)
class PositionLimit:
    """Check that a sample's prompt, answer and visual tokens (before masking) fit the language model's positions."""

    config: STLLMConfig
    processor: PromptProcessor
    num_positions: int

    @classmethod
    def of(cls, config: STLLMConfig, processor: PromptProcessor) -> "PositionLimit | None":
        """Return the check for a model, or None if its language model has no `max_position_embeddings`."""
        num_positions = getattr(config.text_config, "max_position_embeddings", None)
        return None if num_positions is None else cls(config, processor, num_positions)

    def __call__(self, sample: Sample, num_frames: int) -> None:
        """Raise AnnotationError if a sample is too long; see `samples.LengthCheck`."""
        prompts = [(turn,) for turn in sample.turns] if sample.together else [sample.turns]
        found, visual = max(self._num_tokens(prompt, sample.media, num_frames) for prompt in prompts)
        if found > self.num_positions:
            raise AnnotationError(
                f"{sample.name}: its prompt and answer have {found} tokens ({visual} of them visual), but the "
                f"language model has {self.num_positions} positions: shorten the text, use fewer frames, or leave the "
                "record out",
                cause=TOO_LONG,
            )

    def check_room(self, corpus: Corpus) -> None:
        """Raise UserError if a data set's visual tokens leave no positions for text."""
        if corpus.media is None or not isinstance(corpus, FeatureSource):
            return
        num_frames = corpus.frame_settings.get("num_frames", 1)
        found, visual = self._num_tokens((Turn(question="", answer=""),), corpus.media, num_frames)
        if found > self.num_positions:
            raise UserError(
                f"data set {corpus.name}: {num_frames} frames become {visual} visual tokens, which leaves no room for "
                f"text in the language model's {self.num_positions} positions: lower its num_frames, or set "
                "model.video_input to residual or mean"
            )

    def _num_tokens(self, turns: Sequence[Turn], media: str | None, num_frames: int) -> tuple[int, int]:
        """Return the number of tokens of a training sample, and how many of them are visual tokens."""
        num_text = len(self.processor.training_ids(turns, media=media)[0])
        if media is None:
            return num_text, 0
        visual = num_visual_tokens(self.config, num_frames)
        return num_text - 1 + visual, visual  # one of the text's ids is the placeholder of the visual tokens


def open_configured(cfg: DictConfig) -> Opened:
    """Open the files configured in section `model`, and return them with the model's configuration. Raises UserError.

    Only headers are read, not weights.
    """
    settings = model_section(cfg)
    sources = open_sources(settings)
    config = decide_config(sources, settings)
    named = settings.get("ckpt") or settings.get("llama_model")
    if not named:
        raise UserError("no tokenizer is named: set model.llama_model to a language model's folder, or model.ckpt")
    return Opened(Path(named), sources, settings, config)


def _sharing_fault(opened: Opened, packing: bool) -> str | None:
    """Return the reason if questions cannot share their medium's tokens, else None."""
    if opened.config.qformer_text_input:
        return "the Q-Former reads the question, so each question has visual tokens of its own"
    if packing:
        return "run.packing is True, which keeps whole samples apart and not the questions of one"
    if (name := opened.settings.get("attn_implementation")) not in PACKING:
        return f"model.attn_implementation is {name}, which has no masks for this"
    return packing_fault(opened.config.text_config)


def _features_of(corpus: Corpus) -> FeatureStore | None:
    return corpus.features if isinstance(corpus, FeatureSource) else None
