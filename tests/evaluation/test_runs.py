"""A run's files: joining of records, checks of items and settings before resuming, and hashes.

Also: incomplete lines, priority of answers over errors, full disks, and refusals that lose nothing.
"""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from stllm.common.errors import UserError
from stllm.common.jsonl import Appender
from stllm.conversation.requests import Media
from stllm.evaluation import runs
from stllm.evaluation.asking import failed, head
from stllm.evaluation.benchmarks.base import Item
from stllm.evaluation.runs import RecordFiles, check_items, check_same, checkpoint_digest, content_digest
from stllm.models.checkpoints.formats import open_source
from tests.helpers.evaluation import CHECKPOINT


def record(id_: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "prediction": f"ein Würfel {id_}", **more}


def write(path: Path, *records: dict[str, Any]) -> None:
    with Appender(path) as lines:
        for one in records:
            lines.add(one)


def test_parts_are_joined_in_order_and_removed(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run[1]")  # a name that means something to glob
    write(files.path, record("b"))
    write(files.part(0), record("d"))
    write(files.part(1), record("a"), record("c"))
    (tmp_path / "run1.part-0.jsonl").write_text("another's")
    assert list(files.join(["a", "b", "c", "d", "e"])) == ["a", "b", "c", "d"]
    assert [json.loads(line)["id"] for line in files.path.read_text().splitlines()] == ["a", "b", "c", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run1.part-0.jsonl", "run[1].jsonl"]


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"), record("b"))
    whole = files.path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        files.path.write_bytes(whole[:end])
        write(files.path, record("b"))
        assert files.path.read_bytes() == whole
        files.path.write_bytes(whole[:end])
        assert list(files.join(["a", "b"])) == ["a"]
        assert files.path.read_bytes() == whole[:first]


def test_a_complete_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"))
    files.path.write_bytes(files.path.read_bytes().rstrip(b"\n"))
    assert list(files.gather()) == ["a"]
    write(files.path, record("b"))
    assert list(files.join(["a", "b"])) == ["a", "b"]


def test_answers_have_priority_over_errors_else_the_last_line_counts(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"), record("b", error="gone"), record("c", error="gone"))
    write(files.part(0), record("a", error="gone"), record("b"), record("c", error="still gone"))
    found = files.join(["a", "b", "c"])
    assert [found[id_].get("error") for id_ in "abc"] == [None, None, "still gone"]


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"prediction": "x"}', '{"id": 3}'])
def test_a_foreign_line_is_reported_and_nothing_changes(tmp_path: Path, line: str) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("a"))
    with files.path.open("a") as stream:
        stream.write(line + "\n")
    before = files.path.read_bytes()
    with pytest.raises(UserError, match=r"run\.jsonl, line 2: found .* remove the line"):
        files.join(["a"])
    assert files.path.read_bytes() == before


def test_a_full_disk_while_joining_keeps_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RecordFiles(tmp_path, "run")
    write(files.path, record("b"))
    write(files.part(0), record("a"))

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_text", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        files.join(["a", "b"])
    assert list(files.gather()) == ["b", "a"]


def test_two_runs_cannot_write_at_once(tmp_path: Path) -> None:
    first, second = RecordFiles(tmp_path, "run"), RecordFiles(tmp_path, "run")
    with first.locked():
        with pytest.raises(UserError, match="another process writes to it"), second.locked():
            pass
        with RecordFiles(tmp_path, "other").locked():
            pass
    with second.locked():
        pass


# ---- which lines may be continued ------------------------------------------------------------------------------------


PATH = Path("out") / "mvbench.jsonl"
BOUNDED = Item("a/0", "A", "a.mp4", Media("a.mp4", start=1.0, end=4.5), ("What?",), "yes", ("yes", "no"))


def test_an_item_is_the_same_if_its_file_moves() -> None:
    moved = replace(BOUNDED, media=Media("/elsewhere/a.mp4", start=1.0, end=4.5))
    gone = replace(BOUNDED, media=None, error="a.mp4: there is no such file")
    for item in (BOUNDED, moved, gone):
        check_items(PATH, {"a/0": head(BOUNDED)}, [item])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"media": Media("a.mp4", start=1.0, end=5.0)}, "clip of a/0 was [1.0, 4.5] and is [1.0, 5.0]"),
        ({"media": Media("a.mp4")}, "clip of a/0 was [1.0, 4.5] and is None"),
        ({"candidates": ("no", "yes")}, "candidates of a/0 was ['yes', 'no'] and is ['no', 'yes']"),
        ({"answer": "no"}, "answer of a/0 was 'yes' and is 'no'"),
    ],
)
def test_an_answer_about_another_item_is_refused(changed: dict[str, object], message: str) -> None:
    now = replace(BOUNDED, **changed)  # type: ignore[arg-type]  # the test's own fields
    with pytest.raises(UserError) as caught:
        check_items(PATH, {"a/0": head(BOUNDED)}, [now])
    assert message in str(caught.value)
    check_items(PATH, {"a/0": failed(BOUNDED, "a.mp4: unreadable")}, [now])  # it is asked again


def test_records_of_items_that_are_not_asked_are_refused() -> None:
    with pytest.raises(UserError, match=r"answers 1 items that are not asked now \(a/0\)"):
        check_items(PATH, {"a/0": head(BOUNDED)}, [])


SETTINGS = {"evaluation": {"num_frames": 16, "batch_size": 8, "output_dir": "out"}, "model": {"video_input": "all"}}
LINE = '{"id": "a/0", "prediction": "yes"}\n'


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "mvbench.jsonl"
    path.write_text(LINE)
    return path


def test_equal_settings_resume_and_changed_ones_are_named(records: Path) -> None:
    file = records.with_name("mvbench.config.yaml")
    file.write_text(OmegaConf.to_yaml(SETTINGS))
    check_same(file, SETTINGS, records)
    with pytest.raises(
        UserError, match=r"made with another setting: .*video_input.*; set it back to continue"
    ) as caught:
        check_same(file, {**SETTINGS, "model": {"video_input": "mean"}}, records)
    assert "'all'" in str(caught.value) and "'mean'" in str(caught.value)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, "mvbench.jsonl has records, but the file of their settings, mvbench.config.yaml, is missing"),
        ("model: {video_input: [all", "mvbench.config.yaml cannot be read"),
        ("", "made with another setting"),
    ],
)
def test_records_without_a_settings_file_are_refused(records: Path, kept: str | None, message: str) -> None:
    file = records.with_name("mvbench.config.yaml")
    if kept is not None:
        file.write_text(kept)
    with pytest.raises(UserError, match=message) as caught:
        check_same(file, SETTINGS, records)
    assert "name another --output-name to begin anew" in str(caught.value)
    assert records.read_text() == LINE


# ---- digests ---------------------------------------------------------------------------------------------------------


def of(folder: Path) -> str:
    return checkpoint_digest([open_source(folder)])


def test_the_hash_of_a_checkpoint_depends_on_its_content(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHECKPOINT, tmp_path / "another name"))
    assert of(copy) == of(CHECKPOINT)
    (copy / "mvbench.results.json").write_text("{}")  # of an evaluation that was written there
    (copy / "log.jsonl").write_text("{}")
    assert of(copy) == of(CHECKPOINT)
    weights = copy / "pytorch_model-00002-of-00002.bin"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert of(copy) != of(CHECKPOINT)


def test_the_hash_covers_tokenizer_and_configuration(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model"):
        copy = Path(shutil.copytree(CHECKPOINT, tmp_path / name))
        with (copy / name).open("ab") as stream:
            stream.write(b" ")
        assert of(copy) != of(CHECKPOINT)


def test_the_hash_samples_all_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SMALL", 1000)
    monkeypatch.setattr(runs, "STRIDE", 100)
    monkeypatch.setattr(runs, "BLOCK", 10)
    content = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    path = tmp_path / "model.safetensors"

    def digest_of(values: np.ndarray) -> str:
        path.write_bytes(values.tobytes())
        return checkpoint_digest([SimpleNamespace(path=path)])  # type: ignore[list-item]  # nothing else is read

    before = digest_of(content)
    for start in (0, 1700, 4995):
        changed = content.copy()
        changed[start : start + 100] ^= 1
        assert digest_of(changed) != before
    changed = content.copy()
    changed[20:90] ^= 1  # between two blocks
    assert digest_of(changed) == before


def test_the_order_of_keys_does_not_matter_their_values_do() -> None:
    assert content_digest({"a": 1, "b": [2]}) == content_digest({"b": [2], "a": 1})
    assert content_digest({"a": 1}) != content_digest({"a": 2})
    assert len(content_digest("")) == 16
