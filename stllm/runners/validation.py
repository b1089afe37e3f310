"""Validation during training: the loss of held-out samples, and the score of a small benchmark.

It does not affect the training: no masks are drawn, and the training's random generators are not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from omegaconf import DictConfig
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from stllm.common.config import load_evaluation
from stllm.common.distributed import end_with_parent, gathered, is_distributed, rank, world_size
from stllm.common.errors import UserError, unknown_name
from stllm.conversation.chat import Chat, default_num_frames
from stllm.conversation.decoding import Decoding
from stllm.datasets.collate import Collator
from stllm.datasets.mixture import HeldOutSampler, Mixture
from stllm.datasets.samples import Sample
from stllm.evaluation.asking import Asker, share
from stllm.evaluation.benchmarks.base import Loaded, load_benchmark
from stllm.models.st_llm import STLLM
from stllm.processors.prompts import PromptProcessor

BENCHMARK = "mvbench"


@dataclass(frozen=True)
class HeldOutCollator:
    """A collator that adds the number of the data set, and whether the batch is counted in the loss."""

    collator: Collator

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the collator's output with two further keys: `corpus` (int) and `counts` (bool)."""
        key = samples[0].key
        return {**self.collator(samples), "corpus": key.corpus, "counts": key.round == 0}


@dataclass(kw_only=True)
class Validation:
    """The validation of a run. mixture: held-out samples, or None. loaded: the benchmark with its items, or None.

    collator: a collator that masks no visual tokens. batch_size: samples per process. num_workers: data workers per
    process.
    media_seconds: time limit for reading one medium; 0: no limit.
    """

    mixture: Mixture | None
    collator: Collator
    processor: PromptProcessor
    loaded: Loaded | None
    batch_size: int
    num_workers: int
    media_seconds: float

    def losses(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return `eval_loss`, the mean loss over all answer tokens, and the mean of each data set.

        All processes must call this together. model: the wrapped model of the training, in evaluation mode.
        """
        if self.mixture is None:
            return {}
        loader: DataLoader[Any] = DataLoader(
            self.mixture,
            batch_sampler=HeldOutSampler(
                self.mixture.sizes, batch_size=self.batch_size, rank=rank(), world_size=world_size()
            ),
            collate_fn=HeldOutCollator(self.collator),
            num_workers=self.num_workers,
            worker_init_fn=end_with_parent,
            generator=torch.Generator().manual_seed(0),  # leave the global generator to the training
        )
        sums = torch.zeros(len(self.mixture.corpora), 2, device=device)  # per data set: sum of the losses, tokens
        for batch in loader:
            corpus, counts = batch.pop("corpus"), batch.pop("counts")
            del batch["names"], batch["failures"]
            given = send_to_device(batch, device, non_blocking=True)
            num_labels = len(given["label_positions"])
            sums[corpus, 0] += model(**given).loss_lm.float() * num_labels * counts
            sums[corpus, 1] += num_labels * counts
        if is_distributed():
            dist.all_reduce(sums)
        losses = sums[:, 0] / sums[:, 1].clamp(min=1)
        names = [f"eval_loss_{corpus.name}" for corpus in self.mixture.corpora]
        return {
            "eval_loss": float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1)),
            **dict(zip(names, losses.tolist(), strict=True)),
        }

    def scores(self, model: STLLM) -> dict[str, float]:
        """Return the percentage of correct answers: `eval_mvbench` over all items, and one figure per task.

        Answers count by the strict rule (evaluation/scores.py).
        All processes must call this together.
        """
        if self.loaded is None:
            return {}
        chat = Chat(model=model, processor=self.processor, cache_bytes=0)
        asker = Asker(
            chat,
            self.loaded,
            decoding=Decoding.published(self.processor.template),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            media_seconds=self.media_seconds,
        )
        records = gathered(list(asker.records(share(self.loaded.items, rank(), world_size()))))
        strict = self.loaded.benchmark.summary(records)["strict"]
        tasks = {f"eval_{BENCHMARK}_{task}": score for task, score in strict["tasks"].items()}
        return {f"eval_{BENCHMARK}": strict["average"], **tasks}


def open_validation(task: Any, args: TrainingArguments, cfg: DictConfig) -> Validation:
    """Prepare the validation of a run, before any weight is read.

    task: the run's task, with the mixture `held_out` and the method `collator`.
    Raises UserError if there is nothing to evaluate, if run.metric_for_best_model is unknown, and if a benchmark is to
    be evaluated with a model that is divided among processes.
    """
    if not hasattr(task, "held_out"):
        raise UserError(f"run.task {cfg.run.task} has no validation: leave out run.eval_strategy")
    mixture, folder = task.held_out, cfg.run.eval_benchmark
    if mixture is None and folder is None:
        raise UserError(
            "run.eval_strategy is set, but there is nothing to score: give a data set split: val or a val_fraction, or "
            "name a folder in MVBench's layout as run.eval_benchmark"
        )
    if folder is not None and (args.fsdp or args.deepspeed):
        raise UserError("run.eval_benchmark needs a whole model on each process: leave out run.fsdp and run.deepspeed")
    loaded = None
    if folder is not None:
        frames = {"num_frames": default_num_frames(task.config)}
        try:
            settings = load_evaluation(BENCHMARK, command_line={"anno_path": folder}, checkpoint=frames)
            loaded = load_benchmark(BENCHMARK, settings)
        except UserError as error:
            raise UserError(f"run.eval_benchmark: {error}") from error
    known = [] if mixture is None else ["loss", *(f"loss_{corpus.name}" for corpus in mixture.corpora)]
    known += [] if loaded is None else [BENCHMARK, *sorted({f"{BENCHMARK}_{item.task}" for item in loaded.items})]
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise UserError(unknown_name("run.metric_for_best_model", metric, known))
    return Validation(
        mixture=mixture,
        collator=task.collator(masks=False),
        processor=task.processor,
        loaded=loaded,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        media_seconds=cfg.run.media_seconds,
    )
