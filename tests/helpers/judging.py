"""Predictions to be judged, and the command that judges them, for tests."""

import json
from pathlib import Path
from typing import Any

from stllm.cli import main


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def questions(num_items: int = 6, pred: str = "cat") -> list[dict[str, Any]]:
    """Return VideoQA predictions, of which every third is wrong."""
    return [
        {"id": number, "question": f"what {number}?", "answer": "cat", "pred": pred if number % 3 else "dog"}
        for number in range(num_items)
    ]


def vcgbench_lines() -> list[dict[str, Any]]:
    """Return lines of `stllm evaluate vcgbench`: general, temporal and consistency, and one with a missing video."""
    known = {"video_name": "v", "answer": "a cat", "error": None}
    return [
        {"id": "generic-0", "task": "generic", "question": "q?", "prediction": "a cat", **known},
        {"id": "generic-1", "task": "generic", "question": "r?", "prediction": "a dog", **known},
        {"id": "generic-2", "task": "generic", "question": "s?", **known, "prediction": None, "error": "no video"},
        {"id": "temporal-0", "task": "temporal", "question": "q?", "prediction": "", **known},
        {
            "id": "consistency-0",
            "task": "consistency",
            "question": ["q?", "r?"],
            "prediction": ["a cat", "a cat"],
            **known,
        },
    ]


def judge(axis: str, folder: Path, *options: str, url: str | None = None, model: str = "m") -> int:
    """Run the command on `pred.json` in the folder. Without a URL it gets no predictions and no judge."""
    asking = [] if url is None else ["--pred-path", str(folder / "pred.json"), "--base-url", url, "--model", model]
    return main(["judge", axis, "--output-dir", str(folder / "out"), *asking, *options])


def results(folder: Path, axis: str = "qa") -> dict[str, Any]:
    return json.loads((folder / "out" / f"{axis}.results.json").read_text())


def ledger(folder: Path, axis: str = "qa") -> list[dict[str, Any]]:
    """Return the lines of the ledger about items."""
    lines = (folder / "out" / f"{axis}.ledger.jsonl").read_text().splitlines()
    return [fields for fields in map(json.loads, lines) if "run" not in fields]
