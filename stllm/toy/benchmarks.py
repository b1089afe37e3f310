"""Twins of the benchmarks in the toy world: the official folders, file names and fields, with rendered clips.

    mvbench/json/<task>.json, mvbench/video/<MVBench's own folders>
    vcgbench/{generic,temporal,consistency}_qa.json
    msvd/test_qa.json, and as test_q.json + test_a.json; msrvtt the same
    activitynet/test_q.json + test_a.json
    tgif/test_qa.json

Media of all but MVBench lie in <benchmark>/videos. What is asked is what the toy tasks ask, about scenes that are never
trained on. As in reality, a few videos of MVBench lie in its fallback folders alone, those of `nturgbd` nowhere, and
answers in a file of their own come in another order than their questions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stllm.evaluation.benchmarks.mvbench import TASKS as MVBENCH_TASKS
from stllm.evaluation.benchmarks.mvbench import MVBenchTask
from stllm.media.images import FOLDER_FPS
from stllm.toy.clips import FPS, World
from stllm.toy.media import write_frames, write_json, write_video
from stllm.toy.questions import Example
from stllm.toy.tasks import TASKS, ToyTask
from stllm.toy.video_questions import DIRECTION_QUESTIONS

TOY_TASKS = {task.make.__name__: task for task in TASKS}
# Which toy task stands for each of MVBench's; those with bounds are all of one kind.
STAND_INS = {
    "Action Sequence": "action_sequence",
    "Action Prediction": "action_sequence",
    "Action Antonym": "moving_direction",
    "Fine-grained Action": "moving_direction",
    "Unexpected Action": "state_change",
    "Object Existence": "object_existence",
    "Object Interaction": "action_sequence",
    "Object Shuffle": "moving_direction",
    "Moving Direction": "moving_direction",
    "Action Localization": "action_sequence",
    "Scene Transition": "scene_transition",
    "Action Count": "action_count",
    "Moving Count": "moving_count",
    "Moving Attribute": "state_change",
    "State Change": "state_change",
    "Fine-grained Pose": "object_existence",
    "Character Order": "state_change",
    "Egocentric Navigation": "moving_direction",
    "Episodic Reasoning": "action_sequence",
    "Counterfactual Inference": "object_existence",
}
ABSENT = "nturgbd"  # may not be redistributed
IN_FALLBACK = ("Action Prediction", "Object Interaction", "Moving Count", "Counterfactual Inference")  # their last item
VCGBENCH_PARTS = {"generic": "conversation", "temporal": "state_change", "consistency": "moving_direction"}
OPEN_TASKS = ("conversation", "state_change", "moving_direction", "object_existence")  # asked without options
# ActivityNet-QA's types of question: motion 0, temporal 2, yes/no 3, color 4, object 5
TYPES = {"conversation": (5, 0, 4), "state_change": (2,), "moving_direction": (0,), "object_existence": (3,)}

FRAME_BYTES = 4000  # of a clip, rounded up: gifs and frame folders are larger than videos
LONGEST = 1.5  # of a toy task's clips, in clips of the usual length

Fields = dict[str, Any]
Row = tuple[str, str, "Question"]  # the video's name, the question's id, the question


@dataclass(frozen=True)
class Clip:
    """A written clip: its file's name, the toy task that it is of, what is in it."""

    file: str
    task: str
    example: Example


@dataclass(frozen=True)
class Question:
    """A question about a written clip, without options. type: ActivityNet-QA's."""

    file: str
    text: str
    answer: str
    type: int

    @property
    def stem(self) -> str:
        """The file's name without its extension."""
        return Path(self.file).stem


@dataclass(frozen=True)
class Writer:
    """Draws clips and writes them. count: clips of each kind; done: called after each."""

    world: World
    count: int
    done: Callable[[], Any]

    def clips(self, folder: Path, name: str, tasks: Sequence[str], extensions: Sequence[str]) -> list[Clip]:
        """Clips of the toy tasks by turns, with the extensions by turns. name: a pattern for their numbers."""
        clips = []
        for index in range(self.count):
            task = tasks[index % len(tasks)]
            example, frames, _ = self.world.clip(_apart(task, f"{folder.parent.name}/{name}"), "test", index)
            clips.append(Clip(name.format(index) + extensions[index % len(extensions)], task, example))
            write_video(folder / clips[-1].file, frames, FPS)
            self.done()
        return clips

    def questions(self, folder: Path, name: str, extensions: Sequence[str]) -> list[Question]:
        """What is asked without options about clips of all sorts."""
        return _questions(self.clips(folder, name, OPEN_TASKS, extensions))


def num_benchmark_clips(count: int) -> int:
    """How many clips `write_benchmarks` draws."""
    return count * (len(MVBENCH_TASKS) + len(VCGBENCH_PARTS) + 4)


def benchmark_bytes(count: int, num_frames: int) -> int:
    """How many bytes they take, rounded up. num_frames: of a clip of the usual length."""
    return round(num_benchmark_clips(count) * num_frames * LONGEST * FRAME_BYTES)


def write_benchmarks(root: Path, world: World, *, count: int, done: Callable[[], Any] = lambda: None) -> None:
    """Writes all twins below `root`.

    count: items of each task of MVBench, and clips of each part of the other benchmarks. done: called after each clip.
    """
    writer = Writer(world, count, done)
    for task in MVBENCH_TASKS:
        _write_mvbench_task(root / "mvbench", task, writer)
    _write_vcgbench(root / "vcgbench", writer)
    _write_msvd(root / "msvd", writer)
    _write_msrvtt(root / "msrvtt", writer)
    _write_activitynet(root / "activitynet", writer)
    _write_tgif(root / "tgif", writer)


def _write_mvbench_task(root: Path, task: MVBenchTask, writer: Writer) -> None:
    toy = _apart(STAND_INS[task.name], task.name)
    in_frames = task.media == "frames"
    items: list[Fields] = []
    for index in range(writer.count):
        example, clip, bounds = writer.world.clip(toy, "test", index, FOLDER_FPS if in_frames else FPS)
        video = f"{Path(task.file).stem}_{index:05d}" + ("" if in_frames else ".mp4")
        in_fallback = task.name in IN_FALLBACK and index == writer.count - 1
        path = root / "video" / (task.fallbacks[0] if in_fallback else task.folder) / video
        if in_frames:
            write_frames(path, clip)
        elif task.folder != ABSENT:
            write_video(path, clip, FPS)
        turn = example.turns[0]
        asked = {"question": turn.question, "candidates": list(example.candidates), "answer": turn.answer}
        items.append({"video": video, **asked, **bounds})
        writer.done()
    write_json(root / "json" / task.file, items)


def _write_vcgbench(root: Path, writer: Writer) -> None:
    extensions = (".webm", ".mp4", ".avi", ".mov", ".mkv")
    generic, temporal, consistency = (
        writer.clips(root / "videos", f"v_{part}_{{:05d}}", (toy,), extensions[number:] + extensions)
        for number, (part, toy) in enumerate(VCGBENCH_PARTS.items())
    )
    for name, clips in (("generic", generic), ("temporal", temporal)):
        rows = [{"Q": row.text, "A": row.answer, "video_name": row.stem} for row in _questions(clips)]
        write_json(root / f"{name}_qa.json", rows)
    pairs: list[Fields] = []
    for clip in consistency:
        first, second = (question.format(clip.example.scene.things[0].name) for question in DIRECTION_QUESTIONS)
        stem = Path(clip.file).stem
        pairs.append({"Q1": first, "Q2": second, "A": clip.example.turns[0].answer, "video_name": stem})
    write_json(root / "consistency_qa.json", pairs)


def _write_msvd(root: Path, writer: Writer) -> None:
    questions = writer.questions(root / "videos", "clip_{:05d}", (".avi", ".mp4"))
    rows = [
        {"id": number, "video_name": row.file, "question": row.text, "answer": row.answer}
        for number, row in enumerate(questions)
    ]
    write_json(root / "test_qa.json", rows)
    _write_split(root, [(row.stem, str(number), row) for number, row in enumerate(questions)])


def _write_msrvtt(root: Path, writer: Writer) -> None:
    questions = writer.questions(root / "videos", "video7{:03d}", (".mp4",))
    rows = [
        {
            "id": number,
            "video_id": int(row.stem.removeprefix("video")),
            "question": row.text,
            "answer": row.answer,
        }
        for number, row in enumerate(questions)
    ]
    write_json(root / "test_qa.json", rows)
    _write_split(root, [(row.stem, str(number), row) for number, row in enumerate(questions)])


def _write_activitynet(root: Path, writer: Writer) -> None:
    rows: list[Row] = []
    asked: Counter[str] = Counter()
    for question in writer.questions(root / "videos", "v_toy_{:05d}", (".mp4", ".mkv", ".webm")):
        name = question.stem.removeprefix("v_")
        rows.append((name, f"{name}_{asked[name]}", question))
        asked[name] += 1
    rows.sort(key=lambda row: row[1].rsplit("_", 1)[1])  # one question of every video, then the next of every video
    _write_split(root, rows, with_type=True)


def _write_tgif(root: Path, writer: Writer) -> None:
    questions = writer.questions(root / "videos", "toy_{:05d}", (".gif", ".mp4"))
    rows = [{"video_name": row.stem, "question": row.text, "answer": row.answer} for row in questions]
    write_json(root / "test_qa.json", rows)


def _write_split(root: Path, rows: Sequence[Row], *, with_type: bool = False) -> None:
    """Questions and answers as two files."""
    asked = [{"video_name": name, "question": row.text, "question_id": key} for name, key, row in rows]
    answers = [
        {"answer": row.answer, **({"type": row.type} if with_type else {}), "question_id": key} for _, key, row in rows
    ]
    write_json(root / "test_q.json", asked)
    write_json(root / "test_a.json", answers[::-1])


def _questions(clips: Sequence[Clip]) -> list[Question]:
    return [
        Question(clip.file, turn.question, str(turn.answer), kind)
        for clip in clips
        for turn, kind in zip(clip.example.turns, TYPES[clip.task], strict=False)  # the second of a choice has options
    ]


def _apart(toy: str, name: str) -> ToyTask:
    """A toy task whose clips are drawn apart from those of all other tasks of that kind."""
    return replace(TOY_TASKS[toy], corpus=f"benchmarks/{name}/{toy}")
