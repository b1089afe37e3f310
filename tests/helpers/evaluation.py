"""Tiny evaluations for tests: a VideoQA set of real videos, and the command on a golden checkpoint."""

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
    """`test_qa.json` in the form of MSVD-QA beside `videos`, every question about each. Returns the folder."""
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
    """The command's words without `stllm`."""
    files = ("--anno-path", data / "test_qa.json", "--video-dir", data / "videos", "--output-dir", output)
    return ["evaluate", "msvd", "--ckpt-path", str(CHECKPOINT), *map(str, (*files, *QUICK, *more))]


def evaluate(data: Path, output: Path, *more: str | Path) -> int:
    """Runs the command in this process; returns its exit code."""
    return main(arguments(data, output, *more))


def start(data: Path, output: Path, *more: str | Path, processes: int = 1) -> "subprocess.Popen[str]":
    """Starts the command as a user would; several processes through torchrun."""
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
    """The records of a finished run, without what no two runs share: seconds."""
    found = [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
    for record in found:
        del record["seconds"]
    return found


def copy_run(source: Path, target: Path) -> Path:
    """The files of a run in another folder."""
    shutil.copytree(source, target)
    return target
