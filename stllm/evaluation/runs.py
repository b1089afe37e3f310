"""Evaluation runs: starting and resuming, by one or several processes, with records in an output folder.

`<name>.jsonl` has one record (line) per item. A single process appends to this file. With several processes, each
appends to its own `<name>.part-<rank>.jsonl`, and the main process joins these files. The settings are stored beside
the records; a rerun resumes if its settings are the same, and is refused otherwise. The results contain short hashes
(16 hex digits) of the configuration, the prompts and the checkpoint.
"""

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from stllm.common.config import describe_changes, flat
from stllm.common.device import resolve_device, resolve_dtype
from stllm.common.distributed import is_main, one_a_core, rank, wait_for_all, world_size
from stllm.common.errors import UserError
from stllm.common.files import locked, user_path, write_text
from stllm.common.jsonl import Appender, line_of, naming_full_disk, read_records
from stllm.common.schema import EvaluationSettings
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.evaluation.asking import Asker, head, share
from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.evaluation.results import Outcome
from stllm.models.checkpoints.formats import Source, weight_files
from stllm.models.checkpoints.infer_config import Opened
from stllm.models.checkpoints.load import load_opened, processor_of
from stllm.models.settings import quantization_of
from stllm.processors.prompts import PromptProcessor

log = logging.getLogger(__name__)

# Settings that may change when a run is resumed. Most do not change answers. Changed items are found by comparing the
# items. The last four keys are compared by their effective values in `decoding`.
FREE = re.compile(
    r"evaluation\.(anno_path|answers_path|video_dir|output_dir|output_name|tasks|limit|batch_size|num_workers|media_seconds"
    r"|engine"
    r"|num_beams|max_new_tokens|repetition_penalty|context)"
)
SMALL = 16 << 20  # bytes; the hash of a checkpoint covers files up to this size completely
BLOCK, STRIDE = 4 << 10, 4 << 20  # bytes; of a larger file, it covers one block per stride: some seconds for 16 GiB
# other files in a checkpoint folder on which answers depend
BESIDE = (
    *("config.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    "qformer_tokenizer/*",
)
# An item that is never asked. Its prompt is stored with the settings, so that a change of the prompt's text is noticed.
SAMPLE = Item("sample", "", "", None, ("QUESTION",), "FIRST", candidates=("FIRST", "SECOND"))
ADVICE = "expected a record as stllm evaluate writes it: remove the line, or name another --output-name"


class Runs:
    """Evaluations of one checkpoint with the same settings. The weights are loaded when the first question is asked.

    shared: runs with other settings, whose loaded model is reused. Raises UserError for a checkpoint without a
    tokenizer, an engine that cannot be reached, or another engine than that of the shared runs.
    """

    def __init__(
        self, opened: Opened, settings: EvaluationSettings, *, device: str, dtype: str, shared: "Runs | None" = None
    ) -> None:
        self.opened, self.settings, self.shared = opened, settings, shared
        self.device = resolve_device(device)
        self.dtype = str(resolve_dtype(dtype, self.device)).removeprefix("torch.")
        self.processor = processor_of(opened)
        self.folder = user_path(settings.output_dir)
        names = ("num_beams", "max_new_tokens", "repetition_penalty", "context")
        given = {name: value for name in names if (value := getattr(settings, name)) is not None}
        self.decoding = replace(Decoding.published(self.processor.template), **given)
        self.engine = None
        if shared is not None and settings.engine != shared.settings.engine:
            raise UserError(
                f"found the engine {settings.engine} beside {shared.settings.engine}: a suite has one engine; name it "
                "under evaluation"
            )
        if settings.engine is not None:
            from stllm.conversation.remote import RemoteLanguageModel, check_decoding

            check_decoding(self.decoding)
            if shared is not None:
                self.engine = shared.engine
            else:
                self.engine = RemoteLanguageModel(settings.engine)
                self.engine.find_model()

    @cached_property
    def chat(self) -> Chat:
        """Load the model at the first access. Videos are not cached, because each clip is encoded only once."""
        if self.shared is not None:
            return self.shared.chat
        part = "whole" if self.engine is None else "embedding"
        model, _ = load_opened(self.opened, device=str(self.device), dtype=self.dtype, language_model=part)
        if self.engine is not None:
            self.engine.compare(model.get_input_embeddings())
        return Chat(model=model, processor=self.processor, cache_bytes=0, engine=self.engine)

    @cached_property
    def _checkpoint(self) -> str:
        if self.shared is not None:
            return self.shared._checkpoint
        return checkpoint_digest(self.opened.sources)

    def run(self, loaded: Loaded, name: str, *, variant: str = "") -> Outcome | None:
        """Ask the items that have no answer yet, and write records to `<name>.jsonl`. A collective call.

        variant: name of a probe's variant, "" for the unchanged benchmark. Returns None except in the main process.
        Raises UserError for records with other settings or items, a full disk, or another process that writes to the
        file; and whatever the model raises.
        """
        files = RecordFiles(self.folder, name)
        ids = [item.id for item in loaded.items]
        with files.locked() if is_main() else nullcontext():
            if is_main():
                settings, file = self._settings(loaded, variant), self.folder / f"{name}.config.yaml"
                if records := files.gather():
                    check_same(file, settings, files.path)
                    check_items(files.path, records, loaded.items)
                files.join(ids)
                with naming_full_disk(file):
                    write_text(file, OmegaConf.to_yaml(OmegaConf.create(settings)))
            wait_for_all()  # until the main process has joined the records of earlier runs
            done = {id_ for id_, record in files.read().items() if not record.get("error")}
            pending = [item for item in loaded.items if item.id not in done]
            if is_main():
                log.info("%s: %d items to ask, %d are answered", name, len(pending), len(ids) - len(pending))
            if mine := share(pending, rank(), world_size()):
                self._ask(files, loaded, mine)
            wait_for_all()
            if not is_main():
                return None
            records = files.join(ids)
        if missing := [id_ for id_ in ids if id_ not in records]:
            raise UserError(f"{files.path} lacks {len(missing)} items ({missing[0]}): run the same command again")
        asked = [item for item in loaded.items if item.media is not None]
        digests = {
            "config": content_digest(decisive(settings)),
            "prompts": content_digest([[item.id, item_prompts(loaded, item, self.processor)] for item in asked]),
            "checkpoint": self._checkpoint,
        }
        spent = sum(sum(record["seconds"].values()) for record in records.values())
        return Outcome(list(records.values()), settings, digests, spent)

    def _settings(self, loaded: Loaded, variant: str) -> dict[str, Any]:
        """Return all settings on which answers depend, as values that YAML can hold."""
        config, processor = self.opened.config, self.processor
        return {
            "benchmark": loaded.name,
            **({"variant": variant} if variant else {}),
            "evaluation": {**asdict(self.settings), "engine": self.engine and self.engine.address},
            "decoding": asdict(self.decoding),
            "prompt": item_prompts(loaded, SAMPLE, processor)[0],
            "model": {
                "checkpoint": self._checkpoint,
                "dtype": self.dtype,
                **({} if self.engine is None else {"engine": self.engine.server}),
                "quantization": quantization_of(self.opened.settings) if self.engine is None else None,
                **{name: getattr(config, name) for name in ("num_frames", "video_input", "residual_size")},
                "image_size": config.vision_config["image_size"],
                "template": processor.template.name,
                **{name: getattr(processor, name) for name in ("system", "max_txt_len", "end_sym")},
            },
        }

    def _ask(self, files: "RecordFiles", loaded: Loaded, items: Sequence[Item]) -> None:
        """Ask this process's items, and write each record as soon as it is complete."""
        asker = Asker(
            self.chat,
            loaded,
            decoding=self.decoding,
            batch_size=self.settings.batch_size,
            num_workers=one_a_core(self.settings.num_workers),
            media_seconds=self.settings.media_seconds,
        )
        alone = world_size() == 1
        title = files.name if alone else f"{files.name} (1 of {world_size()} processes)"
        bar = tqdm(total=len(items), desc=title, unit="item", disable=None if is_main() else True)
        with Appender(files.path if alone else files.part(rank())) as lines, bar:
            for record in asker.records(items):
                lines.add(record)
                bar.update()


class RecordFiles:
    """The files with the records of one evaluation: `<name>.jsonl`, and one part per process while several run."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.jsonl"

    def part(self, rank: int) -> Path:
        """Return the path of the part that the process `rank` writes."""
        return self.folder / f"{self.name}.part-{rank}.jsonl"

    def read(self) -> dict[str, Record]:
        """Read `<name>.jsonl`. Returns item id -> record, in the file's order."""
        return self._by_id([self.path])

    def gather(self) -> dict[str, Record]:
        """Read the records of all processes. Returns item id -> record; an answer has priority over an error."""
        return self._by_id([self.path, *self._parts()])

    def join(self, order: Sequence[str]) -> dict[str, Record]:
        """Join the records of all processes in `<name>.jsonl`, and return them. Only the main process may call this.

        order: all item ids in the ground truth's order. Raises UserError for a full disk or an invalid line; then all
        files stay as they were.
        """
        parts, found = self._parts(), self.gather()
        records = {id_: found[id_] for id_ in order if id_ in found}
        assert len(records) == len(found), found.keys() - records.keys()
        if self.path.is_file() or records:
            with naming_full_disk(self.path):
                write_text(self.path, "".join(map(line_of, records.values())))
        for path in parts:  # if the process is killed before this, the next run joins the parts again
            path.unlink(missing_ok=True)
        return records

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock for writing. Raises UserError if another run holds it."""
        busy = f"{self.path}: another process writes to it: wait until it ends, or name another --output-name"
        return locked(self.folder / f".{self.name}.lock", busy)

    def _parts(self) -> list[Path]:
        """List the existing parts, which may come from a run with another number of processes."""
        return sorted(self.folder.glob(f"{glob.escape(self.name)}.part-*.jsonl"))

    @staticmethod
    def _by_id(paths: Iterable[Path]) -> dict[str, Record]:
        found: dict[str, Record] = {}
        for path in paths:
            for number, record in read_records(path, ADVICE):
                id_ = record.get("id")
                if not isinstance(id_, str):
                    raise UserError(f"{path}, line {number}: found the id {id_!r}, {ADVICE}")
                if id_ not in found or found[id_].get("error") or not record.get("error"):
                    found[id_] = record
        return found


# ---- checks before resuming -----------------------------------------------------------------------------------------


def check_items(path: Path, records: Mapping[str, Record], items: Sequence[Item]) -> None:
    """Raise UserError if a record's item is not asked in this run, or if an answered item has changed.

    A failed item may have changed, because it is asked again.
    """
    asked = {item.id: item for item in items}
    if gone := [id_ for id_ in records if id_ not in asked]:
        raise UserError(
            f"{path} answers {len(gone)} items that are not asked now ({gone[0]}): ask for them too (--tasks, --limit, "
            "--anno-path), or name another --output-name"
        )
    for id_, record in records.items():
        for key, now in ({} if record.get("error") else head(asked[id_])).items():
            if record.get(key) != now:
                raise UserError(
                    f"{path}: the ground truth is another one now: {key} of {id_} was {record.get(key)!r} and is "
                    f"{now!r}; name another --output-name to begin anew"
                )


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed, by dotted key."""
    return {key: value for key, value in flat(settings).items() if not FREE.fullmatch(key)}


def check_same(path: Path, settings: Mapping[str, Any], records: Path) -> None:
    """Raise UserError, naming the first changed setting, unless `records` were made with these settings.

    path: the file with the settings of those records. records: the file of records, for the message.
    """
    another = "name another --output-name to begin anew"
    if not path.is_file():
        raise UserError(f"{records} has records, but the file of their settings, {path.name}, is missing: {another}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml, OmegaConf and the file system raise many types
        raise UserError(f"{path} cannot be read ({error}): {another}") from error
    made = {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}
    if changes := describe_changes(decisive(made), decisive(settings)):
        raise UserError(f"{records} was made with another setting: {changes}; set it back to continue, or {another}")


# ---- digests --------------------------------------------------------------------------------------------------------


def content_digest(content: Any) -> str:
    """Return the hash of a value that JSON can represent; the order of keys does not matter."""
    return _digest([json.dumps(content, sort_keys=True, ensure_ascii=False).encode()])


def item_prompts(loaded: Loaded, item: Item, processor: PromptProcessor) -> list[dict[str, Any]]:
    """Return, for each question of the item, a dictionary with the prompt's `pieces` and the text for the `qformer`."""
    template = processor.template
    prompts = []
    for request in loaded.requests(item, template):
        turn = request.turns[-1]
        system = processor.system if request.system is None else request.system
        pieces = request.pieces or template.render(turn, first=True, media="video", system=system)
        prompts.append({"pieces": list(pieces), "qformer": template.text(turn)})
    return prompts


def checkpoint_digest(sources: Sequence[Source]) -> str:
    """Return the hash of a checkpoint: names, sizes and content of its weights, tokenizer and configuration files.

    Of large files, only samples are hashed. So two checkpoints that differ in a few numbers may have the same hash;
    but training changes nearly all trained weights.
    """
    parts: list[bytes] = []
    for place in (source.path for source in sources):
        files = [place]
        if not place.is_file():
            beside = {path for pattern in BESIDE for path in place.glob(pattern) if path.is_file()}
            files = sorted({*weight_files(place), *beside})
        for path in files:
            size = path.stat().st_size
            parts.append(f"{path.name} {size}".encode())
            with path.open("rb") as stream:
                for start in (0,) if size <= SMALL else (*range(0, size, STRIDE), size - BLOCK):
                    stream.seek(start)
                    parts.append(stream.read(-1 if size <= SMALL else BLOCK))
    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
