"""MVBench: twenty tasks of multiple-choice questions about time in videos, prompted and scored as published.

Sources: arXiv 2311.17005 and its release for tasks, data and matching; arXiv 2404.00308 for the prompt. A user's own
tasks may be added in the same format. The release's branch `video` on the hub, which lmms-eval reads, has other media
folders: with converted videos, and with videos that are already cut to start and end. These are searched after the
official folders.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from stllm.common.errors import UserError, did_you_mean
from stllm.common.files import user_path
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import Fields, text_of
from stllm.datasets.faults import (
    Fault,
    Finding,
    Medium,
    check_bounds,
    check_name,
    check_texts,
    pairs_of,
    records_of,
    shortened,
)
from stllm.evaluation.benchmarks.base import Benchmark, Entry, Item, Record
from stllm.evaluation.benchmarks.ground_truth import MediaFolders, Search, chosen_tasks
from stllm.evaluation.scores import (
    ITEMS,
    by_task,
    chosen_option,
    gold_option,
    official_match,
    strict_match,
    tally,
)
from stllm.processors.templates import ANSWER_BEGINS, REQUEST, SYSTEM, PromptTemplate, Turn, question_block

EXPECTED = "a JSON list of {video, question, candidates, answer}"
SHOWN_IDS = 5  # item ids that a note lists at most
ANSWER_MARK = "###Assistant: "


@dataclass(frozen=True)
class MVBenchTask:
    """One task of MVBench. Folders are relative to the media root.

    name: the name in tables. folder: the official folder of its media. fallbacks: folders of videos that were added
    later or converted. segments: folders of videos that are already cut to start and end.
    bounded: items have start and end. fps: frames per second, if its media are folders of numbered images.
    """

    name: str
    folder: str
    fallbacks: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    bounded: bool = False
    fps: float | None = None

    @property
    def file(self) -> str:
        """Return the name of the task's annotation file in the folder `json`."""
        return self.name.lower().replace(" ", "_").replace("-", "_") + ".json"

    @property
    def folders(self) -> tuple[str, ...]:
        """Return all folders to search for the task's media, in order."""
        return (self.folder, *self.fallbacks, *self.segments)

    @property
    def media(self) -> str:
        """Return the kind of the task's media: "video", or "frames" for folders of numbered images."""
        return "frames" if self.fps else "video"


_STAR = (
    *("star/Charades_v1_480", ("data0613/star/Charades_v1_480", "data0613/star")),
    ("star/Charades_segment", "data0613/star/Charades_segment"),
)
_CLEVRER = ("clevrer/video_validation", ("data0613/clevrer/video_validation", "data0613/clevrer"))
_PERCEPTION = "perception/videos"

TASKS = (
    MVBenchTask("Action Sequence", *_STAR, bounded=True),
    MVBenchTask("Action Prediction", *_STAR, bounded=True),
    MVBenchTask("Action Antonym", "ssv2_video", ("ssv2_video_mp4",)),
    MVBenchTask("Fine-grained Action", "Moments_in_Time_Raw/videos"),
    MVBenchTask("Unexpected Action", "FunQA_test/test"),
    MVBenchTask("Object Existence", *_CLEVRER),
    MVBenchTask("Object Interaction", *_STAR, bounded=True),
    MVBenchTask("Object Shuffle", _PERCEPTION),
    MVBenchTask("Moving Direction", *_CLEVRER),
    MVBenchTask("Action Localization", "sta/sta_video", segments=("sta/sta_video_segment",), bounded=True),
    MVBenchTask("Scene Transition", "scene_qa/video"),
    MVBenchTask("Action Count", _PERCEPTION),
    MVBenchTask("Moving Count", *_CLEVRER),
    MVBenchTask("Moving Attribute", *_CLEVRER),
    MVBenchTask("State Change", _PERCEPTION),
    MVBenchTask("Fine-grained Pose", "nturgbd", ("nturgbd_convert",)),
    MVBenchTask("Character Order", _PERCEPTION),
    MVBenchTask("Egocentric Navigation", "vlnqa"),
    MVBenchTask(
        "Episodic Reasoning", "tvqa/frames_fps3_hq", segments=("tvqa/video_fps3_hq_segment",), bounded=True, fps=3.0
    ),
    MVBenchTask("Counterfactual Inference", *_CLEVRER),
)


@dataclass(frozen=True)
class MVBench(Benchmark):
    """MVBench, or a benchmark in the same format. own_tasks: other JSON files are accepted as the user's tasks."""

    name: str = "mvbench"
    title: str = "MVBench"
    tasks: tuple[MVBenchTask, ...] = TASKS
    own_tasks: bool = True
    mean_over: str = ITEMS

    excludes_tasks = finds_media = True
    rules = (
        "The official rule compares the first words of the prediction and of the answer, and counts the prediction as "
        "right if one word is part of the other. So an empty prediction, or one that is only a bracket, is always "
        "right. The strict rule accepts the option's letter or its exact text; anything else is wrong."
    )

    @property
    def ground_truth(self) -> str:  # type: ignore[override]
        """Return the description of the folder for --anno-path."""
        return f"{self.title}'s folder, which holds json and video"

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Read the configured tasks; see `_files` for the values of `path` and `video_dir`."""
        found, media_dir = self._files(path, settings.video_dir)
        if not found or not path.exists():
            what = "no JSON file" if path.exists() else "no such file or folder"
            sentence = (
                f"found {what}, expected {self.title}'s folder with json and video in it (such as "
                f"json/{self.tasks[0].file}): name that folder"
            )
            yield Fault("annotation", str(path), "folder", sentence)
            return
        official = [file for task in self.tasks for file in found if task_of(file, self.tasks) == task]
        if not self.own_tasks and (other := [file for file in found if file not in official]):
            names = ", ".join(task.file for task in self.tasks)
            sentence = f"no task of {self.title}, expected its files {names}: name {self.title}'s own folder"
            yield Fault("annotation", str(other[0]), "file", sentence)
            return
        files: dict[str, Path] = {}
        for file in dict.fromkeys((*official, *found)):
            if file.stem in files:
                sentence = f"there is also {files[file.stem].name}: keep one of the two"
                yield Fault("annotation", str(file), "file", sentence)
            files[file.stem] = file
        records: list[tuple[Path, str, str, Fields]] = []
        for slug in chosen_tasks(list(files), settings):
            for number, (where, fields) in enumerate(records_of(files[slug], EXPECTED, ("candidates",))):
                if isinstance(fields, Fault):
                    yield replace(fields, sentence=fields.sentence + self._official_name(files[slug]))
                else:
                    records.append((files[slug], f"{slug}/{number}", where, fields))
        if not records:
            return
        media = MediaFolders(media_dir, settings)
        entries = [self._entry(*record, media) for record in records]
        yield from entries
        # find files directly in the media folder that two tasks would share, although their official folders differ
        folders = {task.name: task.folder for task in self.tasks}
        users: dict[str, dict[str, Entry]] = {}  # path -> official folder -> first entry that uses the path
        for entry in entries:
            if entry.folder == "" and entry.item.task in folders:
                users.setdefault(entry.place, {}).setdefault(folders[entry.item.task], entry)
        for place, by_folder in users.items():
            if len(by_folder) > 1:
                *_, last = by_folder.values()
                tasks = " and ".join(f"{entry.item.task} ({folder}/)" for folder, entry in by_folder.items())
                sentence = (
                    f"{tasks} mean different videos by this name, but there is one file in the media folder itself: "
                    "put each task's videos into its own folder, or evaluate one of them with --tasks"
                )
                yield Fault("colliding names", last.medium.where if last.medium else "", place, sentence)

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return the item's single request. The Q-Former reads only the question and its options."""
        block = question_block(item.questions[0], item.candidates)
        pieces = prompt_pieces(block, SYSTEM if system is None else system, template)
        return (Request(turns=(Turn(block),), media=item.media, pieces=pieces),)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return `prediction`, `gold` (the correct option in the form "(A) text"), `correct` and `parsed`.

        `prediction` is built as in the official script: "(", with which the prompt ends, and the reply's first line."""
        prediction = "(" + predictions[0].split("\n")[0]
        gold = gold_option(item.candidates, item.answer)
        correct = {
            "official": official_match(prediction, gold),
            "strict": strict_match(prediction, item.candidates, item.answer),
        }
        parsed = {"strict": chosen_option(prediction, item.candidates) is not None}
        return {"prediction": prediction, "gold": gold, "correct": correct, "parsed": parsed}

    def official(self, items: Sequence[Item], records: Sequence[Record]) -> Mapping[str, Any]:
        """Return `acc_dict`, task -> [number correct by the official rule, number of items], and `res_list`, the
        predictions. Failed items count in `acc_dict`, but are not in `res_list`: the official script would count their
        empty predictions as correct."""
        tallies = {name: tally(lines) for name, lines in by_task(records).items()}
        accuracies = {name: [task.right["official"], task.asked] for name, task in tallies.items()}
        results = [
            {"pred": line["prediction"], "gt": line["gold"], "id": line["id"], "task_type": line["task"]}
            for line in records
            if not line.get("error")
        ]
        return {"": {"acc_dict": accuracies, "res_list": results}}

    def notes(self, entries: Sequence[Entry], settings: EvaluationSettings) -> Iterator[str]:
        """Yield notes on media outside the official folders, negative starts clamped to 0, and tasks without a file."""
        official = {task.name: task for task in self.tasks}
        elsewhere: dict[str, Counter[str]] = {}
        for entry in entries:
            task = official.get(entry.item.task)
            if task is not None and entry.folder not in (None, task.folder):
                elsewhere.setdefault(str(entry.folder), Counter())[task.name] += 1
        segments = {folder for task in self.tasks for folder in task.segments}
        for folder, counts in elsewhere.items():
            found = ", ".join(f"{task} {count}" for task, count in counts.items())
            cut = "; its videos are cut already, so start and end are not applied" if folder in segments else ""
            place = folder or "the media folder itself"
            yield f"items whose media were found in {place} instead of the official folder: {found}{cut}"
        clamped = [entry.item.id for entry in entries if entry.item.media and (entry.item.media.start or 0) < 0]
        if clamped:
            shown = ", ".join(clamped[:SHOWN_IDS]) + (", ..." if len(clamped) > SHOWN_IDS else "")
            yield f"items whose negative start is clamped to 0, as in the official script: {len(clamped)} ({shown})"
        there = {entry.item.task for entry in entries}
        absent = [name for name in official if name not in there]
        if absent and len(absent) < len(official) and not settings.tasks:
            yield f"tasks without an annotation file: {len(absent)} of {len(official)} ({', '.join(absent)})"

    def _files(self, root: Path, video_dir: str | None) -> tuple[list[Path], Path]:
        """Return the annotation files of a copy of the benchmark, and the root folder of its media.

        root: the folder that contains `json` and `video`, the folder `json`, any folder of JSON files, or one file.
        video_dir: the root folder of the media; None for `video`, or the folder of `json` as in the hub's branch
        `video`. Raises UserError if root is a parent of the benchmark's folder.
        """
        folder = root / "json" if (root / "json").is_dir() else root
        files, holder = [root], folder.parent
        if folder.is_dir():
            found = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
            # skip hidden files: archives packed on a Mac contain a ._NAME.json for every file
            files, holder = [file for file in found if not file.name.startswith(".")], folder
        if video_dir is not None:
            return files, user_path(video_dir)
        above = holder.parent if holder.name == "json" else holder
        media = above / "video"
        if not media.is_dir() and any((above / folder).is_dir() for task in self.tasks for folder in task.folders):
            media = above
        below = sorted(path.parent for path in root.glob("*/json") if path.is_dir())
        if not media.is_dir() and below:
            folders = " or ".join(map(str, below))
            raise UserError(f"{root}: found no folder json in it, expected {self.title}'s own folder: name {folders}")
        return files, media

    def _official_name(self, file: Path) -> str:
        """Return "; did you mean ...?" with the nearest official file name; "" if it is official or none is near."""
        return did_you_mean(file.name, [task.file for task in self.tasks]) if task_of(file, self.tasks) is None else ""

    def _entry(self, file: Path, id: str, where: str, fields: Fields, media: MediaFolders) -> Entry:
        """Return the entry of one record.

        A file whose name is not official is the user's own task. Its media are directly in the media folder, and start
        and end are optional.
        """
        task = task_of(file, self.tasks)
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
        findings = _check(fields, where, bounded=task is None or task.bounded)
        if task is None:
            entry = media.entry(item, findings, Search())
            if entry.folder is None:
                entry = replace(entry, item=replace(entry.item, error=entry.item.error + self._official_name(file)))
            return entry
        frames = {task.folder: task.fps} if task.fps else None
        # the media folder itself ("") is searched last, for files that a user put there
        search = Search((*task.folders, ""), segments=task.segments, frames=frames)
        return media.entry(item, findings, search, needs_bounds=task.bounded)


benchmarks.register(MVBench.name)(MVBench())


def prompt_pieces(block: str, system: str, template: PromptTemplate) -> tuple[str, ...]:
    """Return the prompt that ends in "Best option:(", as `Request.pieces`.

    For the InstructBLIP family, this is the published prompt. None was published for the MiniGPT-4 family, so the same
    text takes the place of the question in that family's template.
    """
    *before, last = template.opening
    assert last.endswith(f" {ANSWER_MARK}"), last
    opening = (*before, last.removesuffix(f" {ANSWER_MARK}") + ANSWER_MARK + ANSWER_BEGINS)
    text = "".join(f"{part}\n" for part in (system, block, REQUEST) if part)
    return tuple(replace(template, opening=opening).render(Turn(text), first=True, media="video"))


def task_of(file: Path, tasks: Sequence[MVBenchTask] = TASKS) -> MVBenchTask | None:
    """Return the task with an annotation file of this name (as .json or .jsonl), or None."""
    return next((task for task in tasks if task.file == file.with_suffix(".json").name), None)


def _check(fields: Fields, where: str, *, bounded: bool) -> Iterator[Finding]:
    """Yield the faults of a record, and its medium. bounded: True to check start and end.

    A negative start is kept: the sampling rule `segment` clamps it to 0.
    """
    yield from check_texts(fields, where, {"question": "empty question", "answer": "empty answer"})
    candidates, answer = fields.get("candidates"), fields.get("answer")
    if not isinstance(candidates, list) or len(candidates) < 2 or not all(map(text_of, candidates)):
        found = f"found {shortened(candidates)}, expected a list of two texts or more: correct it"
        yield Fault("candidates", where, "candidates", found)
    else:
        if len(candidates) > len(ascii_uppercase):
            found = f"found {len(candidates)} candidates, expected at most one a letter: leave some out"
            yield Fault("candidates", where, "candidates", found)
        if text_of(answer) and answer not in candidates:
            found = f"{answer!r} is none of the candidates {', '.join(map(repr, candidates))}: correct either"
            yield Fault("candidates", where, "answer", found)
        for twice in sorted({repr(option) for option in candidates if candidates.count(option) > 1}):
            found = f"{twice} is listed twice, so no letter is sure; the official script takes the last: correct it"
            yield Fault("candidates", where, "candidates", found, note=True)
    bounds = (yield from check_bounds(fields, where, negative_start=True)) if bounded else None
    if bounds is not None and bounds[0] < 0:
        found = f"start is {bounds[0]:g} s: it is clamped to 0, as in the official script"
        yield Fault("bounds", where, "start, end", found, note=True)
    if name := (yield from check_name(fields, where, ("video",))):
        pairs = pairs_of(fields.get("question"), fields.get("answer"))
        yield Medium(where, name, "video", bounds=bounds, pairs=pairs)
