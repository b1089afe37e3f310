"""Tiny evaluations for tests: a VideoQA data set with videos, and the command with a golden checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from stllm.cli import main
from tests.helpers.videos import write_video

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "instructblip_residual_mvm"
QUESTIONS = ("what moves first", "which color is the square", "how many objects")
QUICK = ("--num-frames", "5", "--num-beams", "1", "--max-new-tokens", "6", "--device", "cpu", "--num-workers", "0")


def write_set(folder: Path, *, num_videos: int = 4, num_questions: int = 3) -> Path:
    """Write `test_qa.json` as in MSVD-QA, with every question about each video, and `videos`. Returns their folder."""
    (folder / "videos").mkdir(parents=True)
    for number in range(num_videos):
        write_video(folder / "videos" / f"vid{number}.mp4", num_frames=8 + 7 * number, size=(64, 48))
    items: list[dict[str, Any]] = []
    for question in range(num_questions):  # a video's questions do not stand together
        for number in range(num_videos):
            text = f"{QUESTIONS[question % len(QUESTIONS)]} {question} {number}"
            video = f"vid{number}.mp4"
            items.append({"video_name": video, "question_id": len(items), "question": text, "answer": "it"})
    (folder / "test_qa.json").write_text(json.dumps(items))
    return folder


def arguments(data: Path, output: Path, *more: str | Path) -> list[str]:
    """Return the arguments of the command, without `stllm`."""
    files = ("--anno-path", data / "test_qa.json", "--video-dir", data / "videos", "--output-dir", output)
    return ["evaluate", "msvd", "--ckpt-path", str(CHECKPOINT), *map(str, (*files, *QUICK, *more))]


def evaluate(data: Path, output: Path, *more: str | Path) -> int:
    """Run the command in this process. Returns its exit code."""
    return main(arguments(data, output, *more))


def start(data: Path, output: Path, *more: str | Path, processes: int = 1) -> "subprocess.Popen[str]":
    """Start the command in a new process; several processes with torchrun."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launch, "-m", "stllm", *arguments(data, output, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def lines(output: Path, name: str = "msvd") -> list[dict[str, Any]]:
    """Return the records of a finished run without `seconds`, which differ between runs."""
    found = [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
    for record in found:
        del record["seconds"]
    return found


def copy_run(source: Path, target: Path) -> Path:
    """Copy the files of a run to another folder."""
    shutil.copytree(source, target)
    return target
