"""`stllm doctor`: checks training and benchmark data before use, and lists all faults, not only the first.

With faults, the exit code is 1, and a summary is printed on stderr. Notes, which are faults that do not prevent an
evaluation, do not change the exit code. Benchmarks are read by the same code as in `stllm evaluate`.
`--flatten IN OUT` does not check anything: it converts an annotation file to one question and answer per record.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from stllm.common.distributed import CHUNK, mapping, one_a_core
from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.common.registry import benchmarks
from stllm.common.schema import MEDIA_SECONDS, DatasetSettings, EvaluationSettings
from stllm.datasets.annotations import flatten
from stllm.datasets.faults import KINDS, Fault, Medium
from stllm.datasets.features import clip_key
from stllm.datasets.samples import LengthCheck
from stllm.datasets.shards.sources import allow_pipes, expand_shards
from stllm.doctor.checks import (
    Use,
    at_least_words,
    check_clips,
    check_features,
    check_shard,
    check_use,
    training_findings,
)
from stllm.evaluation.benchmarks.base import Benchmark, read_entries
from stllm.evaluation.benchmarks.videoqa import ANY
from stllm.media.find import MediaFinder

MAX_LISTED = 20  # faults listed per kind, without --all
MAX_WORKERS = 8  # the most processes if --num-workers is not given
SHARDS = {"image_text": "image", "video_text": "video"}  # type of a data set -> media in its shards
SHORT = 3  # words; two different answers to one question are a contradiction only if they are this short

Task = Callable[[], list[Fault]]


@dataclass
class Report:
    """The result of a check: how much was read, and the faults.

    decode: the option --decode. data_sets: name -> number of records, or of shards. notes: what was not checked, and
    why.
    """

    decode: str
    num_records: int = 0
    num_media: int = 0
    num_shards: int = 0
    data_sets: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> str:
        """Return the numbers of records, media and shards in words."""
        parts = (
            (self.num_records, "record", "records"),
            (self.num_media, "medium", "media"),
            (self.num_shards, "shard", "shards"),
        )
        return ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in parts if count) or "no record"


def counts(faults: Sequence[Fault]) -> dict[str, int]:
    """Count faults by kind, in the order of KINDS."""
    kinds = [fault.kind for fault in faults]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def run(args: argparse.Namespace) -> int:
    """Run the command, and return its exit code."""
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
        for note in report.notes:
            print(note)
        if not report.faults:
            print(f"nothing found in {report.size}")
        for kind, count in counts(report.faults).items():
            print(f"{count} {kind}: {KINDS[kind]}")
            found = [fault for fault in report.faults if fault.kind == kind]
            for fault in found if args.all else found[:MAX_LISTED]:
                subject = "" if fault.subject == fault.where else f" {fault.subject}:"
                print(f"  {fault.where}:{subject} {fault.sentence}{' (a note)' if fault.note else ''}")
            if not args.all and count > MAX_LISTED:
                print(f"  ... and {count - MAX_LISTED} more (--all lists them)")
    faults = [fault for fault in report.faults if not fault.note]
    if not faults:
        return 0
    sys.stdout.flush()  # keeps the order if stdout and stderr go to the same place
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts(faults).items())
    print(f"found {len(faults)} {'fault' if len(faults) == 1 else 'faults'} in {report.size}: {kinds}", file=sys.stderr)
    return 1


def examine(args: argparse.Namespace) -> Report:
    """Check all records, then all media. args: the command's options. Raises UserError for an invalid configuration."""
    report, survey = Report(decode=args.decode), Survey()
    seconds = args.media_seconds
    if seconds is None:  # decoding all frames of a film takes longer
        seconds = 12 * MEDIA_SECONDS if args.decode == "all" else MEDIA_SECONDS
    limits: dict[str, Any] = {"decode": args.decode, "media_seconds": seconds}
    tasks: list[Task] = []
    data_sets: dict[str, DatasetSettings] = {}
    check: LengthCheck = at_least_words
    if args.cfg_path is not None:
        from stllm.common.config import load_config
        from stllm.datasets.corpora import resolved_settings

        cfg = load_config(args.cfg_path, args.options, model_type="instructblip_vicuna0")
        data_sets, check = resolved_settings(cfg), _length_check(cfg, report)
    elif args.format == "shards":
        data_sets["shards"] = DatasetSettings(type="image_text", shards=args.anno_path)
    elif args.format == "vc2":
        folder = args.video_dir or os.path.dirname(args.anno_path) or "."
        data_sets["vc2"] = DatasetSettings(anno_path=args.anno_path, media_dir=folder)
    else:
        benchmark = ANY if args.format == ANY.name else benchmarks.get(args.format)
        report.faults += _benchmark_faults(benchmark, args, report, survey)
    for name, settings in data_sets.items():
        if settings.type in SHARDS:
            shards = expand_shards(settings.shards)
            report.num_shards += len(shards)
            if args.cfg_path is not None:
                report.data_sets[name] = len(shards)
            check_one = partial(
                check_shard,
                kind=None if args.format == "shards" else SHARDS[settings.type],
                decode=args.decode,
                cache_dir=settings.cache_dir,
                cache_gb=settings.cache_gb,
                media_seconds=seconds,
            )
            tasks += [partial(check_one, shard) for shard in shards]
            continue
        if settings.anno_path is None:
            report.faults.append(Fault("annotation", name, "anno_path", "none is given; name the annotation file"))
            continue
        report.data_sets[name] = 0
        folder, keys = settings.media_dir or "", []
        in_tars: dict[str, str] = {}
        findings = training_findings(settings, check)
        for finding in tqdm(findings, desc=name, unit=" records", disable=None, delay=1, leave=False):
            if isinstance(finding, Fault):
                report.faults.append(finding)
                continue
            report.num_records += 1
            report.data_sets[name] += 1
            if settings.features_dir is not None:  # training reads these features instead of the media
                keys.append((clip_key(finding.name, finding.bounds), finding.where))
            elif finding.expects != "text" and settings.shards:
                in_tars.setdefault(finding.name, finding.where)
            elif finding.expects != "text":
                place = os.path.normpath(os.path.join(folder, finding.name))
                found = survey.finder.by_path(finding.name, [folder]) == place
                report.faults += survey.add(finding, place, found=found, root=folder, fps=settings.fps)
        if settings.features_dir is not None:
            tasks.append(partial(check_features, settings.features_dir, keys, **limits))
        if in_tars:
            expand_shards(settings.shards)  # an invalid list of shards ends the command
            report.num_media += len(in_tars)
            tasks.append(partial(check_clips, settings, in_tars, **limits))
    report.faults += survey.missing()
    report.num_media += len(survey.uses)
    tasks += [partial(check_use, use, **limits) for use in survey.uses.values()]
    report.faults += run_tasks(tasks, num_workers=one_a_core(args.num_workers, MAX_WORKERS))
    return report


def _benchmark_faults(
    benchmark: Benchmark, args: argparse.Namespace, report: Report, survey: "Survey"
) -> Iterator[Fault]:
    """Yield the faults of a benchmark's ground truth, and add its media to the survey."""
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


def _length_check(cfg: DictConfig, report: Report) -> LengthCheck:
    """Return the configured model's length check, or `at_least_words` if the model's files are missing."""
    from stllm.models.checkpoints.load import processor_of
    from stllm.models.settings import model_section, piece_paths
    from stllm.tasks.video_text_it import PositionLimit, open_configured

    absent = [path for path in piece_paths(model_section(cfg)) if not os.path.exists(path)]  # nothing is downloaded
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


def run_tasks(tasks: Sequence[Task], *, num_workers: int) -> Iterator[Fault]:
    """Run checks, and yield their faults in order, with a progress bar. num_workers: processes; 0: only this one."""
    died = (
        "a process died while it decoded: memory ran out, or a decoder crashed on a damaged file; run again "
        "with --num-workers 0 --debug to see on which"
    )
    with (
        tqdm(total=len(tasks), desc="media", disable=None, delay=1, leave=False) as bar,
        mapping(num_workers if len(tasks) > CHUNK else 0, died=died) as each,
    ):
        for faults in each(_call, tasks):
            yield from faults
            bar.update()


def _call(task: Task) -> list[Fault]:
    return task()


# ---- checks across records ------------------------------------------------------------------------------------------


class Survey:
    """Collects the media of all records, and finds faults that do not need opening a medium.

    Attribute uses: (path, expected kind) -> existing medium.
    """

    def __init__(self) -> None:
        self.finder = MediaFinder()
        self.uses: dict[tuple[str, str], Use] = {}
        self._missing: dict[str, Use] = {}
        self._answers: dict[int, tuple[str, str]] = {}

    def add(
        self, item: Medium, place: str, *, found: bool, root: str = "", fps: float | None = None, rule: str = ""
    ) -> Iterator[Fault]:
        """Add a record's medium. Yield the faults of its file name and of the record's answers.

        place: the path of the medium, or the expected path if not found. root: the folder that must contain the medium;
        "" for any. fps: frames per second of a frame folder, if the record has none. rule: as in `Use`.
        """
        inside = not root or (
            place.startswith(os.path.join(root, "")) and os.pardir not in place
        )  # a fast test that most paths pass
        if not inside and os.path.relpath(place, root).startswith(os.pardir):
            sentence = f"it lies outside the media folder {root}; move it there, and name it relative to that"
            yield Fault("outside", item.where, item.name, sentence)
        for question, answer in item.pairs:
            words = answer.lower().strip(" .!?\"'").split()  # ignore case and punctuation at the ends
            if question.strip() and len(words) <= SHORT:
                short = " ".join(words)
                asked = hash((place, item.bounds, question.strip().lower()))
                first, where = self._answers.setdefault(asked, (short, item.where))
                if first != short:
                    sentence = f"{question.strip()!r} is answered {answer!r} here and {first!r} in {where}: keep one"
                    yield Fault("contradiction", item.where, place, sentence)
        if not found:
            if place in self._missing:
                self._missing[place].num_records += 1
            else:
                self._missing[place] = Use(place, item.expects, item.where)
            return
        key = place, item.expects
        if key in self.uses:
            self.uses[key].num_records += 1
        else:
            self.uses[key] = Use(place, item.expects, item.where, item.fps or fps, item.num_frames, rule=rule)
            folder, name = os.path.split(place)
            others = [other for other in self.finder.listing(folder or ".").like(name) if other != name]
            if others:
                sentence = (
                    f"there is {', '.join(others)}, too; where case does not count, they are one file: rename one"
                )
                yield Fault("colliding names", item.where, place, sentence)
        if item.bounds is not None:
            self.uses[key].clips.append((item.bounds, item.where))

    def missing(self) -> Iterator[Fault]:
        """Yield a fault for each missing medium, or a single fault if the whole folder is missing."""
        folders: dict[str, Use] = {}
        for path, use in self._missing.items():
            parent, name = os.path.split(path)
            listing = self.finder.listing(parent or ".")
            if listing.exists:
                near = [*listing.like(name), *listing.with_stem(os.path.splitext(name)[0])]  # files with similar names
                todo = f"there is {near[0]}: correct the name" if near else "fetch it, or leave the record out"
                yield use.fault("missing", f"there is no such file; {todo}")
            elif parent in folders:
                folders[parent].num_records += use.num_records
            else:
                folders[parent] = replace(use, path=parent)
        for use in folders.values():
            yield use.fault("missing", "there is no such folder; check the media root, or fetch the media")
