"""`stllm extract`: what the frozen encoder, or a frozen Q-Former without text, makes of every clip, into shards once.

configuration -> data sets and frozen part -> distinct clips, divided among the processes -> a folder a data set, which
training reads in place of the media (`datasets.features_root`, features.py)
"""

import argparse
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from stllm.common.config import load_config
from stllm.common.device import resolve_device, resolve_dtype, seed_everything
from stllm.common.distributed import gathered, is_main, process_group, rank, wait_for_all, world_size
from stllm.common.errors import UserError, out_of_memory
from stllm.common.files import locked
from stllm.common.processes import end_with_parent, one_a_core
from stllm.common.schema import ROOTS, RunSettings
from stllm.datasets.corpora import build_corpora
from stllm.datasets.features import (
    SHARD_BYTES,
    ClipBatch,
    ClipDataset,
    DistinctClip,
    FeatureSource,
    FeatureWriter,
    distinct_clips,
)
from stllm.datasets.samples import BadSampleLog
from stllm.datasets.shards import allow_pipes
from stllm.models import precomputed
from stllm.models.build import build_encoder, config_from_settings
from stllm.models.settings import model_section
from stllm.models.st_llm import STLLM, config_of

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 0 when every clip that can be read is there."""
    allow_pipes(args.allow_pipe)
    cfg = load_config(args.cfg_path, args.options)
    cfg.datasets.pop("features_root", None)  # the features that data sets may name are about to be made
    for name, entry in cfg.datasets.items():
        if name not in ROOTS:
            entry.pop("features_dir", None)
    config = config_from_settings(model_section(cfg))
    fault = precomputed.fault(config, args.stage)
    if fault:
        raise UserError(f"--stage {args.stage}: {fault}")
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    image_size = config.vision_config["image_size"]
    every = [source.corpus for source in build_corpora(cfg, image_size=image_size, train=False)]
    corpora = [corpus for corpus in every if corpus.media is not None and isinstance(corpus, FeatureSource)]
    if not corpora:
        raise UserError("there is nothing to encode: no data set of the configuration has videos or images")
    # as training does, so that even weights that no file gives are the same ones there
    seed_everything(cfg.run.get("seed", 42) if args.seed is None else args.seed)
    with process_group(), _locked(Path(args.output), corpora):
        try:
            extraction = Extraction(
                build_encoder(cfg, device=device, dtype=dtype),
                corpora,
                args.output,
                stage=args.stage,
                settings={"image_size": image_size, "crop": "center", "dtype": str(dtype).removeprefix("torch.")},
                max_bad_fraction=cfg.run.get("max_bad_fraction", RunSettings.max_bad_fraction),
            )
            configured = cfg.run.get("media_seconds", RunSettings.media_seconds)
            extraction.run(
                batch_size=args.batch_size,
                num_workers=one_a_core(args.num_workers),
                media_seconds=configured if args.media_seconds is None else args.media_seconds,
            )
        except Exception as error:
            if not out_of_memory(error) or isinstance(error, UserError):
                raise
            raise UserError(
                f"not enough memory for {args.batch_size} clips at once: lower --batch-size or model.vit_chunk_size, "
                "or take --dtype bfloat16; the shards written so far are kept"
            ) from error
    return 0


class Extraction:
    """The features of `corpora` in `output`/<data set>, as far as they are not there yet. The same on every process.

    settings: what the features depend on beside weights and frames. max_bad_fraction: the share of unreadable clips
        above which the run fails. Raises UserError for other features in a folder, and for a disk without room.
    """

    def __init__(
        self,
        model: STLLM,
        corpora: Sequence[FeatureSource],
        output: str | Path,
        *,
        stage: str,
        settings: dict[str, Any],
        max_bad_fraction: float,
    ) -> None:
        self.model, self.corpora, self.stage, self.output = model, corpora, stage, Path(output)
        settings = {"digest": precomputed.weights_digest(model, stage), **settings}
        self.writers = [
            FeatureWriter(
                self.output / corpus.name,
                stage=stage,
                settings={**settings, **corpus.frame_settings},
                rank=rank(),
                shard_bytes=SHARD_BYTES,
            )
            for corpus in corpora
        ]
        self.pending = self._pending()  # of all processes
        self.num_done = sum(writer.num_clips for writer in self.writers)
        self._check_room()
        wait_for_all()  # nobody writes until everyone has seen what is there
        self.own = self.pending[rank() :: world_size()]
        size = self.num_done + len(self.pending)
        self.bad = BadSampleLog(max_bad_fraction=max_bad_fraction, epoch_size=size)

    def run(self, *, batch_size: int, num_workers: int, media_seconds: float) -> None:
        """Decodes, encodes, writes. Raises UserError when too many clips could not be read."""
        started = time.perf_counter()
        log.info("%d clips to encode, %d are there", len(self.pending), self.num_done)
        try:
            self._encode(
                DataLoader(
                    ClipDataset(self.corpora, self.own, batch_size=batch_size, media_seconds=media_seconds),
                    batch_size=None,
                    num_workers=num_workers,
                    pin_memory=self.model.device.type == "cuda",
                    worker_init_fn=end_with_parent,
                )
            )
        finally:
            for writer in self.writers:  # whatever happened: what was computed is kept
                writer.flush()
        states = gathered([self.bad.state_dict()])  # waits for all processes, too
        if is_main():
            self._finish(states, time.perf_counter() - started)

    def _pending(self) -> list[DistinctClip]:
        found: list[DistinctClip] = []
        hidden = None if is_main() else True
        for number, (corpus, writer) in enumerate(zip(self.corpora, self.writers, strict=True)):
            clips = distinct_clips(corpus, number, done=writer)
            bar = tqdm(clips, total=len(corpus), desc=f"{corpus.name}: records", delay=1, leave=False, disable=hidden)
            found += [clip for clip in bar if clip is not None]
        return found

    def _check_room(self) -> None:
        """Raises UserError when the disk is too small for what is to be written."""
        numbers = Counter(clip.corpus for clip in self.pending)
        element = self.model.dtype.itemsize
        needed = sum(
            math.prod(precomputed.shape(config_of(self.model), self.stage, frames)) * element * numbers[number]
            for number, frames in enumerate(corpus.frame_settings.get("num_frames", 1) for corpus in self.corpora)
        )
        free = shutil.disk_usage(self.output).free
        if needed > free:
            raise UserError(
                f"{self.output}: {len(self.pending)} clips of stage {self.stage} take {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free: name another disk with --output, or take fewer frames (num_frames)"
            )

    def _encode(self, loader: DataLoader[ClipBatch]) -> None:
        share = f" (1 of {world_size()} processes)" if world_size() > 1 else ""
        hidden = None if is_main() else True  # None: no bar where nobody looks
        num_read = self.num_done // world_size()
        with tqdm(total=len(self.own), desc=f"encoding{share}", unit="clip", disable=hidden) as bar:
            for clips, pixel_values, failures in loader:
                for failure in failures:
                    self.bad.add(failure)
                if pixel_values is not None:
                    pixel_values = pixel_values.to(self.model.device, non_blocking=True)
                    features = precomputed.encode(self.model, pixel_values, self.stage)
                    for clip, of_clip in zip(clips, features.cpu(), strict=True):
                        self.writers[clip.corpus].add(clip.key, of_clip.clone())
                num_read += len(clips)
                self.bad.check(num_read)
                bar.update(len(clips) + len(failures))

    def _finish(self, states: Sequence[dict[str, Any]], seconds: float) -> None:
        """The indexes and the last word, on the main process, when all have written."""
        causes: Counter[str] = sum((Counter(state["by_cause"]) for state in states), Counter())
        subjects = [subject for state in states for subject in state["subjects"]]
        self.bad.load_state_dict({"by_cause": causes, "subjects": subjects})
        num_read = len(self.pending) - self.bad.total
        self.bad.check(self.num_done + num_read)
        for writer in self.writers:
            writer.finish()
        left_out = f", {self.bad.total} could not be read and were left out" if self.bad.total else ""
        print(
            f"{num_read} clips encoded in {seconds:.0f} s ({num_read / max(seconds, 1e-9):.1f} a second), "
            f"{self.num_done} were there{left_out}; train on them with datasets.features_root={self.output}"
        )


@contextmanager
def _locked(output: Path, corpora: Iterable[FeatureSource]) -> Iterator[None]:
    """Within, no other extraction may write these data sets' features; the main process holds the locks."""
    with ExitStack() as stack:
        for corpus in corpora if is_main() else ():
            folder = output / corpus.name
            busy = f"{folder}: another extraction writes to it: wait until it ends, or name another --output"
            stack.enter_context(locked(output / f".{corpus.name}.lock", busy))
        wait_for_all()
        yield
