"""MVBench: twenty tasks of multiple choice about time in videos, asked and matched as published.

Source: arXiv 2311.17005 for data and matching, arXiv 2404.00308 for the prompt. Tasks of one's own, in the same form,
are asked alike.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError, did_you_mean
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import Fields, text_of
from stllm.doctor.checks import Fault, check_mvbench
from stllm.doctor.sources import records_of
from stllm.evaluation.ground_truth import Entry, MediaFolders, Search, chosen_tasks, entries_of, system_of
from stllm.evaluation.items import Item, Record
from stllm.evaluation.matching import gold_option, official_match, strict_match
from stllm.evaluation.mvbench_tasks import TASKS, MVBenchLayout, task_of
from stllm.evaluation.tallies import RULES, by_task, tally
from stllm.processors.choices import ANSWER_BEGINS, REQUEST, SYSTEM, question_block
from stllm.processors.templates import PromptTemplate, Turn

SHOWN_IDS = 5  # of the items that a note is about
ANSWER_MARK = "###Assistant: "


@dataclass(frozen=True)
class MVBench:
    """The benchmark, read. See `items.Benchmark`. system: the sentence before the question, "" for none.

    An item without a usable record or medium has `media` None and says why; a task without any medium is `excluded`.
    """

    items: Sequence[Item]
    excluded: Mapping[str, str]
    num_excluded: int
    system: str = SYSTEM
    notes: Sequence[str] = ()
    name: str = field(default="mvbench", init=False)

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """The one request; the Q-Former reads the question block alone."""
        block = question_block(item.questions[0], item.candidates)
        pieces = prompt_pieces(block, self.system, template)
        return (Request(turns=(Turn(block),), media=item.media, pieces=pieces),)

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """`prediction`: as the official script has it, "(" (with which the prompt ends) and the reply's first line;
        `gold`: the right option, in its form; `correct`: by either rule."""
        prediction = "(" + predictions[0].split("\n")[0]
        gold = gold_option(item.candidates, item.answer)
        correct = {
            "official": official_match(prediction, gold),
            "strict": strict_match(prediction, item.candidates, item.answer),
        }
        return {"prediction": prediction, "gold": gold, "correct": correct}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """Percent, by either rule: {"official": ..., "strict": ..., "differing": ids on which the rules differ}.

        Of each rule: `average` and `tasks` over all items that were asked, failed ones wrong; `average_answered` and
        `tasks_answered` over those that were answered, None where there is none. Averages are over items, not tasks.
        """
        tasks = {name: tally(lines) for name, lines in by_task(records).items()}
        total = tally(records)
        scores: dict[str, Any] = {
            rule: {
                "average": total.over_all(rule),
                "average_answered": total.over_answered(rule),
                "tasks": {name: task.over_all(rule) for name, task in tasks.items()},
                "tasks_answered": {name: task.over_answered(rule) for name, task in tasks.items()},
            }
            for rule in RULES
        }
        answered = [line for line in records if not line.get("error")]
        differing = [line["id"] for line in answered if line["correct"]["official"] != line["correct"]["strict"]]
        return {**scores, "differing": differing}

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """`acc_dict`: [right, asked] by the official rule, failed items among those asked; `res_list`: the answered
        ones, since an empty prediction would be right in the official script."""
        tallies = {name: tally(lines) for name, lines in by_task(records).items()}
        accuracies = {name: [task.right["official"], task.asked] for name, task in tallies.items()}
        results = [
            {"pred": line["prediction"], "gt": line["gold"], "id": line["id"], "task_type": line["task"]}
            for line in records
            if not line.get("error")
        ]
        return {"": {"acc_dict": accuracies, "res_list": results}}


def prompt_pieces(block: str, system: str, template: PromptTemplate) -> tuple[str, ...]:
    """The prompt that ends in "Best option:(", as pieces of `Request`.

    The InstructBLIP family's is the published one. For the MiniGPT-4 family none was published: the same words stand
    where that template has its question, which is our choice.
    """
    *before, last = template.opening
    assert last.endswith(f" {ANSWER_MARK}"), last
    opening = (*before, last.removesuffix(f" {ANSWER_MARK}") + ANSWER_MARK + ANSWER_BEGINS)
    text = "".join(f"{part}\n" for part in (system, block, REQUEST) if part)
    return tuple(replace(template, opening=opening).render(Turn(text), first=True, media="video"))


@benchmarks.register("mvbench")
def mvbench(settings: EvaluationSettings) -> MVBench:
    """Reads the annotation files and looks for their media. Raises UserError."""
    entries = entries_of(mvbench_entries(settings))
    items: list[Item] = []
    excluded: dict[str, str] = {}
    num_excluded = 0
    for task in dict.fromkeys(entry.item.task for entry in entries):
        of_task = [entry.item for entry in entries if entry.item.task == task]
        asked = of_task[: settings.limit]
        if any(item.media for item in of_task):
            items += asked
        else:
            excluded[task] = f"none of its {len(of_task)} items can be asked, the first one because: {of_task[0].error}"
            num_excluded += len(asked)
    if not items:
        task, reason = next(iter(excluded.items()))
        raise UserError(f"{settings.anno_path}: no task has media to be asked about; of {task} {reason}")
    return MVBench(
        items=items,
        excluded=excluded,
        num_excluded=num_excluded,
        system=system_sentence(settings),
        notes=tuple(_notes(entries, settings)),
    )


def mvbench_entries(settings: EvaluationSettings) -> Iterator[Entry | Fault]:
    """Every record of the chosen tasks, and the faults that concern whole files. Raises UserError."""
    if settings.anno_path is None:
        raise UserError("mvbench: no ground truth was named: give MVBench's folder, which holds json and video")
    layout = MVBenchLayout.of(settings.anno_path, settings.video_dir)
    if not layout.files:
        sentence = (
            "found no JSON file, expected MVBench's folder with json and video in it (such as "
            f"json/{TASKS[0].file}): name that folder"
        )
        yield Fault("annotation", str(settings.anno_path), "folder", sentence)
        return
    files: dict[str, Path] = {}
    for file in sorted(layout.files, key=_place):
        if file.stem in files:
            yield Fault("annotation", str(file), "file", f"there is also {files[file.stem].name}: keep one of the two")
        files[file.stem] = file
    records: list[tuple[Path, str, str, Fields]] = []
    for slug in chosen_tasks(list(files), settings):
        for number, (where, fields) in enumerate(records_of(files[slug], "mvbench")):
            if isinstance(fields, Fault):
                yield replace(fields, sentence=fields.sentence + _official_name(files[slug]))
            else:
                records.append((files[slug], f"{slug}/{number}", where, fields))
    if not records:
        return
    media = MediaFolders(layout.media, settings)
    entries = [_entry(*record, media) for record in records]
    yield from entries
    yield from _collisions(entries)


def _entry(file: Path, id: str, where: str, fields: Fields, media: MediaFolders) -> Entry:
    """The entry of one record.

    A file whose name is not official is a task of the user's: its media are in the media folder itself, and start and
    end are used where a record has them.
    """
    task = task_of(file)
    candidates = fields.get("candidates")
    item = Item(
        id=id,
        task=task.name if task else file.stem.replace("_", " ").replace("-", " ").title(),
        video=text_of(fields.get("video")) or "",
        media=None,
        questions=(text_of(fields.get("question")) or "",),
        answer=text_of(fields.get("answer")) or "",
        candidates=tuple(text_of(option) or "" for option in candidates) if isinstance(candidates, list) else (),
        fields=fields,
    )
    findings = check_mvbench(fields, where, bounded=task is None or task.bounded)
    if task is None:
        entry = media.entry(item, findings, Search())
        if entry.folder is None:
            entry = replace(entry, item=replace(entry.item, error=entry.item.error + _official_name(file)))
        return entry
    frames = {task.folder: task.fps} if task.fps else None
    # what is in the media folder itself was put there by hand
    search = Search((*task.folders, ""), segments=task.segments, frames=frames)
    return media.entry(item, findings, search, needs_bounds=task.bounded)


def _official_name(file: Path) -> str:
    """The end of a message about a file of another name: the official name that is nearest, if one is near."""
    return did_you_mean(file.name, [task.file for task in TASKS]) if task_of(file) is None else ""


def _collisions(entries: Sequence[Entry]) -> Iterator[Fault]:
    """Faults of files in the media folder itself that tasks with different official folders would share."""
    folders = {task.name: task.folder for task in TASKS}
    users: dict[str, dict[str, Entry]] = {}  # place -> the first entry of each media folder
    for entry in entries:
        if entry.folder == "" and entry.item.task in folders:
            users.setdefault(entry.place, {}).setdefault(folders[entry.item.task], entry)
    for place, by_folder in users.items():
        if len(by_folder) > 1:
            *_, last = by_folder.values()
            tasks = " and ".join(f"{entry.item.task} ({folder}/)" for folder, entry in by_folder.items())
            sentence = (
                f"{tasks} mean different videos by this name, but there is one file in the media folder itself: put "
                "each task's videos into its own folder, or evaluate one of them with --tasks"
            )
            yield Fault("colliding names", last.medium.where if last.medium else "", place, sentence)


def _notes(entries: Sequence[Entry], settings: EvaluationSettings) -> Iterator[str]:
    """Sentences for the results: media found outside the official folders, clamped starts, tasks without a file."""
    official = {task.name: task for task in TASKS}
    elsewhere: dict[str, Counter[str]] = {}
    for entry in entries:
        task = official.get(entry.item.task)
        if task is not None and entry.folder not in (None, task.folder):
            elsewhere.setdefault(str(entry.folder), Counter())[task.name] += 1
    segments = {folder for task in TASKS for folder in task.segments}
    for folder, counts in elsewhere.items():
        found = ", ".join(f"{task} {count}" for task, count in counts.items())
        cut = "; its videos are cut already, so start and end are not applied" if folder in segments else ""
        place = folder or "the media folder itself"
        yield f"items whose media were found in {place} instead of the official folder: {found}{cut}"
    clamped = [entry.item.id for entry in entries if entry.item.media and (entry.item.media.start or 0) < 0]
    if clamped:
        shown = ", ".join(clamped[:SHOWN_IDS]) + (", ..." if len(clamped) > SHOWN_IDS else "")
        yield f"items whose negative start is clamped to 0, as in the official script: {len(clamped)} ({shown})"
    there = {entry.item.task for entry in entries} & official.keys()
    if there and not settings.tasks and len(there) < len(TASKS):
        absent = ", ".join(name for name in official if name not in there)
        yield f"tasks without an annotation file: {len(TASKS) - len(there)} of {len(TASKS)} ({absent})"


def _place(file: Path) -> tuple[int, str]:
    """Tasks in the order of the benchmark's table, others after them."""
    task = task_of(file)
    return (len(TASKS) if task is None else TASKS.index(task), file.name)


def system_sentence(settings: EvaluationSettings) -> str:
    """The sentence in the prompt: the benchmark's own unless the settings have a text, or "" for none."""
    return SYSTEM if (system := system_of(settings)) is None else system
