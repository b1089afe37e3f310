"""An evaluation in its folder: begun or continued, alone or divided among processes, its lines joined at the end."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stllm.common.device import resolve_device, resolve_dtype
from stllm.common.distributed import is_main, rank, wait_for_all, world_size
from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.jsonl import Appender, naming_full_disk
from stllm.common.processes import one_a_core
from stllm.common.schema import EvaluationSettings
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.evaluation.digests import checkpoint_digest, content_digest, prompts_digest
from stllm.evaluation.engine import Engine, head, share
from stllm.evaluation.items import Benchmark, Item, Record
from stllm.evaluation.record_files import RecordFiles
from stllm.evaluation.run_settings import check_same, decisive, run_settings, save_settings
from stllm.models.checkpoints.infer_config import Opened
from stllm.models.checkpoints.load import load_opened, processor_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run came to. records: in the ground truth's order; seconds: spent on them, by all runs and processes."""

    records: list[Record]
    settings: Mapping[str, Any]
    digests: Mapping[str, str]
    seconds: float


class Runs:
    """Evaluations of one checkpoint, which is read when the first question is asked, and not before.

    settings: of all of them. Raises UserError for a checkpoint that cannot be opened, or that has no tokenizer.
    """

    def __init__(self, opened: Opened, settings: EvaluationSettings, *, device: str, dtype: str) -> None:
        self.opened, self.settings = opened, settings
        self.device = resolve_device(device)
        self.dtype = str(resolve_dtype(dtype, self.device)).removeprefix("torch.")
        self.processor = processor_of(opened)
        self.folder = user_path(settings.output_dir)
        names = ("num_beams", "max_new_tokens", "repetition_penalty", "context")
        given = {name: getattr(settings, name) for name in names}
        asked = {name: value for name, value in given.items() if value is not None}
        self.decoding = replace(Decoding.published(self.processor.template), **asked)

    @cached_property
    def chat(self) -> Chat:
        """The model, loaded. No video is kept: a benchmark's come clip by clip."""
        model, _ = load_opened(self.opened, device=str(self.device), dtype=self.dtype)
        return Chat(model=model, processor=self.processor, cache_bytes=0)

    @cached_property
    def _checkpoint(self) -> str:
        return checkpoint_digest(self.opened.sources)

    def run(self, benchmark: Benchmark, name: str, *, variant: str = "") -> Outcome | None:
        """Asks what is not answered yet, into `<name>.jsonl`. A collective call; None on all but the main process.

        variant: of the benchmark's items, where they are not as published. Raises UserError: lines of other settings or
        items in the folder, a full disk, another process that writes there, and whatever the model raises.
        """
        files = RecordFiles(self.folder, name)
        with files.locked() if is_main() else nullcontext():
            settings = self._begin(files, benchmark, variant) if is_main() else {}
            wait_for_all()  # until the lines of earlier runs are in one file
            done = {id_ for id_, record in files.read().items() if not record.get("error")}
            pending = [item for item in benchmark.items if item.id not in done]
            if is_main():
                log.info(
                    "%s: %d items to ask, %d are answered", name, len(pending), len(benchmark.items) - len(pending)
                )
            self._ask(files, benchmark, share(pending, rank(), world_size()))
            wait_for_all()
            return self._end(files, benchmark, settings) if is_main() else None

    def _begin(self, files: RecordFiles, benchmark: Benchmark, variant: str) -> dict[str, Any]:
        """Sees that these settings and items go with the lines that are there, and joins those."""
        settings = run_settings(
            benchmark,
            self.settings,
            self.decoding,
            self.opened,
            self.processor,
            checkpoint=self._checkpoint,
            dtype=self.dtype,
            variant=variant,
        )
        file = self.folder / f"{files.name}.config.yaml"
        records = files.gather()
        if records:
            check_same(file, settings, files.path)
            _check_items(files.path, records, benchmark.items)
        files.join([item.id for item in benchmark.items])
        with naming_full_disk(file):
            save_settings(file, settings)
        return settings

    def _ask(self, files: RecordFiles, benchmark: Benchmark, items: Sequence[Item]) -> None:
        """This process's items, each written as soon as it is known."""
        if not items:
            return
        engine = Engine(
            self.chat,
            benchmark,
            decoding=self.decoding,
            batch_size=self.settings.batch_size,
            num_workers=one_a_core(self.settings.num_workers),
            media_seconds=self.settings.media_seconds,
        )
        path = files.path if world_size() == 1 else files.part(rank())
        of_all = f" (1 of {world_size()} processes)" if world_size() > 1 else ""
        hidden = None if is_main() else True  # None: no bar where nobody looks
        bar = tqdm(total=len(items), desc=f"{files.name}{of_all}", unit="item", disable=hidden)
        with Appender(path) as lines, bar:
            for record in engine.records(items):
                lines.add(record)
                bar.update()

    def _end(self, files: RecordFiles, benchmark: Benchmark, settings: Mapping[str, Any]) -> Outcome:
        records = files.join([item.id for item in benchmark.items])
        missing = [item.id for item in benchmark.items if item.id not in records]
        if missing:
            raise UserError(f"{files.path} lacks {len(missing)} items ({missing[0]}): run the same command again")
        digests = {
            "config": content_digest(decisive(settings)),
            "prompts": prompts_digest(benchmark, self.processor),
            "checkpoint": self._checkpoint,
        }
        spent = sum(sum(record["seconds"].values()) for record in records.values())
        return Outcome(list(records.values()), settings, digests, spent)


def _check_items(path: Path, records: Mapping[str, Record], items: Sequence[Item]) -> None:
    """Raises UserError unless every line is about an item that is asked now, and every answer about it as it is now.

    An item that failed is asked again, as it is now.
    """
    asked = {item.id: item for item in items}
    gone = [id_ for id_ in records if id_ not in asked]
    if gone:
        raise UserError(
            f"{path} answers {len(gone)} items that are not asked now ({gone[0]}): ask for them too (--tasks, --limit, "
            "--anno-path), or name another --output-name"
        )
    for id_, record in records.items():
        now = {} if record.get("error") else head(asked[id_])
        changed = [key for key, value in now.items() if record.get(key) != value]
        if changed:
            key = changed[0]
            raise UserError(
                f"{path}: the ground truth is another one now: {key} of {id_} was {record.get(key)!r} and is "
                f"{now[key]!r}; name another --output-name to begin anew"
            )
