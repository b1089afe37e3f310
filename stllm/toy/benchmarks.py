"""Twins of the benchmarks: toy clips in the official folders, file names and fields.

    mvbench/json/<task>.json, mvbench/video/<MVBench's own folders>
    vcgbench/{generic,temporal,consistency}_qa.json
    msvd/test_qa.json, and as test_q.json + test_a.json; msrvtt the same
    activitynet/test_q.json + test_a.json
    tgif/test_qa.json

Media of all but MVBench are in <benchmark>/videos. The questions are those of the toy tasks, about scenes that are
never used in training. As in the originals, a few videos of MVBench are only in its fallback folders, those of
`nturgbd` are missing, and a separate file of answers has a different order from the file of questions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stllm.evaluation.benchmarks.mvbench import TASKS as MVBENCH_TASKS
from stllm.media.images import FOLDER_FPS
from stllm.toy.media import annotation_files, write_frames, write_video
from stllm.toy.questions import DIRECTION_QUESTIONS, Example
from stllm.toy.tasks import FPS, TASKS, ToyTask, World

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


class Question(NamedTuple):
    """A question about a clip, without options. file: the video; number: of the question; type: ActivityNet-QA's."""

    file: Path
    number: int
    text: str
    answer: str | None
    type: int


def mvbench_item(video: str, example: Example, bounds: dict[str, float]) -> dict[str, Any]:
    """An item of an annotation file of MVBench: the clip's first question."""
    asked = example.asked[0]
    options = list(asked.options)
    return {"video": video, "question": asked.question, "candidates": options, "answer": asked.answer, **bounds}


def num_benchmark_clips(count: int) -> int:
    """The number of clips that `write_benchmarks` draws."""
    return count * (len(MVBENCH_TASKS) + len(VCGBENCH_PARTS) + 4)


def benchmark_bytes(count: int, num_frames: int) -> int:
    """Bytes that the twins take, rounded up. num_frames: of a clip of the usual length."""
    return round(num_benchmark_clips(count) * num_frames * LONGEST * FRAME_BYTES)


def write_benchmarks(root: Path, world: World, *, count: int, done: Callable[[], Any] = lambda: None) -> None:
    """Write all twins below `root`.

    count: items of each task of MVBench, and clips of each part of the other benchmarks. done: called after each clip.
    """

    def clips(
        benchmark: str, name: str, tasks: Sequence[str], extensions: Sequence[str]
    ) -> Iterator[tuple[Path, str, Example]]:
        """Write clips, with toy tasks and extensions in turn; yield file, task and example. name: a pattern."""
        for index in range(count):
            task = tasks[index % len(tasks)]
            example, frames, _ = world.clip(_apart(task, f"{benchmark}/{name}"), "test", index)
            file = Path(name.format(index) + extensions[index % len(extensions)])
            write_video(root / benchmark / "videos" / file, frames, FPS)
            done()
            yield file, task, example

    def split(benchmark: str, rows: Sequence[tuple[str, str, Question]]) -> None:
        """Write questions and answers as two files. rows: the video's name, the question's id, the question."""
        for video, key, row in rows:
            append(f"{benchmark}/test_q.json", {"video_name": video, "question": row.text, "question_id": key})
        for _, key, row in reversed(rows):
            types = {"type": row.type} if benchmark == "activitynet" else {}
            append(f"{benchmark}/test_a.json", {"answer": row.answer, **types, "question_id": key})

    with annotation_files(root) as append:
        for task in MVBENCH_TASKS:
            toy, in_frames = _apart(STAND_INS[task.name], task.name), task.media == "frames"
            for index in range(count):
                example, clip, bounds = world.clip(toy, "test", index, FOLDER_FPS if in_frames else FPS)
                video = f"{Path(task.file).stem}_{index:05d}" + ("" if in_frames else ".mp4")
                in_fallback = task.name in IN_FALLBACK and index == count - 1
                folder = root / "mvbench" / "video" / (task.fallbacks[0] if in_fallback else task.folder)
                if in_frames:
                    write_frames(folder / video, clip)
                elif task.folder != ABSENT:
                    write_video(folder / video, clip, FPS)
                append(f"mvbench/json/{task.file}", mvbench_item(video, example, bounds))
                done()

        extensions = (".webm", ".mp4", ".avi", ".mov", ".mkv")
        for number, (part, kind) in enumerate(VCGBENCH_PARTS.items()):
            drawn = clips("vcgbench", f"v_{part}_{{:05d}}", (kind,), extensions[number:] + extensions)
            if part == "consistency":
                for file, _, example in drawn:
                    first, second = (question.format(example.scene.things[0].name) for question in DIRECTION_QUESTIONS)
                    pair = {"Q1": first, "Q2": second, "A": example.asked[0].answer, "video_name": file.stem}
                    append("vcgbench/consistency_qa.json", pair)
            else:
                for row in _questions(drawn):
                    append(f"vcgbench/{part}_qa.json", {"Q": row.text, "A": row.answer, "video_name": row.file.stem})

        msvd = _questions(clips("msvd", "clip_{:05d}", OPEN_TASKS, (".avi", ".mp4")))
        msrvtt = _questions(clips("msrvtt", "video7{:03d}", OPEN_TASKS, (".mp4",)))
        for name, asked in (("msvd", msvd), ("msrvtt", msrvtt)):
            for key, row in enumerate(asked):
                named: dict[str, Any] = {"video_name": row.file.name}
                if name == "msrvtt":
                    named = {"video_id": int(row.file.stem.removeprefix("video"))}
                append(f"{name}/test_qa.json", {"id": key, **named, "question": row.text, "answer": row.answer})
            split(name, [(row.file.stem, str(key), row) for key, row in enumerate(asked)])

        activitynet = _questions(clips("activitynet", "v_toy_{:05d}", OPEN_TASKS, (".mp4", ".mkv", ".webm")))
        activitynet.sort(key=lambda row: row.number)  # one question of every video, then the next of every video
        named_rows = [(row.file.stem.removeprefix("v_"), row) for row in activitynet]
        split("activitynet", [(name, f"{name}_{row.number}", row) for name, row in named_rows])

        for row in _questions(clips("tgif", "toy_{:05d}", OPEN_TASKS, (".gif", ".mp4"))):
            append("tgif/test_qa.json", {"video_name": row.file.stem, "question": row.text, "answer": row.answer})


def _questions(clips: Iterable[tuple[Path, str, Example]]) -> list[Question]:
    return [
        Question(file, number, turn.question, turn.answer, kind)
        for file, task, example in clips
        for number, (turn, kind) in enumerate(zip(example.turns, TYPES[task], strict=False))  # a choice has options
    ]


def _apart(toy: str, name: str) -> ToyTask:
    """A toy task whose clips are drawn apart from those of all other tasks of that kind."""
    return replace(TOY_TASKS[toy], corpus=f"benchmarks/{name}/{toy}")
