"""`stllm extract`: write the features of all clips of the data sets to shards, for training to read (features.py).

The features are the output of the frozen vision encoder, or of a frozen Q-Former that reads no text. The clips are
divided among the processes. Each data set has its own folder below --output, the `datasets.features_root` of training.
"""

import argparse
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from stllm.common.config import load_config
from stllm.common.device import resolve_device, resolve_dtype, seed_everything
from stllm.common.distributed import (
    end_with_parent,
    gathered,
    is_main,
    one_a_core,
    process_group,
    rank,
    wait_for_all,
    world_size,
)
from stllm.common.errors import UserError, out_of_memory
from stllm.common.files import locked
from stllm.common.schema import ROOTS, RunSettings
from stllm.datasets.corpora import build_corpora
from stllm.datasets.features import (
    SHARD_BYTES,
    ClipBatch,
    ClipDataset,
    FeatureSource,
    FeatureWriter,
    distinct_clips,
)
from stllm.datasets.samples import BadSampleLog
from stllm.datasets.shards.sources import allow_pipes
from stllm.models import precomputed
from stllm.models.build import build_encoder, config_from_settings
from stllm.models.settings import model_section
from stllm.models.st_llm import STLLM, config_of

SAVE_SECONDS = 60  # computed features are written at least this often, so a killed process loses little

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit code is 0 if all readable clips have features."""
    allow_pipes(args.allow_pipe)
    cfg = load_config(args.cfg_path, args.options)
    cfg.datasets.pop("features_root", None)  # read the media, not earlier features
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
    # the same seed as in training, so that randomly initialised weights are also the same
    seed_everything(cfg.run.get("seed", 42) if args.seed is None else args.seed)
    with process_group(), ExitStack() as locks:
        folders = [cfg.datasets[corpus.name].get("features_of") or corpus.name for corpus in corpora]
        for name in dict.fromkeys(folders) if is_main() else ():
            folder = Path(args.output) / name
            busy = f"{folder}: another extraction writes to it: wait until it ends, or name another --output"
            locks.enter_context(locked(Path(args.output) / f".{name}.lock", busy))
        wait_for_all()
        try:
            configured = cfg.run.get("media_seconds", RunSettings.media_seconds)
            extract(
                build_encoder(cfg, device=device, dtype=dtype),
                corpora,
                [Path(args.output) / name for name in folders],
                stage=args.stage,
                settings={"image_size": image_size, "crop": "center", "dtype": str(dtype).removeprefix("torch.")},
                max_bad_fraction=cfg.run.get("max_bad_fraction", RunSettings.max_bad_fraction),
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


def extract(
    model: STLLM,
    corpora: Sequence[FeatureSource],
    folders: Sequence[Path],
    *,
    stage: str,
    settings: dict[str, Any],
    max_bad_fraction: float,
    batch_size: int,
    num_workers: int,
    media_seconds: float,
) -> None:
    """Write the features of each data set to its folder, except for clips that have features already.

    All processes must call this together.
    folders: a folder for each of `corpora`, all in one folder. Data sets of the same folder share its features.
    settings: settings that the features depend on, besides weights and frames. max_bad_fraction: the run fails if a
        larger share of the clips is unreadable. media_seconds: time limit for reading one clip; 0: no limit.
    Raises UserError if a folder holds features of other settings, if the disk has not enough space, and if too many
    clips are unreadable.
    """
    settings = {**settings, "digest": precomputed.weights_digest(model, stage)}
    hidden = None if is_main() else True  # None: tqdm shows no bar if the output is not a terminal
    output = folders[0].parent
    by_folder: dict[Path, tuple[FeatureWriter, set[str], dict[str, Any]]] = {}  # with its clips and its settings
    writers, pending, needed = [], [], 0  # a writer for each data set; pending: clips of all processes; needed: bytes
    for number, (corpus, folder) in enumerate(zip(corpora, folders, strict=True)):
        own = {**settings, **corpus.frame_settings}
        if folder not in by_folder:
            writer = FeatureWriter(folder, stage=stage, settings=own, rank=rank(), shard_bytes=SHARD_BYTES)
            by_folder[folder] = writer, set(), own
        writer, seen, others = by_folder[folder]
        if own != others:
            raise UserError(
                f"data set {corpus.name} shares the features in {folder}, but its frames are not those of the other "
                f"data set (found {corpus.frame_settings}): give both the same frames, or leave out features_of"
            )
        clips = distinct_clips(corpus, number, done=writer, seen=seen)
        bar = tqdm(clips, total=len(corpus), desc=f"{corpus.name}: records", delay=1, leave=False, disable=hidden)
        new = [clip for clip in bar if clip is not None]
        shape = precomputed.shape(config_of(model), stage, corpus.frame_settings.get("num_frames", 1))
        needed += math.prod(shape) * model.dtype.itemsize * len(new)
        writers.append(writer)
        pending += new
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"{output}: {len(pending)} clips of stage {stage} take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free: name another disk with --output, or take fewer frames (num_frames)"
        )
    num_done = sum(writer.num_clips for writer, *_ in by_folder.values())
    wait_for_all()  # no process may write before all have listed the existing features
    share = pending[rank() :: world_size()]
    bad = BadSampleLog(max_bad_fraction=max_bad_fraction, epoch_size=num_done + len(pending))
    started = saved = time.perf_counter()
    log.info("%d clips to encode, %d are there", len(pending), num_done)
    loader: DataLoader[ClipBatch] = DataLoader(
        ClipDataset(corpora, share, batch_size=batch_size, media_seconds=media_seconds),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=model.device.type == "cuda",
        worker_init_fn=end_with_parent,
    )

    def flush() -> None:
        for writer, *_ in by_folder.values():
            writer.flush()

    try:
        of_all = f" (1 of {world_size()} processes)" if world_size() > 1 else ""
        num_read = num_done // world_size()
        with tqdm(total=len(share), desc=f"encoding{of_all}", unit="clip", disable=hidden) as progress:
            for clips, pixel_values, failures in loader:
                for failure in failures:
                    bad.add(failure)
                if pixel_values is not None:
                    pixel_values = pixel_values.to(model.device, non_blocking=True)
                    features = precomputed.encode(model, pixel_values, stage)
                    for clip, of_clip in zip(clips, features.cpu(), strict=True):
                        writers[clip.corpus].add(clip.key, of_clip.clone())
                if time.perf_counter() - saved >= SAVE_SECONDS:
                    flush()
                    saved = time.perf_counter()
                num_read += len(clips)
                bad.check(num_read)
                progress.update(len(clips) + len(failures))
    finally:
        flush()  # keep the computed features, even after an error
    states = gathered([bad.state_dict()])  # this also waits for all processes
    if not is_main():
        return
    causes: Counter[str] = sum((Counter(state["by_cause"]) for state in states), Counter())
    bad.load_state_dict({"by_cause": causes, "subjects": [name for state in states for name in state["subjects"]]})
    num_read = len(pending) - bad.total
    bad.check(num_done + num_read)
    for writer, *_ in by_folder.values():
        writer.finish()
    seconds = time.perf_counter() - started
    left_out = f", {bad.total} could not be read and were left out" if bad.total else ""
    print(
        f"{num_read} clips encoded in {seconds:.0f} s ({num_read / max(seconds, 1e-9):.1f} a second), "
        f"{num_done} were there{left_out}; train on them with datasets.features_root={output}"
    )
