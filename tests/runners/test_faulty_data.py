"""Training on a folder with ten kinds of planted faults: `stllm doctor` names them, training skips and counts them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from stllm.cli import main
from stllm.models.st_llm import STLLM
from tests.helpers.training import read_log, write_recipe
from tests.helpers.videos import frame_code, read_code, write_video

NUM_GOOD = 12
FAULTS = {  # what the doctor calls them
    "missing",
    "unreadable",
    "empty file",
    "colliding names",
    "bounds",
    "empty answer",
    "incomplete",
    "wrong medium",
    "outside",
    "contradiction",
}


def record(video: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"video": video, "QA": [{"q": "What number is it?", "a": answer}], **fields}


@pytest.fixture
def recipe(toy: Path, tmp_path: Path) -> Path:
    """Write a recipe with faulty records among good ones. Each frame of `good_<n>.mp4` shows n, and the answer is n."""
    media = tmp_path / "media"
    media.mkdir()
    for number in range(NUM_GOOD):
        write_video(media / f"good_{number}.mp4", fps=10, frames=[frame_code(number)] * 20)
    whole = (media / "good_1.mp4").read_bytes()
    shutil.copy(media / "good_0.mp4", media / "GOOD_1.mp4")
    write_video(tmp_path / "stray.mp4", fps=10, frames=[frame_code(50)] * 20)
    (media / "text.mp4").write_text("404: not found")
    (media / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (media / "empty.mp4").touch()
    Image.new("RGB", (16, 16)).save(media / "picture.jpg")
    records = [record(f"good_{number}.mp4", f"number {number}") for number in range(NUM_GOOD)]
    records += [record(name, "number 99") for name in ("gone.mp4", "text.mp4", "cut.mp4", "empty.mp4")]
    records += [record("good_2.mp4", "number 99", start=1.5, end=0.5), record("good_2.mp4", "number 99", start=50)]
    records += [record("good_3.mp4", "  "), {"video": "good_3.mp4"}]
    records += [record("picture.jpg", "number 99"), record("../stray.mp4", "number 50")]
    records += [record("good_4.mp4", answer, start=0, end=1) for answer in ("Yes.", "no")]
    (tmp_path / "train.json").write_text(json.dumps(records))
    entry = {"anno_path": str(tmp_path / "train.json"), "media_dir": str(media), "num_frames": 4, "crop": "center"}
    settings: dict[str, Any] = {"num_train_epochs": 3, "max_steps": -1, "max_bad_fraction": 0.6, "save_steps": 100}
    return write_recipe(tmp_path / "recipe.yaml", toy, datasets={"mine": entry}, **settings)


def test_faults_are_named_skipped_and_counted_and_pairs_stay_together(
    recipe: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--cfg-path", str(recipe), "--json", "--num-workers", "0"]) == 1
    assert set(json.loads(capsys.readouterr().out)["counts"]) == FAULTS

    pairs: list[tuple[int, str]] = []
    real = STLLM.forward
    tokenizer = AutoTokenizer.from_pretrained(toy / "language_model")

    def watching(self: STLLM, **inputs: Any) -> Any:
        for clip, labels in zip(inputs["pixel_values"], inputs["labels"], strict=True):  # (T, 3, S, S), (L,)
            shown = {read_code((frame.permute(1, 2, 0).numpy() > 0) * 255) for frame in clip}
            assert len(shown) == 1  # one number, all the clip long
            answer = tokenizer.decode(labels[labels >= 0], skip_special_tokens=True)
            pairs.append((shown.pop(), str(answer)))
        return real(self, **inputs)

    monkeypatch.setattr(STLLM, "forward", watching)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    for shown, answer in pairs:
        if answer.strip(" .").lower() in ("yes", "no"):  # contradicting answers, the right video
            assert shown == 4
        else:
            assert [int(digits) for digits in re.findall(r"\d+", answer)] == [shown]
    assert {shown for shown, _ in pairs} == {*range(NUM_GOOD), 50}  # what lies outside can be read, too
    errors = capsys.readouterr().err
    skipped = read_log(recipe.parent / "run")[-1]["skipped_samples"]
    assert skipped >= 3 * 9  # nine unreadable records in each epoch; a replacement may be one of them, too
    for name in ("gone.mp4", "text.mp4", "cut.mp4", "empty.mp4", "picture.jpg"):
        assert len(re.findall(rf"left out: \S*{name}", errors)) == 1, name


def test_too_many_faults_stop_the_run_and_are_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg-path", str(recipe), "--options", "run.max_bad_fraction=0.1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "samples could not be read (" in error and ".mp4" in error and "run.max_bad_fraction (0.1)" in error
