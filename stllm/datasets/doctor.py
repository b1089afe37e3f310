"""`stllm doctor`: checks data before hours are spent on them, and names all that is wrong, not the first thing alone.

Exit code 0 when nothing was found, 1 when something was: the list on stdout, a line about it on stderr.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

from omegaconf import DictConfig
from tqdm import tqdm

from stllm.common.datasets_section import DatasetSettings, texts
from stllm.common.errors import UserError
from stllm.common.pools import one_a_core
from stllm.datasets.doctor_checks import KINDS, Fault, Item, Lengths, at_least_words
from stllm.datasets.doctor_media import Survey, Task, check_use, run_tasks
from stllm.datasets.doctor_shards import check_features, check_shard
from stllm.datasets.doctor_sources import Source, mvbench_sources, training_source, vcgbench_source, videoqa_source
from stllm.datasets.features import clip_key
from stllm.datasets.image_text_shards import expand_shards
from stllm.datasets.samples import LengthCheck

MAX_LISTED = 20  # faults of a kind, unless all are asked for
MAX_WORKERS = 8  # unless more are asked for


@dataclass
class Report:
    """What was looked at, and what was found wrong."""

    decode: str
    num_records: int = 0
    num_media: int = 0
    num_shards: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be checked, and why

    @property
    def counts(self) -> dict[str, int]:
        """Faults by kind, in the order of KINDS."""
        kinds = [fault.kind for fault in self.faults]
        return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}

    @property
    def size(self) -> str:
        """What was looked at, in words."""
        parts = {"record": self.num_records, "medium": self.num_media, "shard": self.num_shards}
        plural = {"medium": "media"}
        words = (f"{count} {name if count == 1 else plural.get(name, name + 's')}" for name, count in parts.items())
        return ", ".join(word for word, count in zip(words, parts.values(), strict=True) if count) or "no record"


def run(args: argparse.Namespace) -> int:
    """The command."""
    report = examine(args)
    if args.json:
        print(json.dumps({**asdict(report), "counts": report.counts}, ensure_ascii=False, indent=1))
    else:
        for line in listing(report, MAX_LISTED if not args.all else None):
            print(line)
    if not report.faults:
        return 0
    sys.stdout.flush()  # before the summary, where both go to one place
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    print(f"found {len(report.faults)} faults in {report.size}: {kinds}", file=sys.stderr)
    return 1


def examine(args: argparse.Namespace) -> Report:
    """Reads every record, then opens every medium; see the command's options. Raises UserError for a configuration."""
    report = Report(decode=args.decode)
    survey = Survey()
    tasks: list[Task] = []
    for source in _sources(args, report, tasks):
        items = _items(source, report)
        if source.features is not None:
            keys = [(clip_key(item.name, item.bounds), item.where) for item in items]
            tasks.append(partial(check_features, source.features, keys, decode=args.decode))
            continue
        for item in items:
            report.faults += survey.add(item, source.folders, root=source.root, fps=source.fps)
    report.faults += survey.missing()
    report.num_media = len(survey.uses)
    tasks += [partial(check_use, use, args.decode) for use in survey.uses.values()]
    report.faults += run_tasks(tasks, num_workers=one_a_core(args.num_workers, MAX_WORKERS))
    return report


def listing(report: Report, most: int | None = None) -> Iterator[str]:
    """The report as lines, grouped by kind. most: faults listed of each kind; None: all."""
    yield from report.notes
    if not report.faults:
        yield f"nothing found in {report.size}"
    for kind, count in report.counts.items():
        yield f"{count} {kind}: {KINDS[kind]}"
        found = [fault for fault in report.faults if fault.kind == kind]
        for fault in found[:most]:
            subject = "" if fault.subject == fault.where else f" {fault.subject}:"
            yield f"  {fault.where}:{subject} {fault.sentence}"
        if most is not None and count > most:
            yield f"  ... and {count - most} more (--all lists them)"


def _items(source: Source, report: Report) -> Iterator[Item]:
    """The items of a source; its faults go to the report."""
    for finding in tqdm(source.findings, desc=source.name, unit=" records", disable=None, delay=1, leave=False):
        if isinstance(finding, Fault):
            report.faults.append(finding)
        else:
            report.num_records += 1
            yield finding


def _sources(args: argparse.Namespace, report: Report, tasks: list[Task]) -> Iterable[Source]:
    """The annotation files that the options ask for; shards become tasks."""
    if args.cfg_path is not None:
        return _configured(args, report, tasks)
    if args.format == "shards":
        _add_shards(args.anno_path, report, tasks, args.decode)
        return []
    if args.format == "mvbench":
        return mvbench_sources(args.anno_path, args.video_dir)
    folder = args.video_dir or os.path.dirname(args.anno_path) or "."
    if args.format == "vcgbench":
        return [vcgbench_source(args.anno_path, folder)]
    if args.format == "videoqa":
        return [videoqa_source(args.anno_path, folder, args.answers_path)]
    return [training_source(args.format, args.anno_path, folder)]


def _configured(args: argparse.Namespace, report: Report, tasks: list[Task]) -> Iterator[Source]:
    """The data sets of a configuration."""
    from stllm.common.config import load_config
    from stllm.datasets.corpora import resolved_settings

    cfg = load_config(args.cfg_path, args.options, model_type="instructblip_vicuna0")
    entries = resolved_settings(cfg)
    check = _length_check(cfg, report)
    for name, settings in entries.items():
        if settings.type == "image_text":
            _add_shards(settings.shards, report, tasks, args.decode, settings)
        elif settings.anno_path is None:
            report.faults.append(Fault("annotation", name, "anno_path", "none is given; name the annotation file"))
        else:
            yield training_source(
                name,
                settings.anno_path,
                settings.media_dir or "",
                media=settings.media,
                fps=settings.fps,
                features=settings.features_dir,
                lengths=Lengths(check, settings.num_frames, settings.multi_turn, tuple(texts(settings.instruction))),
            )


def _length_check(cfg: DictConfig, report: Report) -> LengthCheck:
    """The configured model's bound on lengths; without its files here, the one that counts words."""
    from stllm.models.factory import model_section, piece_paths
    from stllm.tasks.video_text_it import PositionLimit, config_and_processor

    settings = model_section(cfg)
    absent = [path for path in piece_paths(settings) if not os.path.exists(path)]  # nothing is downloaded for a check
    try:
        if absent:
            raise UserError(f"{absent[0]} is not here")
        return PositionLimit.of(*config_and_processor(cfg)) or (lambda sample, num_frames: None)
    except UserError as error:
        report.notes.append(
            f"lengths are counted in words, not in tokens, as the model's files cannot be read: {error}"
        )
        return at_least_words


def _add_shards(
    shards: str | list[str], report: Report, tasks: list[Task], decode: str, settings: DatasetSettings | None = None
) -> None:
    settings = settings or DatasetSettings()
    names = expand_shards(shards)
    report.num_shards += len(names)
    check = partial(check_shard, decode=decode, cache_dir=settings.cache_dir, cache_gb=settings.cache_gb)
    tasks += [partial(check, name) for name in names]
