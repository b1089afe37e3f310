"""Section `datasets`: names, types, ranges and roots. Error messages name the file and the nearest key."""

from pathlib import Path

import pytest

from stllm.common.config import load_config
from stllm.common.errors import UserError


def load(folder: Path, text: str, *options: str):
    path = folder / "my.yaml"
    path.write_text("model: {model_type: tiny}\n" + text)
    return load_config(path, options).datasets


def test_the_published_form_loads_unchanged(tmp_path) -> None:
    text = "datasets:\n  caption_videochat:\n    num_frames: 64\n  reasoning_next_qa: {num_frames: 64}\n  llava_full:"
    assert load(tmp_path, text) == {
        "caption_videochat": {"num_frames": 64},
        "reasoning_next_qa": {"num_frames": 64},
        "llava_full": {},
    }


def test_roots_are_paths_relative_to_the_yaml(tmp_path, monkeypatch) -> None:
    (tmp_path / "media").mkdir()
    monkeypatch.setenv("ANNO", "/anno")
    found = load(tmp_path, "datasets: {anno_root: '${oc.env:ANNO}', media_root: media, a: {features_dir: ./f}}")
    assert found == {
        "anno_root": "/anno",
        "media_root": str(tmp_path / "media"),
        "a": {"features_dir": f"{tmp_path}/f"},
    }


def test_text_is_converted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FRAMES", "8")
    found = load(
        tmp_path, "datasets: {a: {num_frames: '${oc.env:FRAMES}', instruction: [one, two]}}", "datasets.a.fps=5"
    )
    assert found.a == {"num_frames": 8, "instruction": ["one", "two"], "fps": 5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a: {num_frame: 8}", "unknown key 'datasets.a.num_frame'; did you mean 'num_frames'?"),
        ("a: {split: test}", "unknown datasets.a.split 'test': known are train, val"),
        ("a: {val_fraction: 0.7}", "'datasets.a.val_fraction' must be from 0 to 0.5, found 0.7"),
        ("a: {num_frames: many}", "'datasets.a.num_frames' must be a whole number, found 'many'"),
        ("a: {num_frames: 0}", "'datasets.a.num_frames' must be at least 1, found 0"),
        ("a: {multi_turn: perhaps}", "'datasets.a.multi_turn' must be true or false, found 'perhaps'"),
        ("a: {media: vidoe}", "unknown datasets.a.media 'vidoe': known are image, text, video; did you mean 'video'?"),
        ("a: {qa_sampling: two}", "unknown datasets.a.qa_sampling 'two'"),
        ("a: {sample_ratio: -1}", "'datasets.a.sample_ratio' must be at least 0, found -1"),
        ("a: {instruction: {b: c}}", "'datasets.a.instruction' must be a text or a list of texts, found {'b': 'c'}"),
        ("a: {instruction: [1]}", "'datasets.a.instruction' must be a text or a list of texts, found [1]"),
        ("a: 64", "'datasets.a' must be a mapping of keys, found 64"),
        ("anno_rot: d", "'datasets.anno_rot' must be a mapping of keys, found 'd'; did you mean 'anno_root'?"),
        ("a: {zzz: 1}", "unknown key 'datasets.a.zzz'; known are anno_path, anno_root, cache_dir"),
        ("anno_root: {a: b}", "'datasets.anno_root' must be the path of a folder, found {'a': 'b'}"),
    ],
)
def test_errors_name_the_file_and_the_nearest_key(tmp_path, entry: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, f"datasets: {{{entry}}}")
    assert str(error.value).startswith(f"{tmp_path / 'my.yaml'}: {message}")
    with pytest.raises(UserError, match=r"^--options: unknown key 'datasets.a.num_fram'; did you mean 'num_frames'\?"):
        load(tmp_path, "datasets: {a: {num_frames: 8}}", "datasets.a.num_fram=4")
