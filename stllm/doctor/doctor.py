"""`stllm doctor`: checks data before hours are spent on it, and names all that is wrong, not only the first fault.

Exit code 1 when there are faults: the list on stdout, a line about it on stderr. Notes (faults that do not stop an
evaluation) leave it at 0. Benchmarks are read by the code of `stllm evaluate`.
`--flatten IN OUT` checks nothing: it writes an annotation file with one question and answer a record.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from omegaconf import DictConfig
from tqdm import tqdm

from stllm.common.distributed import one_a_core
from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.registry import benchmarks
from stllm.common.schema import MEDIA_SECONDS, DatasetSettings, EvaluationSettings, texts
from stllm.datasets.annotations import flatten
from stllm.datasets.faults import KINDS, Fault, Medium
from stllm.datasets.features import clip_key
from stllm.datasets.samples import LengthCheck
from stllm.datasets.shards import allow_pipes, expand_shards
from stllm.doctor.checks import Lengths, Source, at_least_words, training_source
from stllm.doctor.media import Survey, Task, check_use, run_tasks
from stllm.doctor.shards import check_features, check_shard
from stllm.evaluation.benchmarks.base import Benchmark, read_entries
from stllm.evaluation.benchmarks.videoqa import ANY

MAX_LISTED = 20  # faults of a kind, unless all are asked for
MAX_WORKERS = 8  # unless more are asked for


@dataclass
class Report:
    """What was looked at, and what was found wrong.

    data_sets: the number of records of each annotation file, or of shards, by the data set's name.
    """

    decode: str
    num_records: int = 0
    num_media: int = 0
    num_shards: int = 0
    data_sets: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be checked, and why

    @property
    def size(self) -> str:
        """What was looked at, in words."""
        parts = {"record": self.num_records, "medium": self.num_media, "shard": self.num_shards}
        plural = {"medium": "media"}
        words = (f"{count} {name if count == 1 else plural.get(name, name + 's')}" for name, count in parts.items())
        return ", ".join(word for word, count in zip(words, parts.values(), strict=True) if count) or "no record"


def counts(faults: Sequence[Fault]) -> dict[str, int]:
    """Faults by kind, in the order of KINDS."""
    kinds = [fault.kind for fault in faults]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def run(args: argparse.Namespace) -> int:
    """The command."""
    allow_pipes(args.allow_pipe)
    if args.flatten is not None:
        source, target = args.flatten
        num_read, num_empty, num_written = flatten(source, target)
        left_out = f"; left out, as they have no question: {num_empty}" if num_empty else ""
        print(
            f"written to {target}: {num_written} records of one question and answer each, from {num_read} of "
            f"{source}{left_out}"
        )
        return 0
    report = examine(args)
    if args.json:
        print(json.dumps({**asdict(report), "counts": counts(report.faults)}, ensure_ascii=False, indent=1))
    else:
        if args.cfg_path is not None:
            print("data sets, with the number of records (of image-text pairs: shards)")
            width = max(map(len, report.data_sets), default=0)
            for name, count in report.data_sets.items():
                print(f"  {name:{width}} {count:>9,}")
        for line in listing(report, MAX_LISTED if not args.all else None):
            print(line)
    faults = [fault for fault in report.faults if not fault.note]
    if not faults:
        return 0
    sys.stdout.flush()  # before the summary, where both go to one place
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts(faults).items())
    print(f"found {len(faults)} faults in {report.size}: {kinds}", file=sys.stderr)
    return 1


def examine(args: argparse.Namespace) -> Report:
    """Reads every record, then opens every medium; see the command's options. Raises UserError for a configuration."""
    report = Report(decode=args.decode)
    survey = Survey()
    seconds = args.media_seconds
    if seconds is None:  # all frames of a film take longer than those of a clip
        seconds = 12 * MEDIA_SECONDS if args.decode == "all" else MEDIA_SECONDS
    tasks: list[Task] = []
    benchmark = ANY if args.format == ANY.name else benchmarks.get(args.format) if args.format in benchmarks else None
    if benchmark is not None:
        report.faults += _benchmark(benchmark, args, report, survey)
    for source in _sources(args, report, tasks, seconds):
        items = _items(source, report)
        if source.features is not None:
            keys = [(clip_key(item.name, item.bounds), item.where) for item in items]
            tasks.append(partial(check_features, source.features, keys, decode=args.decode, media_seconds=seconds))
            continue
        for item in items:
            if item.expects != "text":
                place = os.path.normpath(os.path.join(source.folder, item.name))
                found = survey.finder.by_path(item.name, [source.folder]) == place
                report.faults += survey.add(item, place, found=found, root=source.folder, fps=source.fps)
    report.faults += survey.missing()
    report.num_media = len(survey.uses)
    tasks += [partial(check_use, use, args.decode, seconds) for use in survey.uses.values()]
    report.faults += run_tasks(tasks, num_workers=one_a_core(args.num_workers, MAX_WORKERS))
    return report


def listing(report: Report, most: int | None = None) -> Iterator[str]:
    """The report as lines, grouped by kind. most: faults listed of each kind; None: all."""
    yield from report.notes
    if not report.faults:
        yield f"nothing found in {report.size}"
    for kind, count in counts(report.faults).items():
        yield f"{count} {kind}: {KINDS[kind]}"
        found = [fault for fault in report.faults if fault.kind == kind]
        for fault in found[:most]:
            subject = "" if fault.subject == fault.where else f" {fault.subject}:"
            yield f"  {fault.where}:{subject} {fault.sentence}{' (a note)' if fault.note else ''}"
        if most is not None and count > most:
            yield f"  ... and {count - most} more (--all lists them)"


def _items(source: Source, report: Report) -> Iterator[Medium]:
    """The items of a source; its faults go to the report."""
    report.data_sets[source.name] = 0
    for finding in tqdm(source.findings, desc=source.name, unit=" records", disable=None, delay=1, leave=False):
        if isinstance(finding, Fault):
            report.faults.append(finding)
        else:
            report.num_records += 1
            report.data_sets[source.name] += 1
            yield finding


def _sources(args: argparse.Namespace, report: Report, tasks: list[Task], seconds: float) -> Iterable[Source]:
    """The annotation files that the options ask for; shards become tasks. seconds: the limit on reading a sample."""
    if args.cfg_path is not None:
        return _configured(args, report, tasks, seconds)
    if args.format == "shards":
        _add_shards(args.anno_path, report, tasks, args.decode, seconds)
        return []
    if args.format != "vc2":
        return []  # a benchmark
    return [training_source(args.format, args.anno_path, args.video_dir or os.path.dirname(args.anno_path) or ".")]


def _benchmark(benchmark: Benchmark, args: argparse.Namespace, report: Report, survey: Survey) -> Iterator[Fault]:
    """Faults of a benchmark's ground truth; its media go to the survey."""
    settings = EvaluationSettings(
        anno_path=args.anno_path, answers_path=args.answers_path, video_dir=args.video_dir, sampling="segment"
    )
    if not benchmark.finds_media and args.video_dir is None:
        path = user_path(args.anno_path)
        settings.video_dir = str(path if path.is_dir() else path.parent)
    entries = read_entries(benchmark, settings)
    try:
        for entry in tqdm(entries, desc=args.format, unit=" records", disable=None, delay=1, leave=False):
            if isinstance(entry, Fault):
                yield entry
                continue
            report.num_records += 1
            yield from entry.faults
            if entry.medium is not None:
                found = entry.folder is not None
                for fault in survey.add(entry.medium, entry.place, found=found, rule=settings.sampling):
                    yield replace(fault, note=True)
    except UserError as error:
        yield Fault("refused", str(args.anno_path), "file", str(error).removeprefix(f"{args.anno_path}: "))


def _configured(args: argparse.Namespace, report: Report, tasks: list[Task], seconds: float) -> Iterator[Source]:
    """The data sets of a configuration."""
    from stllm.common.config import load_config
    from stllm.datasets.corpora import resolved_settings

    cfg = load_config(args.cfg_path, args.options, model_type="instructblip_vicuna0")
    entries = resolved_settings(cfg)
    check = _length_check(cfg, report)
    for name, settings in entries.items():
        if settings.type == "image_text":
            before = report.num_shards
            _add_shards(settings.shards, report, tasks, args.decode, seconds, settings)
            report.data_sets[name] = report.num_shards - before
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
    """The configured model's length check; `at_least_words` if the model's files are not there."""
    from stllm.models.checkpoints.load import processor_of
    from stllm.models.settings import model_section, piece_paths
    from stllm.tasks.video_text_it import PositionLimit, open_configured

    settings = model_section(cfg)
    absent = [path for path in piece_paths(settings) if not os.path.exists(path)]  # nothing is downloaded for a check
    try:
        if absent:
            raise UserError(f"{absent[0]} is not here")
        opened = open_configured(cfg)
        return PositionLimit.of(opened.config, processor_of(opened)) or (lambda sample, num_frames: None)
    except UserError as error:
        report.notes.append(
            f"lengths are counted in words, not in tokens, because the model's files cannot be read: {error}"
        )
        return at_least_words


def _add_shards(
    shards: str | list[str],
    report: Report,
    tasks: list[Task],
    decode: str,
    seconds: float,
    settings: DatasetSettings | None = None,
) -> None:
    settings = settings or DatasetSettings()
    names = expand_shards(shards)
    report.num_shards += len(names)
    check = partial(
        check_shard,
        decode=decode,
        cache_dir=settings.cache_dir,
        cache_gb=settings.cache_gb,
        media_seconds=seconds,
    )
    tasks += [partial(check, name) for name in names]
