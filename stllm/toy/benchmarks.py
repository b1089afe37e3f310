"""Toy versions of the benchmarks: toy clips, with the official folders, file names and fields.

    mvbench/json/<task>.json, mvbench/video/<MVBench's own folders>
    vcgbench/{generic,temporal,consistency}_qa.json
    msvd/test_qa.json, and as test_q.json + test_a.json; msrvtt the same
    activitynet/test_q.json + test_a.json
    tgif/test_qa.json
    tvbench/json/<task>.json, tvbench/video/<task>
    tempcompass/{questions/<part>.json,meta_info.json,videos}
    vinoground/vinoground_{textscore,videoscore}.json, vinoground.csv, vinoground_videos, vinoground_videos_concated
    tomato/data/<task>.json, tomato/videos/<demonstration type>

Media of the other benchmarks are in <benchmark>/videos. The questions are those of the toy tasks, about scenes that are
never used in training. Three details are as in the originals: a few videos of MVBench are only in its fallback folders;
the videos of `nturgbd` and of TVBench's Action Antonym are missing; and files of answers have another order than files
of questions.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from stllm.evaluation.benchmarks.mvbench import TASKS as MVBENCH_TASKS
from stllm.evaluation.benchmarks.tempcompass import DIMENSIONS, SUFFIXES
from stllm.evaluation.benchmarks.tvbench import TVBENCH
from stllm.media.images import FOLDER_FPS
from stllm.toy.media import annotation_files, write_frames, write_video
from stllm.toy.questions import DIRECTION_QUESTIONS, Example
from stllm.toy.tasks import FPS, TASKS, ToyTask, World

TOY_TASKS = {task.make.__name__: task for task in TASKS}
# MVBench's task -> the toy task that replaces it; the tasks with bounds all have the same toy task
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
    "Moving Count": "action_count",
    "Moving Attribute": "state_change",
    "State Change": "state_change",
    "Fine-grained Pose": "object_existence",
    "Character Order": "state_change",
    "Egocentric Navigation": "moving_direction",
    "Episodic Reasoning": "action_sequence",
    "Counterfactual Inference": "object_existence",
    "Object Count": "action_count",
    "Egocentric Sequence": "moving_direction",
}
ABSENT = ("nturgbd", "action_antonym")  # media folders without files: the original clips may not be redistributed
# tasks whose last item has its video in a fallback folder
IN_FALLBACK = ("Action Prediction", "Object Interaction", "Moving Count", "Counterfactual Inference")
VCGBENCH_PARTS = {"generic": "conversation", "temporal": "state_change", "consistency": "moving_direction"}
OPEN_TASKS = ("conversation", "state_change", "moving_direction", "object_existence")  # questions without options
# ActivityNet-QA's question types: motion 0, temporal 2, yes/no 3, color 4, object 5
TYPES = {"conversation": (5, 0, 4), "state_change": (2,), "moving_direction": (0,), "object_existence": (3,)}

# TempCompass: dimension -> its toy task, and its fine-grained aspect, if it has one
OF_DIMENSION = {
    "action": ("action_count", "fine-grained action"),
    "direction": ("moving_direction", "object motion"),
    "speed": ("moving_direction", "absolute speed"),
    "order": ("action_sequence", None),
    "attribute_change": ("state_change", "color & light change"),
}
MATCHING = (("description is a more suitable match for", "Option"), ("sentence better captures", "Sentence"))
OF_TOMATO = {  # TOMATO's task -> its toy task, and its type of motion
    "count": ("action_count", "complex"),
    "direction": ("moving_direction", "translation"),
    "rotation": ("action_sequence", "rotation"),
    "shape&trend": ("state_change", "shape"),
    "velocity&frequency": ("moving_direction", "translation"),
    "visual_cues": ("scene_transition", "complex"),
}
DEMONSTRATIONS = ("human", "object", "simulated")
BLACK_FRAMES = 8  # between the two clips of a concatenated video

FRAME_BYTES = 4000  # size of one frame, rounded up: gifs and frame folders are larger than videos
LONGEST = 1.5  # length of the longest clips / usual length


class Question(NamedTuple):
    """A question about a clip, without options.

    file: the video. number: number of the question among those about the clip. text: the question. type: number of the
    question type in ActivityNet-QA.
    """

    file: Path
    number: int
    text: str
    answer: str | None
    type: int


def mvbench_item(video: str, example: Example, bounds: dict[str, float]) -> dict[str, Any]:
    """Make an item of an MVBench annotation file from the clip's first question. bounds: start and end in seconds."""
    asked = example.asked[0]
    options = list(asked.options)
    return {"video": video, "question": asked.question, "candidates": options, "answer": asked.answer, **bounds}


def num_benchmark_clips(count: int) -> int:
    """Compute the number of clips that `write_benchmarks` draws."""
    twins = (MVBENCH_TASKS, VCGBENCH_PARTS, TVBENCH.tasks, OF_DIMENSION, OF_TOMATO)
    return count * (sum(map(len, twins)) + 5)  # and four sets of VideoQA, and Vinoground


def benchmark_bytes(count: int, num_frames: int) -> int:
    """Estimate the size of all toy benchmarks in bytes, rounded up.

    num_frames: frames of a clip of the usual length.
    """
    clips = num_benchmark_clips(count) + 6 * count  # Vinoground shows a clip six times
    return round(clips * num_frames * LONGEST * FRAME_BYTES)


def write_benchmarks(root: Path, world: World, *, count: int, done: Callable[[], Any] = lambda: None) -> None:
    """Write all toy benchmarks below `root`.

    count: items per task of MVBench, and clips per part of the other benchmarks. done: function that is called after
    each clip.
    """

    def clips(
        benchmark: str, name: str, tasks: Sequence[str], extensions: Sequence[str]
    ) -> Iterator[tuple[Path, str, Example]]:
        """Write clips, and yield file, task and example. Toy tasks and extensions alternate. name: a file pattern."""
        for index in range(count):
            task = tasks[index % len(tasks)]
            example, frames, _ = world.clip(_apart(task, f"{benchmark}/{name}"), "test", index)
            file = Path(name.format(index) + extensions[index % len(extensions)])
            write_video(root / benchmark / "videos" / file, frames, FPS)
            done()
            yield file, task, example

    def split(benchmark: str, rows: Sequence[tuple[str, str, Question]]) -> None:
        """Write questions to one file and answers to another. rows: (name of the video, question id, question)."""
        for video, key, row in rows:
            append(f"{benchmark}/test_q.json", {"video_name": video, "question": row.text, "question_id": key})
        for _, key, row in reversed(rows):
            types = {"type": row.type} if benchmark == "activitynet" else {}
            append(f"{benchmark}/test_a.json", {"answer": row.answer, **types, "question_id": key})

    with annotation_files(root) as append:
        of_mvbench = [("mvbench", task, task.name) for task in MVBENCH_TASKS]
        for benchmark, task, name in [
            *of_mvbench,
            *(("tvbench", task, f"tvbench/{task.name}") for task in TVBENCH.tasks),
        ]:
            toy, in_frames = _apart(STAND_INS[task.name], name), task.media == "frames"
            for index in range(count):
                example, clip, bounds = world.clip(toy, "test", index, FOLDER_FPS if in_frames else FPS)
                video = f"{Path(task.file).stem}_{index:05d}" + ("" if in_frames else ".mp4")
                in_fallback = name in IN_FALLBACK and index == count - 1
                folder = root / benchmark / "video" / (task.fallbacks[0] if in_fallback else task.folder)
                if in_frames:
                    write_frames(folder / video, clip)
                elif task.folder not in ABSENT:
                    write_video(folder / video, clip, FPS)
                append(f"{benchmark}/json/{task.file}", mvbench_item(video, example, bounds))
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

        vinoground = [["index", "major", "minor"]]
        for index in range(count):
            example, clip, _ = world.clip(_apart("state_change", "vinoground"), "test", index)
            for part, record in _vinoground(root / "vinoground", index, example, clip):
                append(f"vinoground/vinoground_{part}.json", record)
            vinoground.append(
                [str(index), ("object", "action")[index % 2], ("", "cyclical", "cyclical;spatial")[index % 3]]
            )
            done()
    rows = "".join(",".join(row) + "\n" for row in vinoground)
    (root / "vinoground" / "vinoground.csv").write_text(rows, encoding="utf-8")

    content: dict[str, dict[str, Any]] = {f"tempcompass/questions/{part}.json": {} for part in SUFFIXES}
    meta = content["tempcompass/meta_info.json"] = {}
    for place, dimension in enumerate(DIMENSIONS):
        toy_name, aspect = OF_DIMENSION[dimension]
        for index in range(count):
            example, clip, _ = world.clip(_apart(toy_name, f"tempcompass/{dimension}"), "test", index)
            name = str(1000 * (place + 1) + index)
            write_video(root / "tempcompass" / "videos" / f"{name}.mp4", clip, FPS)
            fine = {"subject": example.scene.things[0].name} | ({} if aspect is None else {"type": aspect})
            meta[name] = {"eval_dim": dict.fromkeys(DIMENSIONS) | {dimension: fine}, "content": ["toys"]}
            for part, questions in _tempcompass(example, index).items():
                content[f"tempcompass/questions/{part}.json"][name] = {dimension: questions}
            done()
    for task_name, (toy_name, motion) in OF_TOMATO.items():
        of_task = content[f"tomato/data/{task_name}.json"] = {}
        for index in range(count):
            example, clip, _ = world.clip(_apart(toy_name, f"tomato/{task_name}"), "test", index)
            shown, stem = DEMONSTRATIONS[index % len(DEMONSTRATIONS)], f"{task_name}_{index:04d}"
            write_video(root / "tomato" / "videos" / shown / f"{stem}.mp4", clip, FPS)
            one = example.asked[0]
            choice: dict[str, Any] = {
                "question": one.question,
                "options": list(one.options),
                "answer": one.options.index(one.answer),
            }
            about = {"key": stem, "demonstration_type": shown, "motion_type": motion, "variation": {}}
            of_task[str(index)] = {**choice, **about}
            done()
    for path, found in content.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _tempcompass(example: Example, index: int) -> dict[str, list[dict[str, str]]]:
    """Convert the clip's first question to TempCompass's four types of questions."""
    one = example.asked[0]
    wrong = next(option for option in one.options if option != one.answer)
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, one.options, strict=False)]
    right = lines[one.options.index(one.answer)]
    claims = [f"{one.question} {option}." for option in ((one.answer, wrong) if index % 2 else (wrong, one.answer))]
    words, label = MATCHING[index % len(MATCHING)]
    marks = ("1", "2") if label == "Option" else ("A", "B")
    matches = [f"{label} {mark}: {claim}" for mark, claim in zip(marks, claims, strict=True)]
    facts = [f"Information {letter}: {{'answer': {option!r}}}" for letter, option in zip("ABCDEFG", one.options)]  # noqa: B905
    return {
        "multi-choice": [{"question": "\n".join([one.question, *lines]), "answer": right}],
        "yes_no": [
            {"question": f"{one.question} Is it {option}?", "answer": answer}
            for option, answer in ((one.answer, "yes"), (wrong, "no"))
        ],
        "caption_matching": [
            {"question": "\n".join([f"Which {words} the video?", *matches]), "answer": matches[1 - index % 2]}
        ],
        "captioning": [{"question": "\n".join(["Caption the video.", *facts, "Generated Caption:"]), "answer": right}],
    }


def _vinoground(folder: Path, index: int, example: Example, clip: np.ndarray) -> Iterator[tuple[str, dict[str, str]]]:
    """Write a clip, its reversal, and both in one file. Yield the benchmark's part and the record of each question."""
    thing = example.scene.things[0]
    after = next(str(event.value) for event in thing.events if event.kind == "turn")
    captions = [
        f"The {thing.shape} is {one} before it is {two}." for one, two in ((thing.color, after), (after, thing.color))
    ]
    both = np.concatenate([clip, np.zeros_like(clip[:BLACK_FRAMES]), clip[::-1]])
    for number, (half, frames) in enumerate((("pos", clip), ("neg", clip[::-1]))):
        alone, joined = (f"{name}/{index}_{half}.mp4" for name in ("vinoground_videos", "vinoground_videos_concated"))
        write_video(folder / alone, frames, FPS)
        write_video(folder / joined, both, FPS)
        idx, letter = f"{index}_{half}", "AB"[number]
        which = f"Which caption best describes this video?\nA. {captions[0]}\nB. {captions[1]}"
        where = (
            f"Which segment of the video matches the caption?\nCaption: {captions[number]}\nA. the first\nB. the second"
        )
        yield "textscore", {"idx": idx, "video_name": alone, "question": which, "GT": letter}
        yield "videoscore", {"idx": idx, "video_name": joined, "question": where, "GT": letter}


def _questions(clips: Iterable[tuple[Path, str, Example]]) -> list[Question]:
    return [
        Question(file, number, turn.question, turn.answer, kind)
        for file, task, example in clips
        for number, (turn, kind) in enumerate(zip(example.turns, TYPES[task], strict=False))  # turns without options
    ]


def _apart(toy: str, name: str) -> ToyTask:
    """Return a copy of a toy task that draws other clips. toy: name of the task. name: name of the copy."""
    return replace(TOY_TASKS[toy], corpus=f"benchmarks/{name}/{toy}")
