"""`stllm doctor --overlap`: test clips in the training data with equal name, equal content, or encoded again."""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml

from stllm.cli import main
from tests.helpers.twins import twins

VIDEOS = Path("vinoground_videos")


def encoded_anew(source: Path, target: Path) -> None:
    """Encode a clip again in another size, format and quality."""
    with av.open(str(source)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(target), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=4, options={"qmin": "6", "qmax": "6"})
        stream.height, stream.width, stream.pix_fmt = 96, 96, "yuv420p"
        for frame in frames:
            larger = np.repeat(np.repeat(frame, 3, axis=0), 3, axis=1)[::2, ::2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(larger), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """Write a configuration with five clips: three planted ones, one of another benchmark, and a missing one."""
    media, test = tmp_path / "media", twins() / "vinoground" / VIDEOS
    media.mkdir()
    shutil.copy(twins() / "tomato" / "videos" / "human" / "count_0000.mp4", media / "0_POS.mp4")  # the name alone
    shutil.copy(test / "0_neg.mp4", media / "copy.mp4")
    encoded_anew(test / "1_pos.mp4", media / "anew.avi")
    shutil.copy(twins() / "tomato" / "videos" / "object" / "rotation_0001.mp4", media / "other.mp4")
    names = ("0_POS.mp4", "copy.mp4", "anew.avi", "other.mp4", "absent.mp4")
    records = [{"video": name, "QA": [{"q": "What happens?", "a": "something moves"}]} for name in names]
    (tmp_path / "train.json").write_text(json.dumps(records))
    entry = {"anno_path": str(tmp_path / "train.json"), "media_dir": str(media)}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({"datasets": {"mine": entry}}))
    return path


def doctor(training: Path, *more: str) -> int:
    files = ["--overlap", str(training), "--benchmark", "vinoground", "--anno-path", str(twins() / "vinoground")]
    return main(["doctor", *files, "--num-workers", "0", *more])


def signs(report: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return test clip -> sign -> names of training files."""
    return {
        one["video"]: {sign: [Path(path.split(" (")[0]).name for path in paths] for sign, paths in one["train"].items()}
        for one in report["found"]
    }


def test_planted_test_clips_are_found(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imagehash", reason="pip install 'stllm[overlap]'")
    assert doctor(training, "--json") == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["num_test"], report["num_train"]) == (8, 5)
    found = signs(report)
    assert found[str(VIDEOS / "0_pos.mp4")]["name"] == ["0_POS.mp4"]
    assert found[str(VIDEOS / "0_neg.mp4")]["content"] == ["copy.mp4"]
    assert found[str(VIDEOS / "0_neg.mp4")]["frames"][0] == "copy.mp4"
    assert found[str(VIDEOS / "1_pos.mp4")] == {"frames": ["anew.avi"]}
    assert not any("other.mp4" in names for one in found.values() for names in one.values())
    assert "text/1_pos" in next(one["items"] for one in report["found"] if one["video"].endswith("1_pos.mp4"))
    assert report["notes"] == [
        f"1 training clips are not there ({training.parent / 'media' / 'absent.mp4'}): only their names were compared"
    ]
    assert "test clips in the training data" in captured.err


def test_without_imagehash_names_and_content_are_compared(
    training: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert doctor(training) == 1
    captured = capsys.readouterr()
    assert "frames were not compared, as imagehash is not installed: pip install 'stllm[overlap]'" in captured.out
    assert "name: " in captured.out and "content: " in captured.out and "frames: " not in captured.out
    assert "found 3 test clips in the training data, between 8 test clips and 5 training clips" in captured.err


@pytest.mark.parametrize("kind", ["instruction", "video_text"])
def test_training_clips_in_tars_are_compared(training: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each clip in a tar is found by the signs by which the same clip on disk is found, also by another process."""
    pytest.importorskip("imagehash", reason="pip install 'stllm[overlap]'")
    assert doctor(training, "--json") == 1
    on_disk = json.loads(capsys.readouterr().out)
    root = training.parent
    with tarfile.open(root / "clips.tar", "w") as tar:
        for clip in sorted((root / "media").iterdir()):
            tar.add(clip, clip.name)
            if kind == "video_text":
                (root / "text").write_text("something moves")
                tar.add(root / "text", f"{clip.stem}.txt")
    shutil.rmtree(root / "media")
    entry = {"shards": str(root / "clips.tar"), "cache_dir": str(root / "cache")}
    entry |= {"type": kind} if kind == "video_text" else {"anno_path": str(root / "train.json")}
    training.write_text(yaml.safe_dump({"datasets": {"mine": entry}}))
    assert doctor(training, "--json", "--num-workers", "1") == 1
    in_tars = json.loads(capsys.readouterr().out)
    assert signs(in_tars) == signs(on_disk)
    assert signs(in_tars)[str(VIDEOS / "0_neg.mp4")]["content"] == ["copy.mp4"]
    missing = [] if kind == "video_text" else ["absent.mp4"]
    assert [name in note for name, note in zip(missing, in_tars["notes"], strict=True)] == [True] * len(missing)


def test_no_overlap(training: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads((training.parent / "train.json").read_text())
    (training.parent / "train.json").write_text(json.dumps(records[3:4]))
    assert doctor(training) == 0
    assert "no overlap found between 8 test clips and 1 training clips" in capsys.readouterr().out


def test_nothing_to_compare_is_reported(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (training.parent / "train.json").write_text("[")
    assert doctor(training) == 1
    error = capsys.readouterr().err
    assert "found no video in its data sets: mine: " in error and "train.json" in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--overlap", "a.yaml"], "needs --overlap TRAIN_YAML, --benchmark BENCH and its --anno-path"),
        (["--benchmark", "tomato", "--anno-path", "a"], "needs --overlap TRAIN_YAML"),
        (["--overlap", "a", "--benchmark", "tomato", "--anno-path", "a", "--format", "tomato"], "--format does not go"),
    ],
)
def test_missing_options_are_reported(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert sentence in capsys.readouterr().err
