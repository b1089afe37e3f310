"""Odd input: unpaired surrogates, deeply nested values, huge numbers and names, streams that change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stllm.cli import main
from stllm.common.jsonl import loads
from stllm.media.open import open_media
from tests.attacks.test_no_code import CLIP, TINY
from tests.helpers.training import write_recipe

DEEP = "[" * 100_000 + "]" * 100_000
CHAT = ["chat", "--device", "cpu", "--video", str(CLIP), "--question", "q"]


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Run a command that must fail, and return the sentence that it prints."""
    assert main(words) == code
    captured = capsys.readouterr()
    assert "unexpected" not in captured.out + captured.err and "Traceback" not in captured.err
    return captured.out + captured.err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"\xef\xbb\xbf[1]", [1]),
        ("[1]".encode("utf-16"), [1]),
        ('{"a": 1, "a": 2}', {"a": 2}),
        (DEEP, "nested too deeply"),
        ("9" * 5000, r"limit \(4300"),
        (b"[\xff]", "decode"),
        ("[1", "Expecting"),
    ],
)
def test_loads_returns_a_value_or_raises_value_error(text, value) -> None:
    if isinstance(value, str):
        with pytest.raises(ValueError, match=value):
            loads(text)
    else:
        assert loads(text) == value


@pytest.mark.parametrize("text", [DEEP, '{"a": %s}' % ("9" * 5000), "\ufeff[]"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_odd_json_in_a_checkpoint_is_reported(name, text, tmp_path, capsys) -> None:
    for path in TINY.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(text)
    assert main([*CHAT, "--ckpt-path", str(tmp_path)]) in (0, 1)
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize("text", [DEEP[95_000:105_000], "a: " + "9" * 5000, "a: &a [*a]", "\ud800"])
def test_odd_yaml_is_reported(text, tmp_path, capsys) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert str(path) in said(["train", "--cfg-path", str(path)], capsys)


def test_yaml_aliases_for_a_billion_values_are_refused(tmp_path, capsys) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    assert "stand for more than 100,000 values" in said(["train", "--cfg-path", str(tmp_path / "x.yaml")], capsys)


LONG = "x" * 5000
PLACES: dict[str, list[str]] = {
    "inspect": ["inspect", "{}"],
    "convert": ["convert", str(TINY), "--to", "{}"],
    "checkpoint": [*CHAT, "--ckpt-path", "{}"],
    "video": [*CHAT, "--ckpt-path", str(TINY), "--video", "{}"],
    "evidence": [*CHAT, "--ckpt-path", str(TINY), "--evidence", "{}.png"],
    "configuration": ["train", "--cfg-path", "{}"],
    "annotations": ["doctor", "--anno-path", "{}", "--format", "vc2"],
    "tasks": ["doctor", "--anno-path", "{}", "--format", "mvbench"],
    "shards": ["doctor", "--anno-path", "{}", "--format", "shards"],
    "flatten": ["doctor", "--flatten", "{}", "{}"],
    "benchmark": ["evaluate", "vcgbench", "--ckpt-path", str(TINY), "--anno-path", "{}", "--video-dir", "{}"],
    "predictions": ["judge", "qa", "--pred-path", "{}", "--model", "m", "--output-dir", "{}"],
    "results": ["table", "{}"],
}


@pytest.mark.parametrize("name", [LONG, "a\0b", "a\ud800b", "~nouser/x"])
@pytest.mark.parametrize("place", sorted(PLACES))
def test_impossible_paths_are_reported(place, name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("~") and place in ("convert", "evidence"):
        return  # a folder of that name, which is made
    message = said([word.format(name) for word in PLACES[place]], capsys)
    assert len(message) < 20_000


def train(folder: Path, toy: Path, capsys: pytest.CaptureFixture[str], records: list[Any], **run: Any) -> str:
    """Train a few steps on these records and valid ones, and return what is printed."""
    (folder / "odd.json").write_text(json.dumps(records))
    data = {"odd": {"anno_path": str(folder / "odd.json"), "media_dir": str(toy / "vc2" / "media"), "num_frames": 4}}
    words = {"max_steps": 3, "max_bad_fraction": 0.95, "dataloader_num_workers": 1, **run}
    recipe = write_recipe(folder / "t.yaml", toy, datasets=data, **words)
    return said(["train", "--cfg-path", str(recipe)], capsys, code=0)


@pytest.mark.slow
def test_unreadable_records_are_left_out_of_training(tmp_path, toy, capsys) -> None:
    """The records have a text of 50 MB, a name of 5,000 characters, and an unpaired surrogate."""
    good = next((toy / "vc2" / "media").rglob("*.mp4")).relative_to(toy / "vc2" / "media")
    pair = {"q": "what?", "a": "red"}
    odd = [
        {"video": str(good), "QA": [{"q": "what?", "a": "word " * 10**7}]},
        {"video": LONG, "QA": [pair]},
        {"video": "a\0.mp4", "QA": [pair]},
        {"video": "a\ud800.mp4", "QA": [{"q": "\ud800", "a": "\udfff"}]},
        {"video": str(good), "start": float("inf"), "end": 10**400, "QA": [pair]},
    ]
    records = [{"video": str(good), "QA": [pair]}] * 4 + odd
    message = train(tmp_path, toy, capsys, records, max_steps=12)
    assert "found a text of 50,000,000 characters, expected at most 1,000,000" in message
    assert "File name too long" in message


@pytest.mark.slow  # the file's first part must be longer than what FFmpeg looks at when it opens one
@pytest.mark.parametrize(("codec", "size", "pid"), [("libx264", (64, 48), "0x200"), ("mpeg2video", (96, 64), "0x300")])
def test_a_transport_stream_whose_streams_change_in_the_middle(codec, size, pid, tmp_path, capsys) -> None:
    first = transport_stream("libx264", (320, 240), 60, "0x100", noise=True)
    assert len(first) > 5_500_000
    path = tmp_path / "x.ts"
    path.write_bytes(first + transport_stream(codec, size, 20, pid))
    with open_media(path) as media:
        frames = list(media.frames(range(0, media.info.num_frames, 10)))
    assert len(frames) >= 5 and {frame.shape for frame in frames} == {(240, 320, 3)}
    assert main(["chat", "--device", "cpu", "--ckpt-path", str(TINY), "--video", str(path), "--question", "q"]) == 0


def transport_stream(codec: str, size: tuple[int, int], frames: int, pid: str, *, noise: bool = False) -> bytes:
    """Return an MPEG-TS with one video stream. noise: True for frames that compress badly."""
    import io

    import av

    file = io.BytesIO()
    drawn = np.random.default_rng(0)
    with av.open(file, "w", format="mpegts", options={"mpegts_start_pid": pid}) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 20_000_000
        for number in range(frames):
            shape = (size[1], size[0], 3)
            picture = drawn.integers(0, 255, shape, np.uint8) if noise else np.full(shape, number * 4, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
